"""Building blocks of a decoder layer: quantized matrices, RMS norm, rotary position embedding."""

from __future__ import annotations

from typing import Any, cast

import haiku as hk
import jax
import jax.numpy as jnp

from grok1.config import ModelConfig
from grok1.params.table import Format
from grok1.params.weights import QuantizedMatrix


class QuantizedLinear(hk.Module):
    """Quantized matrix of a linear map without bias, stacked over layers and experts."""

    def __init__(self, shape: tuple[int, ...], groups: int, name: str):
        """Create the module.

        Args:
            shape: `[layers, ..., input, output]`.
            groups: number of scale groups.
            name: name of the module.
        """
        super().__init__(name=name)
        self.shape = shape
        self.groups = groups

    def __call__(self) -> QuantizedMatrix:
        """Return the matrix, `[layers, ..., input, output]`."""

        def initialise(shape: tuple[int, ...], dtype: jnp.dtype) -> QuantizedMatrix:
            scales = (*shape[:-2], self.groups, shape[-1])
            return QuantizedMatrix(jnp.zeros(shape, dtype), jnp.ones(scales, jnp.bfloat16))

        # Haiku's annotations allow only arrays, but it needs no more of a parameter than its shape.
        return cast(QuantizedMatrix, hk.get_parameter("w", self.shape, Format.INT8.dtype, init=cast(Any, initialise)))


class RMSNorm(hk.Module):
    """Root mean square layer normalization (Zhang and Sennrich, 2019), in float32: `scale * x / rms(x)`."""

    def __init__(self, size: int, layers: int | None = None, name: str = "rms_norm"):
        """Create the module.

        Args:
            size: size of the last axis.
            layers: number of layers over which the scales are stacked; None for a norm outside the layers.
            name: name of the module.
        """
        super().__init__(name=name)
        self.shape = (size,) if layers is None else (layers, size)

    def __call__(self, x: jax.Array, layer: jax.Array | int | None = None) -> jax.Array:
        """Normalize `x`, float `[..., size]`, to float32."""
        scale = hk.get_parameter("scale", self.shape, jnp.float32, init=jnp.ones)
        if layer is not None:
            scale = scale[layer]
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return scale * x * jax.lax.rsqrt(mean_square + ModelConfig.rms_norm_eps)


def rotary_embedding(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Apply rotary position embedding (Su et al., 2021) to pairs of elements from the two halves of each head.

    Args:
        x: float `[batch, seq, heads, key]`.
        positions: int32 `[batch, seq]`.

    Returns:
        float32, in the shape of `x`.
    """
    half = x.shape[-1] // 2
    frequencies = ModelConfig.rotary_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies  # [batch, seq, key / 2]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
