"""Activations times one quantised matrix out of a stack."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grok1.ops import blocked, cpu
from grok1.quantize import PackedWeight, QuantizedWeight


def quantized_matmul(
    x: jax.Array, weight: QuantizedWeight | PackedWeight, index: tuple[jax.Array | int, ...]
) -> jax.Array:
    """`x @ weight[index]`, accumulated in float32.

    The whole stack and the index come in, so that no slice of a weight need be copied out of it first.

    Args:
        x: float `[M, K]`.
        weight: a stack `[..., K, N]`; a packed one is multiplied by the kernels for processors.
        index: the place of the matrix in the stack, an index for each leading axis; may be traced.

    Returns:
        float32 `[M, N]`.
    """
    if isinstance(weight, PackedWeight):
        return cpu.multiply(x, weight, jnp.full(x.shape[:1], cpu.place_in_stack(weight, index)))
    return blocked.multiply(x, weight, index)


def definition(x: jax.Array, weight: QuantizedWeight, index: tuple[jax.Array | int, ...]) -> jax.Array:
    """What `quantized_matmul` computes, in one line; it builds the dequantised matrix."""
    matrix = QuantizedWeight(weight.weight[index], weight.scales[index]).dequantize()
    return jnp.dot(x.astype(jnp.float32), matrix, precision="highest")
