"""The expert layer: each row through the gated linear units of the experts that it was sent to."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grok1.ops import cpu
from grok1.ops.backend import Backend
from grok1.ops.grouped_matmul import gather_rows, group_by_expert, grouped_matmul, grouped_matmuls, scatter_rows
from grok1.quantize import PackedWeight, QuantizedWeight

Weight = QuantizedWeight | PackedWeight


def gated_experts(
    x: jax.Array,
    gate: Weight,
    value: Weight,
    project: Weight,
    layer: jax.Array | int,
    experts: jax.Array,
    backend: Backend = "xla",
) -> jax.Array:
    """`(gelu(x @ gate) * (x @ value)) @ project` with the matrices of each row's experts (Shazeer, 2020).

    GELU is the tanh approximation. Between the two products activations have the dtype of `x`.

    Args:
        x: float `[rows, K]`.
        gate: a stack `[layers, experts, K, F]`.
        value: another.
        project: a stack `[layers, experts, F, N]`. All three are packed, for the kernels for processors, or none is.
        layer: which layer; may be traced.
        experts: int32 `[rows, selected]`; the number of experts sends a row nowhere, which gives 0.
        backend: what computes it; that of packed weights is always the one for processors.

    Returns:
        float32 `[rows, selected, N]`, the outputs of each row's experts.
    """
    rows, selected = experts.shape
    num_experts = gate.shape[1]
    chosen = experts.reshape(-1)
    if isinstance(gate, PackedWeight) and isinstance(value, PackedWeight) and isinstance(project, PackedWeight):
        place = jnp.where(chosen < num_experts, layer * num_experts + chosen, -1)
        hidden = cpu.multiply_gated(x, gate, value, place).astype(x.dtype)
        return cpu.multiply(hidden, project, place).reshape(rows, selected, -1)
    if isinstance(gate, PackedWeight) or isinstance(value, PackedWeight) or isinstance(project, PackedWeight):
        raise TypeError("some of the experts' weights are packed and some are not")
    blocks = group_by_expert(chosen, num_experts, backend)
    inputs = scatter_rows(jnp.repeat(x, selected, axis=0), blocks)
    gates, values = grouped_matmuls(inputs, [gate, value], layer, blocks, backend)
    hidden = (jax.nn.gelu(gates, approximate=True) * values).astype(x.dtype)
    return gather_rows(grouped_matmul(hidden, project, layer, blocks, backend), blocks).reshape(rows, selected, -1)


def definition(
    x: jax.Array, gate: Weight, value: Weight, project: Weight, layer: jax.Array | int, experts: jax.Array
) -> jax.Array:
    """What `gated_experts` computes, by all experts for every row."""

    def matrices(weight: Weight) -> jax.Array:
        return weight.dequantize()[layer]  # [experts, K, N]

    x = x.astype(jnp.float32)
    gated = jax.nn.gelu(jnp.einsum("mk,ekn->men", x, matrices(gate), precision="highest"), approximate=True)
    hidden = gated * jnp.einsum("mk,ekn->men", x, matrices(value), precision="highest")
    every = jnp.einsum("men,enk->mek", hidden, matrices(project), precision="highest")
    chosen = jax.nn.one_hot(experts, gate.shape[1], dtype=jnp.float32)  # [rows, selected, experts]
    return jnp.einsum("mek,mse->msk", every, chosen, precision="highest")
