"""Activations times one quantised matrix out of a stack, or the matrices of several stacks."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from grok1.ops.backend import Backend
from grok1.ops.cpu import kernels as cpu
from grok1.ops.grouped_matmul import MOST_ROWS, block_products
from grok1.ops.xla import blocked
from grok1.params.weights import QuantizedMatrix


def quantized_matmul(
    x: jax.Array, weight: QuantizedMatrix, index: tuple[jax.Array | int, ...], backend: Backend = "xla"
) -> jax.Array:
    """`x @ weight[index]`, accumulated in float32.

    The whole stack and the index come in, so that no slice of a weight need be copied out of it first.

    Args:
        x: float `[M, K]`.
        weight: a stack `[..., K, N]`; a packed one is multiplied by the kernels for processors.
        index: the place of the matrix in the stack, an index for each leading axis; may be traced.
        backend: what computes it; the kernels of accelerators take a stack with one leading axis.

    Returns:
        float32 `[M, N]`.
    """
    return quantized_matmuls(x, [weight], index, backend)[0]


def quantized_matmuls(
    x: jax.Array, weights: Sequence[QuantizedMatrix], index: tuple[jax.Array | int, ...], backend: Backend = "xla"
) -> list[jax.Array]:
    """`x @ weight[index]` for several stacks, which one kernel reads where a backend has such.

    Args:
        x: float `[M, K]`.
        weights: stacks `[..., K, N]`, each with its own N.
        index: as in `quantized_matmul`.
        backend: the same.

    Returns:
        float32 `[M, N]` for each stack.
    """
    plain = [weight for weight in weights if weight.layout is None]
    if backend in ("gpu", "tpu") and len(plain) == len(weights) and len(index) == 1:
        blocks = -(-x.shape[0] // MOST_ROWS[backend])
        size = x.shape[0] if blocks == 1 else MOST_ROWS[backend]
        rows = jnp.pad(x, ((0, blocks * size - x.shape[0]), (0, 0))).reshape(blocks, size, -1)
        stacks = [weight[:, None] for weight in plain]
        expert, active = jnp.zeros(blocks, jnp.int32), jnp.ones(blocks, bool)
        products = block_products(rows, stacks, index[0], expert, active, backend)
        return [product.reshape(blocks * size, -1)[: x.shape[0]] for product in products]
    return [_one(x, weight, index) for weight in weights]


def _one(x: jax.Array, weight: QuantizedMatrix, index: tuple[jax.Array | int, ...]) -> jax.Array:
    if weight.layout is not None:
        return cpu.multiply(x, weight, jnp.full(x.shape[:1], cpu.place_in_stack(weight, index)))
    return blocked.multiply(x, weight, index)


def definition(x: jax.Array, weight: QuantizedMatrix, index: tuple[jax.Array | int, ...]) -> jax.Array:
    """What `quantized_matmul` computes, in one line; it builds the dequantised matrix."""
    matrix = weight[index].dequantize()
    return jnp.dot(x.astype(jnp.float32), matrix, precision="highest")
