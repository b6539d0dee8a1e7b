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
    """What the modules of the network need to know about being one of several shards.

    Expert width and vocabulary are split over the shards. Heads and scale groups are split as far as there are enough
    of them; beyond that neighboring shards hold the same ones, and attend to the same with them.

    Attributes:
        config: the whole model's config.
        shards: number of shards, 1 for an unsharded model.
        axis: name of the mesh axis that the shards lie on.
        dtype: dtype of activations between modules and of the cache; norms, router, softmax and sums stay in float32.
        kernels: implementation of the operations.
    """

    config: ModelConfig
    shards: int = 1
    axis: str = "model"
    dtype: jnp.dtype = _FLOAT32
    kernels: Kernels = XLA

    def _part(self, units: int) -> int:
        """How many of a model's indivisible units a shard holds."""
        return shard_range(units, units, self.shards, 0).stop

    @property
    def num_q_heads(self) -> int:
        """Query heads of a shard."""
        return self._part(self.config.num_q_heads)

    @property
    def attention_copies(self) -> int:
        """How many shards hold the same query heads."""
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
        """Scale groups of a shard's part of a matrix whose input dimension is split, at least 1."""
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
