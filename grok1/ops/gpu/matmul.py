"""Matrix products on GPUs: a Pallas kernel compiled by Triton. On CPUs it is interpreted, for tests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from grok1.ops.gpu.tiles import (
    MIN_PROGRAMS,
    MIN_ROWS,
    dot,
    launch,
    leading,
    load,
    mask_of,
    store,
    within,
    within_slice,
)
from grok1.params.weights import QuantizedMatrix

MAX_ROWS = 128
"""Maximum number of rows per block, for which the tiles of a product fit in registers."""

_MIN_PART = 512  # minimum number of rows of a matrix per program, if several share a product


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Sizes of the tiles of a product.

    Attributes:
        rows: rows per block, a power of 2.
        columns: columns per program.
        inner: rows of a matrix per iteration.
        warps: warps per program.
        stages: tiles that are loaded in advance.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def _tiles(rows: int) -> _Tiles:
    if rows <= 32:
        return _Tiles(rows, columns=128, inner=64, warps=4, stages=4)
    return _Tiles(rows, columns=128, inner=64, warps=4 if rows <= 64 else 8, stages=3)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Division of the rows of a matrix among programs whose results are summed.

    A part consists of one or more entire scale groups, or is a fraction of one.

    Attributes:
        groups: number of scale groups of the matrix.
        group_rows: rows per group.
        groups_of_part: groups per part; 1 if groups are divided.
        cuts: parts per group; 1 if groups are not divided.
    """

    groups: int
    group_rows: int
    groups_of_part: int
    cuts: int

    @property
    def count(self) -> int:
        """Number of parts."""
        return self.groups // self.groups_of_part * self.cuts

    @property
    def rows(self) -> int:
        """Rows per part within one group."""
        return -(-self.group_rows // self.cuts)

    @classmethod
    def choose(cls, inner: int, groups: int, programs: int) -> _Parts:
        """Choose the smallest number of parts that gives enough programs; `programs` of them compute one part."""
        of_part, cuts, rows = groups, 1, inner // groups
        while programs * (groups // of_part) * cuts < MIN_PROGRAMS and of_part * rows > cuts * 2 * _MIN_PART:
            if of_part > 1:
                of_part = next(size for size in range(of_part - 1, 0, -1) if groups % size == 0)
            else:
                cuts *= 2
        return cls(groups, rows, of_part, cuts)


def multiply(
    x: jax.Array,
    weights: Sequence[QuantizedMatrix],
    layer: jax.Array | int,
    expert: jax.Array,
    active: jax.Array,
) -> list[jax.Array]:
    """Multiply blocks of rows by the matrices of their experts, for several stacks at once.

    int8 weights are converted in registers; sums are float32.

    Args:
        x: float `[blocks, rows, K]`, or `[1, rows, K]` for rows shared by all blocks; at most `MAX_ROWS` rows.
        weights: stacks `[layers, experts, K, N]`, each with its own N.
        layer: index of the layer; may be traced.
        expert: int32 `[blocks]`, the expert of each block.
        active: bool `[blocks]`; nothing is read or computed for inactive blocks, whose results are undefined.

    Returns:
        float32 `[blocks, rows, N]` for each stack.
    """
    blocks, rows = expert.shape[0], x.shape[1]
    tiles = _tiles(max(MIN_ROWS, pl.next_power_of_2(rows)))
    groups = weights[0].groups
    if any(weight.groups != groups for weight in weights):
        raise ValueError("stacks multiplied together must have the same number of scale groups")
    tile_counts = [pl.cdiv(weight.shape[-1], tiles.columns) for weight in weights]
    parts = _Parts.choose(x.shape[2], groups, blocks * sum(tile_counts))
    kernel = functools.partial(_multiply_kernel, tiles=tiles, parts=parts, tile_counts=tile_counts)
    partial_sums = launch(
        kernel,
        "grok1_multiply",
        (blocks, sum(tile_counts), parts.count),
        [jax.ShapeDtypeStruct((parts.count, blocks, rows, weight.shape[-1]), jnp.float32) for weight in weights],
        tiles.warps,
        tiles.stages,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        expert.astype(jnp.int32),
        active.astype(jnp.int32),
        x,
        *(array for weight in weights for array in (weight.values, weight.scales)),
    )
    return [sums[0] if parts.count == 1 else jnp.sum(sums, axis=0) for sums in partial_sums]


def _multiply_kernel(
    layer: Any, expert: Any, active: Any, x: Any, *arrays: Any, tiles: _Tiles, parts: _Parts, tile_counts: list[int]
) -> None:
    """Multiply a block of rows by a tile of columns of one of the stacks, over a part of the matrix's rows."""
    sums = arrays[-len(tile_counts) :]
    block, tile, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    first_tile = 0
    for i, count in enumerate(tile_counts):
        weight, scales = arrays[2 * i : 2 * i + 2]

        @pl.when((active[block] != 0) & (tile >= first_tile) & (tile < first_tile + count))
        def _(weight: Any = weight, scales: Any = scales, out: Any = sums[i], first_tile: int = first_tile) -> None:
            place = layer[0], expert[block]
            product = _tile_product(x, weight, scales, place, block, tile - first_tile, part, tiles, parts)
            columns = pl.ds((tile - first_tile) * tiles.columns, tiles.columns)
            mask = mask_of(
                (tiles.rows, tiles.columns), within(0, tiles.rows, out.shape[2]), within_slice(columns, out.shape[3])
            )
            store(out.at[part, block, leading(tiles.rows, block), columns], product, mask)

        first_tile += count


def _tile_product(
    x: Any, weight: Any, scales: Any, place: tuple, block: Any, tile: Any, part: Any, tiles: _Tiles, parts: _Parts
) -> jax.Array:
    """Return the product over one part, float32 `[rows, columns]`."""
    columns = pl.ds(tile * tiles.columns, tiles.columns)
    inside = within_slice(columns, weight.shape[-1])
    present = within(0, tiles.rows, x.shape[1])
    first_rows = leading(tiles.rows, block)
    own = jnp.minimum(block, x.shape[0] - 1)  # 0 if all blocks share the rows
    ragged = parts.group_rows % (parts.cuts * tiles.inner) != 0

    def of_group(group: Any) -> jax.Array:
        """Return the product over the rows of a scale group that belong to the part."""
        start = group * parts.group_rows + part % parts.cuts * parts.rows
        end = jnp.minimum(start + parts.rows, (group + 1) * parts.group_rows)

        def add(i: Any, total: jax.Array) -> jax.Array:
            inner = pl.ds(start + i * tiles.inner, tiles.inner)
            known = start + i * tiles.inner + jnp.arange(tiles.inner) < end if ragged else None
            inputs = load(x.at[own, first_rows, inner], mask_of((tiles.rows, tiles.inner), present, known))
            values = load(
                weight.at[(*place, inner, columns)],
                mask_of((tiles.inner, tiles.columns), known, inside),
                eviction_policy="evict_first",
            )
            return total + dot(inputs, values.astype(inputs.dtype))

        zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        total = lax.fori_loop(0, pl.cdiv(parts.rows, tiles.inner), add, zeros)
        scale = load(scales.at[(*place, group, columns)], inside)
        return total * scale.astype(jnp.float32)[None, :]

    if parts.groups_of_part == 1:
        return of_group(part // parts.cuts)
    first = part * parts.groups_of_part
    zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    return lax.fori_loop(0, parts.groups_of_part, lambda i, total: total + of_group(first + i), zeros)
