"""Reference implementation of causal attention over a KV cache, with capped logits as in the release."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def reference_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array | int,
    positions: jax.Array,
    slots: jax.Array | None = None,
    *,
    multiplier: float,
    cap: float,
) -> jax.Array:
    """Compute `Kernels.attention` with all logits and the mask materialized."""
    heads, kv_heads, max_seq_len = query.shape[2], keys.shape[2], keys.shape[3]
    rows = jnp.arange(query.shape[0]) if slots is None else slots
    spread = [jnp.repeat(cache[layer][rows], heads // kv_heads, axis=1).astype(jnp.float32) for cache in (keys, values)]
    logits = jnp.einsum("bqhd,bhsd->bhqs", query.astype(jnp.float32), spread[0], precision="highest")
    logits = cap * jnp.tanh(logits * multiplier / cap)
    mask = (jnp.arange(max_seq_len) <= positions[..., None])[:, None]
    weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
    weights = jnp.where(mask, weights, 0.0)  # padding attends to nothing; softmax gives 0/0
    return jnp.einsum("bhqs,bhsd->bqhd", weights, spread[1], precision="highest")
