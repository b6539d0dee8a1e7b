"""Sizes of one model shard, and communication between shards."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from grok1.config import SCALE_GROUPS, ModelConfig
from grok1.ops.xla.kernels import XLA, Kernels
from grok1.params.sharding import shard_range

_FLOAT32 = jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class ModelShard:
    """One shard of a model.

    Expert width and vocabulary are split across all shards. Heads and scale groups may be fewer than the shards; then
    neighboring shards have copies of the same ones.

    Attributes:
        config: config of the whole model.
        shards: number of shards.
        axis: name of the mesh axis of the shards.
        dtype: dtype of activations between modules and of the cache; norms, router, softmax and sums use float32.
        kernels: implementation of the operations.
    """

    config: ModelConfig
    shards: int = 1
    axis: str = "model"
    dtype: jnp.dtype = _FLOAT32
    kernels: Kernels = XLA

    def _part(self, units: int) -> int:
        """Return the number of a model's `units`, such as heads, in each shard."""
        return shard_range(units, units, self.shards, 0).stop

    @property
    def num_q_heads(self) -> int:
        """Query heads of a shard."""
        return self._part(self.config.num_q_heads)

    @property
    def attention_copies(self) -> int:
        """Number of shards with copies of the same query heads."""
        return self.shards * self.num_q_heads // self.config.num_q_heads

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of a shard, at least 1."""
        return self._part(self.config.num_kv_heads)

    @property
    def ffn_size(self) -> int:
        """Expert width of a shard."""
        return self._part(self.config.ffn_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix of a shard."""
        return self._part(self.config.vocab_size)

    @property
    def scale_groups(self) -> int:
        """Scale groups of a shard in a matrix whose input dimension is split, at least 1."""
        return self._part(SCALE_GROUPS)

    def cache_shape(self, slots: int) -> tuple[int, ...]:
        """Return the shape of a shard's keys and values: `[layers, slots, kv_heads, max_seq_len, key]`."""
        config = self.config
        return config.num_layers, slots, self.num_kv_heads, config.sequence_len, config.key_size

    def sum_over_shards(self, x: jax.Array) -> jax.Array:
        """Sum `x`, float32, over all shards; it is communicated in the dtype of activations."""
        if self.shards == 1:
            return x
        return lax.psum(x.astype(self.dtype), self.axis).astype(jnp.float32)

    def first_token(self) -> jax.Array | int:
        """Return the token id of this shard's first embedding row."""
        return 0 if self.shards == 1 else lax.axis_index(self.axis) * self.vocab_size

    def gather_vocabulary(self, logits: jax.Array) -> jax.Array:
        """Concatenate the logits `[..., vocab of a shard]` of all shards to `[..., vocab]`."""
        if self.shards == 1:
            return logits
        return lax.all_gather(logits, self.axis, axis=logits.ndim - 1, tiled=True)
