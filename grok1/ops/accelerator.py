"""Base of the GPU and TPU kernels: products of blocks of rows, each block with one matrix."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from grok1.ops.experts import ExpertBlocks, gated
from grok1.ops.xla.kernels import Kernels
from grok1.params.weights import QuantizedMatrix

# Rows of an accelerator's smallest product: with fewer rows, a product takes the same time.
_FEW_ROWS = 16


class AcceleratorKernels(Kernels):
    """Kernels that are composed of `block_products`, which a platform provides."""

    def block_products(
        self,
        x: jax.Array,
        weights: Sequence[QuantizedMatrix],
        layer: jax.Array | int,
        expert: jax.Array,
        active: jax.Array,
    ) -> list[jax.Array]:
        """Multiply blocks of rows by the matrices of their experts.

        Args:
            x: float `[blocks, rows, K]`, or `[1, rows, K]` for rows that are shared by all blocks.
            weights: stacks `[layers, experts, K, N]`, each with its own N.
            layer: index of the layer; may be traced.
            expert: int32 `[blocks]`, the expert of each block.
            active: bool `[blocks]`; results of inactive blocks are undefined.

        Returns:
            float32 `[blocks, rows, N]` for each stack.
        """
        raise NotImplementedError

    def matmuls(
        self, x: jax.Array, weights: Sequence[QuantizedMatrix], index: tuple[jax.Array | int, ...]
    ) -> list[jax.Array]:
        self.check_layout(*weights)
        if len(index) != 1:
            return super().matmuls(x, weights, index)
        most = self.block_rows[1]
        blocks = -(-x.shape[0] // most)
        size = x.shape[0] if blocks == 1 else most
        rows = jnp.pad(x, ((0, blocks * size - x.shape[0]), (0, 0))).reshape(blocks, size, -1)
        stacks = [weight[:, None] for weight in weights]
        expert, active = jnp.zeros(blocks, jnp.int32), jnp.ones(blocks, bool)
        products = self.block_products(rows, stacks, index[0], expert, active)
        return [product.reshape(blocks * size, -1)[: x.shape[0]] for product in products]

    def grouped_matmuls(
        self, x: jax.Array, weights: Sequence[QuantizedMatrix], layer: jax.Array | int, blocks: ExpertBlocks
    ) -> list[jax.Array]:
        active = jnp.arange(blocks.expert.shape[0]) < blocks.used
        in_blocks = x.reshape(-1, blocks.block_rows, x.shape[1])
        products = self.block_products(in_blocks, weights, layer, blocks.expert, active)
        return [product.reshape(blocks.num_slots, -1) for product in products]

    def gated_experts(
        self,
        x: jax.Array,
        gate: QuantizedMatrix,
        value: QuantizedMatrix,
        project: QuantizedMatrix,
        layer: jax.Array | int,
        experts: jax.Array,
        factors: jax.Array,
    ) -> jax.Array:
        if x.shape[0] > _FEW_ROWS:
            return super().gated_experts(x, gate, value, project, layer, experts, factors)
        # Computes all rows for each selected expert, so that no row is moved.
        self.check_layout(gate, value, project)
        num_experts = gate.shape[1]
        sent = experts < num_experts
        if experts.size <= num_experts:  # one block per selection
            expert, active = jnp.minimum(experts, num_experts - 1).reshape(-1), sent.reshape(-1)
            own = jnp.arange(experts.size)[:, None, None] == jnp.arange(experts.size).reshape(experts.shape)
        else:  # one block per expert
            expert = jnp.arange(num_experts, dtype=jnp.int32)
            own = expert[:, None, None] == experts
            active = jnp.any(own, axis=(1, 2))
        share = jnp.sum(jnp.where(own & sent, factors, 0.0), axis=2)  # [blocks, rows]
        hidden = gated(*self.block_products(x[None], [gate, value], layer, expert, active)).astype(x.dtype)
        (outputs,) = self.block_products(hidden, [project], layer, expert, active)
        return jnp.sum(jnp.where(share[..., None] != 0, outputs * share[..., None], 0.0), axis=0)
