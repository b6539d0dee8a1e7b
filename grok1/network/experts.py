"""The mixture-of-experts layer: router and experts."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp

from grok1.network.layers import QuantizedLinear
from grok1.network.shard import ModelShard


class Router(hk.Module):
    """Top-k router, computed in float32."""

    def __init__(self, shard: ModelShard, name: str = "router"):
        super().__init__(name=name)
        self.config = shard.config

    def __call__(self, x: jax.Array, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Select the experts of each row of `x`, float32 `[rows, emb]`.

        Returns:
            probabilities of the selected experts, float32 `[rows, selected]`, from a softmax over all experts and not
            renormalized; and their indices, int32 `[rows, selected]`.
        """
        config = self.config
        shape = (config.num_layers, config.emb_size, config.num_experts)
        w = hk.get_parameter("w", shape, jnp.float32, init=jnp.zeros)[layer]
        probabilities = jax.nn.softmax(jnp.dot(x, w, precision="highest"), axis=-1)
        return jax.lax.top_k(probabilities, config.num_selected_experts)


class MixtureOfExperts(hk.Module):
    """Sum of the selected experts' outputs, weighted by the router's probabilities.

    Each expert is a gated linear unit with GELU (Shazeer, 2020): `linear_1(gelu(linear(x)) * linear_v(x))`.
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
        """Apply each row's experts.

        Args:
            x: `[rows, emb]`.
            probabilities: float32 `[rows, selected]`.
            experts: int32 `[rows, selected]`.
            layer: index of the layer.
            valid: bool `[rows]`; the other rows are padding, for which no expert is computed.

        Returns:
            float32 `[rows, emb]`.
        """
        shard, config = self.shard, self.shard.config
        stack = (config.num_layers, config.num_experts)
        inward = (*stack, config.emb_size, shard.ffn_size)
        outward = (*stack, shard.ffn_size, config.emb_size)
        mixed = shard.kernels.gated_experts(
            x,
            QuantizedLinear(inward, 1, name="linear")(),
            QuantizedLinear(inward, 1, name="linear_v")(),
            QuantizedLinear(outward, shard.scale_groups, name="linear_1")(),
            layer,
            jnp.where(valid[:, None], experts, config.num_experts),
            probabilities,
        )
        return shard.sum_over_shards(mixed)
