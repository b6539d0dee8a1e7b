"""The expert layer: each row through the gated linear units of the experts that it was sent to."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grok1.ops.backend import Backend
from grok1.ops.cpu import kernels as cpu
from grok1.ops.grouped_matmul import (
    block_products,
    gather_rows,
    group_by_expert,
    grouped_matmul,
    grouped_matmuls,
    scatter_rows,
)
from grok1.params.weights import QuantizedMatrix

# Up to so many rows go through an accelerator's smallest product anyway, for one expert as for another.
_FEW_ROWS = 16


def gated_experts(
    x: jax.Array,
    gate: QuantizedMatrix,
    value: QuantizedMatrix,
    project: QuantizedMatrix,
    layer: jax.Array | int,
    experts: jax.Array,
    factors: jax.Array,
    backend: Backend = "xla",
) -> jax.Array:
    """`(gelu(x @ gate) * (x @ value)) @ project` with the matrices of each row's experts (Shazeer, 2020), summed.

    GELU is the tanh approximation. Between the two products activations have the dtype of `x`.

    Args:
        x: float `[rows, K]`.
        gate: a stack `[layers, experts, K, F]`.
        value: another.
        project: a stack `[layers, experts, F, N]`. All three are packed, for the kernels for processors, or none is.
        layer: which layer; may be traced.
        experts: int32 `[rows, selected]`; the number of experts sends a row nowhere, which gives 0.
        factors: float32 `[rows, selected]`, what each expert's output is multiplied by.
        backend: what computes it; that of packed weights is always the one for processors.

    Returns:
        float32 `[rows, N]`.
    """
    in_panels = [weight.layout is not None for weight in (gate, value, project)]
    if all(in_panels):
        num_experts = gate.shape[1]
        chosen = experts.reshape(-1)
        place = jnp.where(chosen < num_experts, layer * num_experts + chosen, -1)
        hidden = cpu.multiply_gated(x, gate, value, place).astype(x.dtype)
        return _weighted_sum(cpu.multiply(hidden, project, place), factors)
    if any(in_panels):
        raise TypeError("some of the experts' weights are packed and some are not")
    if backend in ("gpu", "tpu") and x.shape[0] <= _FEW_ROWS:
        return _few_rows(x, gate, value, project, layer, experts, factors, backend)
    blocks = group_by_expert(experts.reshape(-1), gate.shape[1], backend)
    inputs = scatter_rows(jnp.repeat(x, experts.shape[1], axis=0), blocks)
    hidden = _gated(*grouped_matmuls(inputs, [gate, value], layer, blocks, backend)).astype(x.dtype)
    return _weighted_sum(gather_rows(grouped_matmul(hidden, project, layer, blocks, backend), blocks), factors)


def _gated(gates: jax.Array, values: jax.Array) -> jax.Array:
    return jax.nn.gelu(gates, approximate=True) * values


def _weighted_sum(outputs: jax.Array, factors: jax.Array) -> jax.Array:
    """`[rows * selected, N]` to `[rows, N]`."""
    return jnp.sum(outputs.reshape(*factors.shape, -1) * factors[..., None], axis=1)


def _few_rows(
    x: jax.Array,
    gate: QuantizedMatrix,
    value: QuantizedMatrix,
    project: QuantizedMatrix,
    layer: jax.Array | int,
    experts: jax.Array,
    factors: jax.Array,
    backend: Backend,
) -> jax.Array:
    """All rows through every expert that one of them selects, so that none need be moved."""
    num_experts = gate.shape[1]
    sent = experts < num_experts
    if experts.size <= num_experts:  # a block for each choice
        expert, active = jnp.minimum(experts, num_experts - 1).reshape(-1), sent.reshape(-1)
        own = jnp.arange(experts.size)[:, None, None] == jnp.arange(experts.size).reshape(experts.shape)
    else:  # a block for each expert
        expert = jnp.arange(num_experts, dtype=jnp.int32)
        own = expert[:, None, None] == experts
        active = jnp.any(own, axis=(1, 2))
    share = jnp.sum(jnp.where(own & sent, factors, 0.0), axis=2)  # [blocks, rows]
    gates, values = block_products(x[None], [gate, value], layer, expert, active, backend)
    hidden = _gated(gates, values).astype(x.dtype)
    (outputs,) = block_products(hidden, [project], layer, expert, active, backend)
    return jnp.sum(jnp.where(share[..., None] != 0, outputs * share[..., None], 0.0), axis=0)


def definition(
    x: jax.Array,
    gate: QuantizedMatrix,
    value: QuantizedMatrix,
    project: QuantizedMatrix,
    layer: jax.Array | int,
    experts: jax.Array,
    factors: jax.Array,
) -> jax.Array:
    """What `gated_experts` computes, by all experts for every row."""

    def matrices(weight: QuantizedMatrix) -> jax.Array:
        return weight.dequantize()[layer]  # [experts, K, N]

    x = x.astype(jnp.float32)
    gates = jnp.einsum("mk,ekn->men", x, matrices(gate), precision="highest")
    hidden = _gated(gates, jnp.einsum("mk,ekn->men", x, matrices(value), precision="highest"))
    every = jnp.einsum("men,enk->mek", hidden, matrices(project), precision="highest")
    chosen = jax.nn.one_hot(experts, gate.shape[1], dtype=jnp.float32)  # [rows, selected, experts]
    return jnp.einsum("mek,mse,ms->mk", every, chosen, factors, precision="highest")
