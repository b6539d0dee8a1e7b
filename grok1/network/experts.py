"""The mixture of experts: the router, and the experts that it selects."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp

from grok1.network.layers import quantized_parameter
from grok1.network.shard import ModelShard
from grok1.ops.grouped_matmul import ExpertBlocks, gather_rows, group_by_expert, grouped_matmul, scatter_rows


class Router(hk.Module):
    """Picks the experts of each token, in float32."""

    def __init__(self, shard: ModelShard, name: str = "router"):
        super().__init__(name=name)
        self.config = shard.config

    def __call__(self, x: jax.Array, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """The selected experts of rows `x`, float32 `[rows, emb]`.

        Returns:
            their probabilities among all experts, float32 `[rows, selected]`, not normalised over the selected, and
            their indices, int32 `[rows, selected]`.
        """
        config = self.config
        shape = (config.num_layers, config.emb_size, config.num_experts)
        w = hk.get_parameter("w", shape, jnp.float32, init=jnp.zeros)[layer]
        probabilities = jax.nn.softmax(jnp.dot(x, w, precision="highest"), axis=-1)
        return jax.lax.top_k(probabilities, config.num_selected_experts)


class ExpertLinear(hk.Module):
    """Rows in blocks times the matrix of each block's expert."""

    def __init__(self, shard: ModelShard, input_size: int, output_size: int, groups: int, name: str):
        super().__init__(name=name)
        self.shape = (shard.config.num_layers, shard.config.num_experts, input_size, output_size)
        self.groups = groups

    def __call__(self, x: jax.Array, layer: jax.Array | int, blocks: ExpertBlocks) -> jax.Array:
        """`[slots, input]` to float32 `[slots, output]`."""
        return grouped_matmul(x, quantized_parameter("w", self.shape, self.groups), layer, blocks)


class MixtureOfExperts(hk.Module):
    """The selected experts' outputs, weighted by the router's probabilities and summed.

    An expert is a gated linear unit with GELU (Shazeer, 2020): `linear_1(gelu(linear(x)) * linear_v(x))`.
    """

    def __init__(self, shard: ModelShard, name: str = "moe"):
        super().__init__(name=name)
        self.shard = shard

    def __call__(
        self,
        x: jax.Array,
        probabilities: jax.Array,
        experts: jax.Array,
        layer: jax.Array | int,
        valid: jax.Array,
    ) -> jax.Array:
        """Runs each row through its experts.

        Args:
            x: `[rows, emb]`.
            probabilities: float32 `[rows, selected]`.
            experts: int32 `[rows, selected]`.
            layer: which layer.
            valid: bool `[rows]`; no expert is computed for a row that is not.

        Returns:
            float32 `[rows, emb]`.
        """
        shard, config = self.shard, self.shard.config
        emb, selected = config.emb_size, config.num_selected_experts
        chosen = jnp.where(valid[:, None], experts, config.num_experts).reshape(-1)  # [rows * selected]
        blocks = group_by_expert(chosen, config.num_experts)
        inputs = scatter_rows(jnp.repeat(x, selected, axis=0), blocks)
        gate = ExpertLinear(shard, emb, shard.ffn_size, 1, name="linear")(inputs, layer, blocks)
        value = ExpertLinear(shard, emb, shard.ffn_size, 1, name="linear_v")(inputs, layer, blocks)
        hidden = (jax.nn.gelu(gate, approximate=True) * value).astype(shard.dtype)
        project = ExpertLinear(shard, shard.ffn_size, emb, shard.scale_groups, name="linear_1")
        outputs = gather_rows(project(hidden, layer, blocks), blocks).reshape(-1, selected, emb)
        return shard.sum_over_shards(jnp.sum(outputs * probabilities[..., None], axis=1))
