"""One shard of a model: the sizes that a device of the model axis holds, and the sum over that axis."""

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
    """One of the shards that a model is divided into.

    Expert width and vocabulary are split over all shards; heads and scale groups over as many as there are, so that
    with more shards neighbors hold the same ones.

    Attributes:
        config: the whole model's config.
        shards: number of shards, 1 for an unsharded model.
        axis: name of the mesh axis of the shards.
        dtype: dtype of activations between modules and of the cache; norms, router, softmax and sums stay in float32.
        kernels: implementation of the operations.
    """

    config: ModelConfig
    shards: int = 1
    axis: str = "model"
    dtype: jnp.dtype = _FLOAT32
    kernels: Kernels = XLA

    def _part(self, units: int) -> int:
        """Number of a model's indivisible units that a shard holds."""
        return shard_range(units, units, self.shards, 0).stop

    @property
    def num_q_heads(self) -> int:
        """Query heads of a shard."""
        return self._part(self.config.num_q_heads)

    @property
    def attention_copies(self) -> int:
        """Number of shards that hold the same query heads."""
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
        """Scale groups of a shard, for a matrix whose input dimension is split, at least 1."""
        return self._part(SCALE_GROUPS)

    def cache_shape(self, slots: int) -> tuple[int, ...]:
        """Shape of a shard's keys, and of its values: `[layers, slots, kv_heads, max_seq_len, key]`."""
        config = self.config
        return config.num_layers, slots, self.num_kv_heads, config.sequence_len, config.key_size

    def sum_over_shards(self, x: jax.Array) -> jax.Array:
        """The sum of every shard's float32 `x`, exchanged in the activations' dtype."""
        if self.shards == 1:
            return x
        return lax.psum(x.astype(self.dtype), self.axis).astype(jnp.float32)

    def first_token(self) -> jax.Array | int:
        """The token id of the first embedding row of this shard."""
        return 0 if self.shards == 1 else lax.axis_index(self.axis) * self.vocab_size

    def gather_vocabulary(self, logits: jax.Array) -> jax.Array:
        """Every shard's logits `[..., vocab of a shard]` side by side, `[..., vocab]`."""
        if self.shards == 1:
            return logits
        return lax.all_gather(logits, self.axis, axis=logits.ndim - 1, tiled=True)
