"""Weights stored as int8 with grouped scales: `QuantizedWeight`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A matrix, or a stack of matrices, of int8 values with scales by group of rows and by column.

    Group g of G scales the rows g*K/G up to (g+1)*K/G, as in the release. The class is one pytree, so that a stack
    goes through `jax.jit`, `jax.shard_map` and a Haiku parameter tree like an array.

    Attributes:
        weight: int8 `[..., K, N]`.
        scales: bfloat16 `[..., G, N]`, with K a multiple of G.
    """

    weight: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `weight`; Haiku compares it with the shape that a module asks for."""
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the stored values."""
        return self.weight.dtype

    @property
    def groups(self) -> int:
        """Number of scale groups, G."""
        return int(self.scales.shape[-2])

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """The values that the weight stands for, `[..., K, N]`: for tests and small matrices only."""
        *lead, rows, columns = self.weight.shape
        grouped = self.weight.reshape(*lead, self.groups, rows // self.groups, columns).astype(jnp.float32)
        return (grouped * self.scales[..., None, :].astype(jnp.float32)).reshape(self.weight.shape).astype(dtype)
