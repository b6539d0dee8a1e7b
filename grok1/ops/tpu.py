"""The kernels for TPUs: Pallas programs that Mosaic compiles.

On a processor they are interpreted, which is for tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from grok1.quantize import QuantizedWeight

LEAST_ROWS = 16
"""Rows of bfloat16 in a tile of memory; fewer are padded."""

MOST_ROWS = 256
"""Rows of a block, which stay in the vector memory while its columns are computed."""

_LANES = 128
_SCALE_ROWS = 16  # of bfloat16 in a tile of memory
_TILE_BYTES = 1 << 21  # of a matrix that are read at a time, so that reading hides the start of a step
_MOST_INNER = 2048
_MOST_COLUMNS = 2048


def can_multiply(weight: QuantizedWeight) -> bool:
    """Whether a stack's matrices divide into whole tiles."""
    return _tile(weight.shape, weight.groups) is not None


def _tile(shape: tuple[int, ...], groups: int) -> tuple[int, int] | None:
    """Rows and columns of a matrix that are read at a time, inside one scale group; None if there is no such tile."""
    *_, inner, columns = shape
    group_rows = inner // groups
    if group_rows % _LANES or columns % _LANES:
        return None
    wide = _largest_divisor(columns, _MOST_COLUMNS)
    return _largest_divisor(group_rows, min(_MOST_INNER, max(_LANES, _TILE_BYTES // wide))), wide


def _largest_divisor(size: int, most: int) -> int:
    """The largest divisor of a multiple of the lanes that is such a multiple too, and `most` or less."""
    units = size // _LANES
    return _LANES * next(count for count in range(min(units, most // _LANES), 0, -1) if units % count == 0)


def multiply(
    x: jax.Array, weight: QuantizedWeight, layer: jax.Array | int, expert: jax.Array, used: jax.Array | int
) -> jax.Array:
    """Blocks of rows times the matrices of their experts.

    Tiles of int8 are on their way from memory while the one before them is multiplied; sums are float32.

    Args:
        x: float `[slots, K]`, blocks one after the other.
        weight: a stack `[layers, experts, K, N]` for which `can_multiply` holds.
        layer: which layer; may be traced.
        expert: int32 `[blocks]`, the expert of each block; their number divides the slots into blocks of a multiple of
            `LEAST_ROWS` rows.
        used: how many blocks hold rows; nothing is read or computed for the others, whose results mean nothing.

    Returns:
        float32 `[slots, N]`.
    """
    from jax.experimental.pallas import tpu as pltpu

    tile = _tile(weight.shape, weight.groups)
    if tile is None:
        raise ValueError(f"matrices of {weight.shape} with {weight.groups} scale groups do not divide into tiles")
    inner, columns = tile
    blocks, rows = expert.shape[0], x.shape[0] // expert.shape[0]
    parts, strips = weight.shape[-2] // inner, weight.shape[-1] // columns

    def place(block: Any, strip: Any, part: Any, used: Any) -> tuple[Any, Any, Any]:
        """What to have at hand at a step: where nothing is computed, what the last one had, so that nothing is read."""
        idle = block >= used[0]
        return (
            jnp.where(idle, jnp.maximum(used[0] - 1, 0), block),
            jnp.where(idle, strips - 1, strip),
            jnp.where(idle, parts - 1, part),
        )

    def of_x(block: Any, strip: Any, part: Any, layer: Any, expert: Any, used: Any) -> tuple:
        block, _, part = place(block, strip, part, used)
        return block, part

    def of_weight(block: Any, strip: Any, part: Any, layer: Any, expert: Any, used: Any) -> tuple:
        block, strip, part = place(block, strip, part, used)
        return layer[0], expert[block], part, strip

    def of_scales(block: Any, strip: Any, part: Any, layer: Any, expert: Any, used: Any) -> tuple:
        block, strip, part = place(block, strip, part, used)
        return scale_row(layer[0], expert[block], part) // scale_rows, strip

    # One row of scales belongs to a tile; as a matrix, the stack of them needs no other layout than it has.
    scales = weight.scales.reshape(-1, weight.shape[-1])
    scale_rows = min(_SCALE_ROWS, scales.shape[0])
    scale_row = functools.partial(
        _scale_row, experts=weight.shape[-3], groups=weight.groups, parts_of_group=parts // weight.groups
    )

    # An idle block writes into its own place, and a block's result stays at hand until its last part is added.
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(blocks, strips, parts),
        in_specs=[
            pl.BlockSpec((rows, inner), of_x),
            pl.BlockSpec((None, None, inner, columns), of_weight),
            pl.BlockSpec((scale_rows, columns), of_scales),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda block, strip, part, *_: (block, strip)),
    )
    kernel = functools.partial(_multiply_kernel, scale_row=scale_row)
    options = {
        "out_shape": jax.ShapeDtypeStruct((x.shape[0], weight.shape[-1]), jnp.float32),
        "grid_spec": grid,
        "name": "grok1_multiply",
    }
    compiled = pl.pallas_call(
        kernel,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary", "arbitrary")),
        **options,  # type: ignore[arg-type]
    )
    interpreted = pl.pallas_call(kernel, interpret=True, **options)  # type: ignore[arg-type]
    numbers = [jnp.asarray(number, jnp.int32) for number in (layer, used)]
    arguments = (
        numbers[0].reshape(1),
        expert.astype(jnp.int32),
        numbers[1].reshape(1),
        x,
        weight.weight,
        scales,
    )
    return lax.platform_dependent(*arguments, cpu=interpreted, default=compiled)


def _scale_row(layer: Any, expert: Any, part: Any, *, experts: int, groups: int, parts_of_group: int) -> Any:
    """Where a part's scales are in the stack of all."""
    return (layer * experts + expert) * groups + part // parts_of_group


def _multiply_kernel(
    layer: Any, expert: Any, used: Any, x: Any, weight: Any, scales: Any, out: Any, *, scale_row: Callable[..., Any]
) -> None:
    """A part of a matrix's rows and a strip of its columns, added to what the parts before gave."""
    block, part = pl.program_id(0), pl.program_id(2)

    @pl.when(block < used[0])
    def _() -> None:
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        product = jnp.dot(x[...], weight[...].astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
        every = scales[...].astype(jnp.float32)
        row = scale_row(layer[0], expert[block], part) % every.shape[0]
        of_group = lax.broadcasted_iota(jnp.int32, every.shape, 0) == row
        scaled = product * jnp.sum(jnp.where(of_group, every, 0.0), axis=0, keepdims=True)
        out[...] = jnp.where(part == 0, scaled, out[...] + scaled)
