"""Quantized weights: values of a few bits with grouped scales, in the release's order or in one that kernels prefer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grok1.params.table import Format

PANEL_COLUMNS = 16
"""Columns of a panel."""

QUAD_ROWS = 4
"""Rows of a panel whose values in one column are adjacent."""

MAX_GROUP_ROWS = 32768
"""Largest scale group, in rows, of a matrix in panels: kernels sum its products in 32 bits."""


@dataclasses.dataclass(frozen=True)
class Panels:
    """The layout that CPU kernels read.

    Panels of 16 columns follow each other. In a panel, 4 rows form a quad, and a quad's 4 values of a column are
    adjacent, each plus 128. Each scale group starts a new quad. Padding rows and columns hold arbitrary values.

    Attributes:
        group_rows: rows of each scale group.
    """

    group_rows: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix `[K, N]`, or a stack of matrices, of quantized values with scales by group of rows and by column.

    Group g of G scales the rows g*K/G up to (g+1)*K/G, as in the release. The class is one pytree, so that a stack
    goes through `jax.jit`, `jax.shard_map` and a Haiku parameter tree like an array.

    Attributes:
        values: int8 `[..., K, N]` in the release's order; in panels
            uint8 `[..., ceil(N / 16), G * ceil(group_rows / 4), 64]`.
        scales: bfloat16 `[..., G, N]`, with K a multiple of G.
        format: encoding of the values.
        layout: order of the values in memory; None for the release's.
    """

    values: jax.Array
    scales: jax.Array
    format: Format = dataclasses.field(default=Format.INT8, metadata={"static": True})
    layout: Panels | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrices, `[..., K, N]`; Haiku compares it with the shape that a module asks for."""
        if self.layout is None:
            return tuple(self.values.shape)
        *lead, groups, columns = self.scales.shape
        return (*lead, groups * self.layout.group_rows, columns)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the values in the release's order."""
        return self.format.dtype

    @property
    def groups(self) -> int:
        """Number of scale groups, G."""
        return int(self.scales.shape[-2])

    def __getitem__(self, index: Any) -> QuantizedMatrix:
        """Return the matrices at an index of the leading axes."""
        return dataclasses.replace(self, values=self.values[index], scales=self.scales[index])

    def unpack(self) -> QuantizedMatrix:
        """Return the same matrices in the release's order: for tests and small matrices only."""
        if self.layout is None:
            return self
        *lead, rows, columns = self.shape
        panels = self.values.shape[-3]
        padded = self.values.reshape(*lead, panels, self.groups, -1, PANEL_COLUMNS, QUAD_ROWS)
        ordered = jnp.moveaxis(padded, (-2, -5), (-1, -2))  # [..., groups, quads, 4, panels, 16]
        ordered = ordered.reshape(*lead, self.groups, -1, panels * PANEL_COLUMNS)
        values = ordered[..., : self.layout.group_rows, :columns].reshape(*lead, rows, columns)
        return QuantizedMatrix((values ^ 128).astype(jnp.int8), self.scales)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """Return the represented values, `[..., K, N]`: for tests and small matrices only."""
        *lead, rows, columns = self.shape
        grouped = self.unpack().values.reshape(*lead, self.groups, rows // self.groups, columns).astype(jnp.float32)
        return (grouped * self.scales[..., None, :].astype(jnp.float32)).reshape(self.shape).astype(dtype)


def panels_shape(shape: Sequence[int], groups: int) -> tuple[int, ...]:
    """Shape of the panels of matrices `[..., K, N]` with `groups` scale groups."""
    *lead, rows, columns = shape
    quads = groups * -(-(rows // groups) // QUAD_ROWS)
    return (*lead, -(-columns // PANEL_COLUMNS), quads, PANEL_COLUMNS * QUAD_ROWS)
