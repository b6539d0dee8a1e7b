"""Reference implementation of products with a quantized matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grok1.params.weights import QuantizedMatrix


def reference_matmul(x: jax.Array, weight: QuantizedMatrix, index: tuple[jax.Array | int, ...]) -> jax.Array:
    """Return `x @ weight[index]` in float32, with a dequantized matrix.

    Args:
        x: float `[M, K]`.
        weight: a stack `[..., K, N]`.
        index: index of the matrix on each leading axis.

    Returns:
        float32 `[M, N]`.
    """
    return jnp.dot(x.astype(jnp.float32), weight[index].dequantize(), precision="highest")
