"""Weights of 8 bits with grouped scales: `QuantizedWeight` as the release has them, `PackedWeight` as kernels want."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

PANEL_COLUMNS = 16
"""Columns that a packed matrix keeps together."""

QUAD_ROWS = 4
"""Rows of a column whose values stand side by side in a packed matrix."""

MOST_GROUP_ROWS = 32768
"""Rows of a scale group up to which a matrix can be packed: kernels sum its products in 32 bits."""


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """What a `QuantizedWeight` holds, in the order in which kernels for processors read it.

    Panels of 16 columns follow each other. In a panel 4 rows are a quad, and a quad's 4 values of a column stand side
    by side, each plus 128. Each group of rows begins with a new quad. What stands where there is no row or column means
    nothing.

    Attributes:
        panels: uint8 `[..., ceil(N / 16), G * ceil(group_rows / 4), 64]`.
        scales: bfloat16 `[..., G, N]`.
        group_rows: rows of each scale group, K / G.
    """

    panels: jax.Array
    scales: jax.Array
    group_rows: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrices, `[..., K, N]`; Haiku compares it with the shape that a module asks for."""
        *lead, groups, columns = self.scales.shape
        return (*lead, groups * self.group_rows, columns)

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the values that are stored."""
        return jnp.dtype(jnp.int8)

    @property
    def groups(self) -> int:
        """Number of scale groups, G."""
        return int(self.scales.shape[-2])

    def unpack(self) -> QuantizedWeight:
        """The same in the release's order: for tests and small matrices only."""
        *lead, rows, columns = self.shape
        padded = self.panels.reshape(*lead, self.panels.shape[-3], self.groups, -1, PANEL_COLUMNS, QUAD_ROWS)
        ordered = jnp.moveaxis(padded, (-2, -5), (-1, -2))  # [..., groups, quads, 4, panels, 16]
        ordered = ordered.reshape(*lead, self.groups, -1, self.panels.shape[-3] * PANEL_COLUMNS)
        values = ordered[..., : self.group_rows, :columns].reshape(*lead, rows, columns)
        return QuantizedWeight((values ^ 128).astype(jnp.int8), self.scales)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """The values that the weight stands for, `[..., K, N]`: for tests and small matrices only."""
        return self.unpack().dequantize(dtype)


def packed_shape(shape: Sequence[int], groups: int) -> tuple[int, ...]:
    """Shape of the panels of matrices `[..., K, N]` with so many scale groups."""
    *lead, rows, columns = shape
    quads = groups * -(-(rows // groups) // QUAD_ROWS)
    return (*lead, -(-columns // PANEL_COLUMNS), quads, PANEL_COLUMNS * QUAD_ROWS)
