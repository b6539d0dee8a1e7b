"""Attention over the cache as a loop over blocks of positions, in plain JAX: runs on every platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK = 256  # cache positions per iteration


def attend(
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
    """Attend to the cached positions up to that of each query, with logits `cap * tanh(q.k * m / cap)`.

    Capped logits can be exponentiated without subtracting their maximum, so that sums over blocks are simply added.
    Only blocks with a visible position are read.

    Args:
        query: float `[batch, seq, heads, key]`; head h reads key/value head `h * kv_heads // heads`.
        keys: a stack of caches `[layers, sequences, kv_heads, max_seq_len, key]`.
        values: the same for values.
        layer: index of the layer; may be traced.
        positions: int32 `[batch, seq]`, position of each query; negative for padding.
        slots: int32 `[batch]`, index in the cache of the sequence that each row attends to; by default 0, 1, 2, ….
        multiplier: factor m of the products of queries and keys.
        cap: bound of the logits.

    Returns:
        float32 `[batch, seq, heads, key]`; 0 for padding.
    """
    batch, seq, heads, size = query.shape
    kv_heads, max_seq_len = keys.shape[2], keys.shape[3]
    block = min(_BLOCK, max_seq_len)
    grouped = query.reshape(batch, seq, kv_heads, heads // kv_heads, size)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, size).astype(keys.dtype)

    def slice_block(cache: jax.Array, start: jax.Array) -> jax.Array:
        if slots is None:
            return lax.dynamic_slice(cache, (layer, 0, 0, start, 0), (1, batch, kv_heads, block, size))[0]
        rows = [
            lax.dynamic_slice(cache, (layer, slots[row], 0, start, 0), (1, 1, kv_heads, block, size))[0]
            for row in range(batch)
        ]
        return jnp.concatenate(rows)

    def add_block(i: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weighted, mass = totals
        start = jnp.minimum(i * block, max_seq_len - block)  # the last block may overlap the one before
        key_positions = start + jnp.arange(block)
        logits = jnp.einsum("bkqd,bksd->bkqs", grouped, slice_block(keys, start), preferred_element_type=jnp.float32)
        logits = cap * jnp.tanh(logits * (multiplier / cap))
        visible = (key_positions <= positions[:, :, None]) & (key_positions >= i * block)  # [batch, seq, block]
        logits = logits.reshape(batch, kv_heads, -1, seq, block)
        weights = jnp.where(visible[:, None, None], jnp.exp(logits - cap), 0.0)
        weights = weights.reshape(batch, kv_heads, -1, block)
        block_values = slice_block(values, start)
        weighted += jnp.einsum(
            "bkqs,bksd->bkqd", weights.astype(values.dtype), block_values, preferred_element_type=jnp.float32
        )
        return weighted, mass + jnp.sum(weights, axis=-1)

    zeros = jnp.zeros(grouped.shape, jnp.float32)
    blocks = (jnp.max(positions) + block) // block  # up to the largest position of a query
    weighted, mass = lax.fori_loop(0, blocks, add_block, (zeros, zeros[..., 0]))
    output = weighted / jnp.where(mass > 0, mass, 1.0)[..., None]  # padding attends to nothing
    output = output.reshape(batch, kv_heads, heads // kv_heads, seq, size)
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, size)
