"""The filters that leave only the likely tokens to draw from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def filter_logits(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Sets the logits of all tokens but the likeliest to minus infinity.

    The filters apply one after the other. Top-k keeps the k likeliest tokens. Top-p (nucleus sampling, Holtzman et
    al., 2020) keeps the smallest set of the likeliest among those whose share of their mass reaches p. Min-p keeps
    those at least min_p times as likely as the likeliest. Of equally likely tokens the one with the smaller id comes
    first. At least one token stays.

    Args:
        logits: float32 `[batch, vocab]`.
        top_k: int32 `[batch]`; 0 switches the filter off.
        top_p: float32 `[batch]`, above 0; 1 or more switches the filter off.
        min_p: float32 `[batch]`, 0 to 1; 0 switches the filter off.

    Returns:
        float32 `[batch, vocab]`.
    """
    batch, vocab = logits.shape
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    negated, order = lax.sort((-logits, ids), num_keys=1, is_stable=True)
    by_rank = -negated  # falling
    rank = ids
    keep = (rank < top_k[:, None]) | (top_k[:, None] <= 0)
    probabilities = jax.nn.softmax(jnp.where(keep, by_rank, -jnp.inf), axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep &= (mass_before < top_p[:, None]) | (top_p[:, None] >= 1)
    keep &= probabilities >= min_p[:, None] * probabilities[:, :1]
    keep |= rank == 0
    rows = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    keep_by_id = jnp.zeros((batch, vocab), bool).at[rows, order].set(keep, unique_indices=True)
    return jnp.where(keep_by_id, logits, -jnp.inf)
