"""The mixture of experts: the router, and the experts that it selects."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp

from grok1.network.layers import QuantizedLinear
from grok1.network.shard import ModelShard


class Router(hk.Module):
    """Selects the experts of each token, in float32."""

    def __init__(self, shard: ModelShard, name: str = "router"):
        super().__init__(name=name)
        self.config = shard.config

    def __call__(self, x: jax.Array, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """The selected experts of rows `x`, float32 `[rows, emb]`.

        Returns:
            their probabilities among all experts, float32 `[rows, selected]`, not normalized over the selected, and
            their indices, int32 `[rows, selected]`.
        """
        config = self.config
        shape = (config.num_layers, config.emb_size, config.num_experts)
        w = hk.get_parameter("w", shape, jnp.float32, init=jnp.zeros)[layer]
        probabilities = jax.nn.softmax(jnp.dot(x, w, precision="highest"), axis=-1)
        return jax.lax.top_k(probabilities, config.num_selected_experts)


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
        """Run each row through its experts.

        Args:
            x: `[rows, emb]`.
            probabilities: float32 `[rows, selected]`.
            experts: int32 `[rows, selected]`.
            layer: index of the layer.
            valid: bool `[rows]`; no expert is computed for other rows.

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
