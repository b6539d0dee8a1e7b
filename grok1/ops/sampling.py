"""Top-k, top-p and min-p filters.

Sorting 131072 logits takes longer than an entire step of a small model. The threshold of a filter is found by bisecting
the bits of the logits instead, which takes 32 sums over the vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def filter_logits(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Set the logits of all but the most likely tokens to minus infinity.

    The filters are applied in this order. Top-k keeps the k most likely tokens. Top-p (nucleus sampling, Holtzman et
    al., 2020) keeps the smallest set of most likely tokens whose probability, among those kept so far, reaches p. Min-p
    keeps tokens that are at least min_p times as likely as the most likely one. Of equally likely tokens, smaller ids
    come first. At least one token is kept.

    Args:
        logits: float32 `[batch, vocab]`.
        top_k: int32 `[batch]`; 0 disables the filter.
        top_p: float32 `[batch]`, above 0; 1 or more disables the filter.
        min_p: float32 `[batch]`, 0 to 1; 0 disables the filter.

    Returns:
        float32 `[batch, vocab]`.
    """
    keys = _ordered_bits(logits)
    ones = jnp.ones_like(logits)
    kept = (top_k[:, None] <= 0) | _likeliest(keys, ones, jnp.maximum(top_k, 1).astype(jnp.float32))
    probabilities = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    # A top_p that rounds to 0 in float32 still keeps the most likely token.
    nucleus = _likeliest(keys, probabilities, jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny))
    kept &= (top_p[:, None] >= 1) | nucleus
    kept &= probabilities >= min_p[:, None] * jnp.max(probabilities, axis=-1, keepdims=True)
    return jnp.where(kept, logits, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Return unsigned integers in the same order as float32 values, equal where those are equal."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # adding 0 turns -0 into 0
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _likeliest(keys: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Return a mask of the smallest set of entries with the largest keys whose weights sum to the target.

    Args:
        keys: uint32 `[batch, vocab]`; among equal keys, which have equal weights, earlier entries come first.
        weights: float32 `[batch, vocab]`, 0 or more.
        target: float32 `[batch]`, above 0; if the sum of all weights is smaller, all entries are included.
    """

    def sum_from(key: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(keys >= key[:, None], weights, 0.0), axis=-1)

    def try_bit(i: jax.Array, cut: jax.Array) -> jax.Array:
        higher = cut | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(sum_from(higher) >= target, higher, cut)

    # The largest threshold above which the weights reach the target.
    cut = lax.fori_loop(0, 32, try_bit, jnp.zeros(keys.shape[:1], jnp.uint32))[:, None]
    above, at_cut = keys > cut, keys == cut
    missing = target - jnp.sum(jnp.where(above, weights, 0.0), axis=-1)
    needed = jnp.ceil(missing / jnp.max(jnp.where(at_cut, weights, 0.0), axis=-1))
    rank = jnp.cumsum(at_cut, axis=-1)  # 1 for the first of equal keys
    return above | (at_cut & (rank <= jnp.maximum(needed, 1.0)[:, None]))
