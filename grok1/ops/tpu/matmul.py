"""Matrix products on TPUs: a Pallas kernel compiled by Mosaic. On CPUs it is interpreted, for tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from grok1.params.weights import QuantizedMatrix

MIN_ROWS = 16
"""Rows of bfloat16 in a memory tile; fewer rows are padded."""

MAX_ROWS = 256
"""Maximum number of rows per block, which stay in vector memory while its columns are computed."""

_LANES = 128
_SCALE_ROWS = 16  # of bfloat16 in a memory tile
_TILE_BYTES = 1 << 21  # of a matrix per iteration: large enough to hide the start of an iteration
_MAX_INNER = 2048
_MAX_COLUMNS = 2048


def can_multiply(weight: QuantizedMatrix) -> bool:
    """Return whether the matrices of a stack divide into tiles."""
    return _tile(weight.shape, weight.groups) is not None


def _tile(shape: tuple[int, ...], groups: int) -> tuple[int, int] | None:
    """Return rows and columns of a tile within one scale group, or None if the matrix does not divide into tiles."""
    *_, inner, columns = shape
    group_rows = inner // groups
    if group_rows % _LANES or columns % _LANES:
        return None
    wide = _largest_divisor(columns, _MAX_COLUMNS)
    return _largest_divisor(group_rows, min(_MAX_INNER, max(_LANES, _TILE_BYTES // wide))), wide


def _largest_divisor(size: int, limit: int) -> int:
    """Return the largest divisor of `size` that is a multiple of the lanes and at most `limit`."""
    units = size // _LANES
    return _LANES * next(count for count in range(min(units, limit // _LANES), 0, -1) if units % count == 0)


def multiply(
    x: jax.Array, weight: QuantizedMatrix, layer: jax.Array | int, expert: jax.Array, active: jax.Array
) -> jax.Array:
    """Multiply blocks of rows by the matrices of their experts.

    The next int8 tile is loaded while the current one is multiplied; sums are float32.

    Args:
        x: float `[blocks, rows, K]`, or `[1, rows, K]` for rows shared by all blocks; at most `MAX_ROWS` rows.
        weight: a stack `[layers, experts, K, N]` for which `can_multiply` holds.
        layer: index of the layer; may be traced.
        expert: int32 `[blocks]`, the expert of each block.
        active: bool `[blocks]`; nothing is read or computed for inactive blocks, whose results are undefined.

    Returns:
        float32 `[blocks, rows, N]`.
    """
    from jax.experimental.pallas import tpu as pltpu

    tile = _tile(weight.shape, weight.groups)
    if tile is None:
        raise ValueError(f"matrices of {weight.shape} with {weight.groups} scale groups do not divide into tiles")
    inner, columns = tile
    blocks, rows, shared = expert.shape[0], x.shape[1], x.shape[0] == 1
    parts, strips = weight.shape[-2] // inner, weight.shape[-1] // columns

    # An inactive block uses the last tiles of the active block before it, so that nothing is read for it.
    order = jnp.arange(blocks)
    held = jnp.max(jnp.where(active[None, :] & (order[None, :] <= order[:, None]), order[None, :], 0), axis=1)

    def of_x(block: Any, strip: Any, part: Any, layer: Any, expert: Any, held: Any, active: Any) -> tuple:
        part = jnp.where(active[block] != 0, part, parts - 1)
        return 0 if shared else held[block], 0, part

    def of_weight(block: Any, strip: Any, part: Any, layer: Any, expert: Any, held: Any, active: Any) -> tuple:
        idle = active[block] == 0
        last = jnp.where(idle, parts - 1, part), jnp.where(idle, strips - 1, strip)
        return layer[0], expert[held[block]], *last

    def of_scales(block: Any, strip: Any, part: Any, layer: Any, expert: Any, held: Any, active: Any) -> tuple:
        *_, part, strip = of_weight(block, strip, part, layer, expert, held, active)
        return scale_row(layer[0], expert[held[block]], part) // scale_rows, strip

    # A tile has one row of scales. Viewed as a matrix, their stack keeps its layout.
    scales = weight.scales.reshape(-1, weight.shape[-1])
    scale_rows = min(_SCALE_ROWS, scales.shape[0])
    scale_row = functools.partial(
        _scale_row, experts=weight.shape[-3], groups=weight.groups, parts_of_group=parts // weight.groups
    )

    # The result of a block stays in vector memory until its last part is added; an inactive one writes its own result.
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(blocks, strips, parts),
        in_specs=[
            pl.BlockSpec((None, rows, inner), of_x),
            pl.BlockSpec((None, None, inner, columns), of_weight),
            pl.BlockSpec((scale_rows, columns), of_scales),
        ],
        out_specs=pl.BlockSpec((None, rows, columns), lambda block, strip, part, *_: (block, 0, strip)),
    )
    kernel = functools.partial(_multiply_kernel, scale_row=scale_row)
    options = {
        "out_shape": jax.ShapeDtypeStruct((blocks, rows, weight.shape[-1]), jnp.float32),
        "grid_spec": grid,
        "name": "grok1_multiply",
        # Estimated as if all blocks were active.
        "cost_estimate": pl.CostEstimate(
            flops=2 * blocks * rows * weight.shape[-2] * weight.shape[-1],
            bytes_accessed=blocks * weight.shape[-2] * weight.shape[-1],
            transcendentals=0,
        ),
    }
    compiled = pl.pallas_call(
        kernel,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary", "arbitrary")),
        **options,  # type: ignore[arg-type]
    )
    interpreted = pl.pallas_call(kernel, interpret=True, **options)  # type: ignore[arg-type]
    numbers = [array.astype(jnp.int32) for array in (jnp.asarray(layer).reshape(1), expert, held, active)]
    return lax.platform_dependent(*numbers, x, weight.values, scales, cpu=interpreted, default=compiled)


def _scale_row(layer: Any, expert: Any, part: Any, *, experts: int, groups: int, parts_of_group: int) -> Any:
    """Return the row of a part's scales in the stack of all scales."""
    return (layer * experts + expert) * groups + part // parts_of_group


def _multiply_kernel(
    layer: Any,
    expert: Any,
    held: Any,
    active: Any,
    x: Any,
    weight: Any,
    scales: Any,
    out: Any,
    *,
    scale_row: Callable[..., Any],
) -> None:
    """Add the product over a part of a matrix's rows, for a strip of its columns, to that of the previous parts."""
    block, part = pl.program_id(0), pl.program_id(2)

    @pl.when(active[block] != 0)
    def _() -> None:
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        product = jnp.dot(x[...], weight[...].astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
        every = scales[...].astype(jnp.float32)
        row = scale_row(layer[0], expert[block], part) % every.shape[0]
        of_group = lax.broadcasted_iota(jnp.int32, every.shape, 0) == row
        scaled = product * jnp.sum(jnp.where(of_group, every, 0.0), axis=0, keepdims=True)
        out[...] = jnp.where(part == 0, scaled, out[...] + scaled)
