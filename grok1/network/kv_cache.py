"""The key/value cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

_ROW_MAJOR = Layout(major_to_minor=(0, 1, 2, 3, 4))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys, after rotary embedding, and values of every layer.

    Attributes:
        keys: `[layers, slots, kv_heads, max_seq_len, key]` in the dtype of activations.
        values: same shape and dtype as `keys`.
    """

    keys: jax.Array
    values: jax.Array

    def write(
        self,
        layer: jax.Array | int,
        keys: jax.Array,
        values: jax.Array,
        positions: jax.Array,
        slots: jax.Array | None = None,
        keep_layout: bool = False,
    ) -> KVCache:
        """Return the cache with new keys and values written to one layer.

        Args:
            layer: index of the layer.
            keys: `[rows, seq, kv_heads, key]`.
            values: `[rows, seq, kv_heads, key]`.
            positions: int32 `[rows, seq]`; negative positions are not written.
            slots: int32 `[rows]`, slot of each row; by default row i uses slot i.
            keep_layout: whether to constrain the result to row-major layout. The TPU compiler would otherwise copy the
                whole cache to another layout and back.
        """
        slots = (jnp.arange(positions.shape[0]) if slots is None else slots)[:, None]
        indices = jnp.where(positions < 0, self.keys.shape[3], positions)  # past the end: dropped

        def put(cache: jax.Array, new: jax.Array) -> jax.Array:
            written = cache.at[layer, slots, :, indices].set(new.astype(cache.dtype), mode="drop")
            return with_layout_constraint(written, _ROW_MAJOR) if keep_layout else written

        return KVCache(put(self.keys, keys), put(self.values, values))
