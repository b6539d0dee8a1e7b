"""The kernels for GPUs: Pallas programs that Triton compiles.

On a processor they are interpreted, which is for tests.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from grok1.params.weights import QuantizedMatrix

LEAST_ROWS = 16
"""Rows of the smallest product of a GPU's matrix units; fewer are padded."""

MOST_ROWS = 128
"""Rows of a block up to which the tiles of a product stay in registers."""

# Programs of a product that keep a GPU's memory busy: 132 multiprocessors hold a few of each at a time.
_ENOUGH_PROGRAMS = 512
_LEAST_PART = 512  # rows of a matrix that a program reads at least, where its result is summed with others'

_DECODE_BLOCK = 64  # cache positions that one turn of the attention loop reads
_LEAST_SPLIT = 256  # cache positions that a program reads at least, where a context is divided over several
_MOST_SPLITS = 16
_QUERY_ROWS = 64

_LEAST_CAPABILITY = 8.0
_TRIAL_ERROR = 0.02  # bfloat16 weights of attention are rounded by 1/256


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """How a product is divided.

    Attributes:
        rows: of a block, a power of 2.
        columns: that a program computes.
        inner: rows of a matrix that it reads at a time.
        warps: of a program.
        stages: how many tiles are on their way to it at a time.
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
    """How the rows of a matrix are divided over programs, whose results are summed.

    A part lies in one scale group, or is several groups.

    Attributes:
        groups: scale groups of the matrix.
        group_rows: rows of each.
        groups_of_part: as many groups are a part, if no group is divided.
        cuts: into so many parts is a group divided.
    """

    groups: int
    group_rows: int
    groups_of_part: int
    cuts: int

    @property
    def count(self) -> int:
        """How many parts there are."""
        return self.groups // self.groups_of_part * self.cuts

    @property
    def rows(self) -> int:
        """Rows of a part that lie in one group."""
        return -(-self.group_rows // self.cuts)

    @classmethod
    def choose(cls, inner: int, groups: int, programs: int) -> _Parts:
        """The fewest parts that make enough programs, where `programs` compute the columns of one part."""
        of_part, cuts, rows = groups, 1, inner // groups
        while programs * (groups // of_part) * cuts < _ENOUGH_PROGRAMS and of_part * rows > cuts * 2 * _LEAST_PART:
            if of_part > 1:
                of_part = next(size for size in range(of_part - 1, 0, -1) if groups % size == 0)
            else:
                cuts *= 2
        return cls(groups, rows, of_part, cuts)


def can_address(elements: int) -> bool:
    """Whether the kernels find every element of an int8 array.

    Pallas counts with 64 bits in arrays beyond 2**32 bytes and with 32 bits, signed, in all others.
    """
    return elements <= 1 << 31 or elements > 1 << 32


@functools.cache
def why_not(device: jax.Device) -> str | None:
    """Why the kernels cannot run on a GPU; None if they do, and compute there what they should.

    Two small ones are compiled and run, which takes seconds on a GPU that the compilation cache does not know.
    """
    try:
        from jax.experimental.pallas import triton  # noqa: F401
    except ImportError:
        return f"JAX {jax.__version__} has no Pallas for Triton"
    capability = str(getattr(device, "compute_capability", ""))
    if capability.replace(".", "").isdigit() and float(capability) < _LEAST_CAPABILITY:
        return (
            f"{device.device_kind} has compute capability {capability} and they need {_LEAST_CAPABILITY} for bfloat16"
        )
    try:
        with jax.default_device(device):
            error = float(jax.jit(lambda: _trial())())
    except Exception as failure:
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200].rstrip(". ")
        return f"{device.device_kind} does not run them ({reason})"
    return None if error < _TRIAL_ERROR else f"{device.device_kind} computes them wrongly, by {error:.1e} of the whole"


def _trial() -> jax.Array:
    """How far the kernels are from plain JAX on small operands, as a part of the result's size."""
    size = 128
    ramp = jnp.arange(size * size, dtype=jnp.int32).reshape(size, size)
    weight = QuantizedMatrix((ramp % 251 - 125).astype(jnp.int8)[None, None], jnp.ones((1, 1, 1, size), jnp.bfloat16))
    x = (ramp[:LEAST_ROWS] % 17 - 8).astype(jnp.bfloat16)
    product = multiply(x[None], [weight], 0, jnp.zeros(1, jnp.int32), jnp.ones(1, bool))[0][0]
    plain = jnp.dot(x.astype(jnp.float32), weight.values[0, 0].astype(jnp.float32), precision="highest")
    cache = jnp.sin(ramp.astype(jnp.float32)).astype(jnp.bfloat16)[None, None, None]
    query = jnp.ones((1, 1, 1, size), jnp.float32)
    attended = attention(query, cache, cache, 0, jnp.full((1, 1), size - 1), None, multiplier=0.1, cap=30.0)
    logits = 30 * jnp.tanh(jnp.sum(cache[0, 0, 0].astype(jnp.float32), axis=1) * (0.1 / 30))
    mean = jnp.dot(jax.nn.softmax(logits), cache[0, 0, 0].astype(jnp.float32), precision="highest")

    def error(found: jax.Array, expected: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected))

    return jnp.maximum(error(product, plain), error(attended.reshape(-1), mean))


def multiply(
    x: jax.Array,
    weights: Sequence[QuantizedMatrix],
    layer: jax.Array | int,
    expert: jax.Array,
    active: jax.Array,
) -> list[jax.Array]:
    """Blocks of rows times the matrices of their experts, for several stacks at once.

    int8 weights go from memory to the matrix units without a copy between; sums are float32.

    Args:
        x: float `[blocks, rows, K]`, or `[1, rows, K]` for rows that are those of every block; `MOST_ROWS` at most.
        weights: stacks `[layers, experts, K, N]`, each with its own N.
        layer: which layer; may be traced.
        expert: int32 `[blocks]`, the expert of each block.
        active: bool `[blocks]`; nothing is read or computed for the other blocks, whose results mean nothing.

    Returns:
        float32 `[blocks, rows, N]` for each stack.
    """
    blocks, rows = expert.shape[0], x.shape[1]
    tiles = _tiles(max(LEAST_ROWS, pl.next_power_of_2(rows)))
    groups = weights[0].groups
    if any(weight.groups != groups for weight in weights):
        raise ValueError("stacks with different numbers of scale groups are to be multiplied at once")
    tile_counts = [pl.cdiv(weight.shape[-1], tiles.columns) for weight in weights]
    parts = _Parts.choose(x.shape[2], groups, blocks * sum(tile_counts))
    kernel = functools.partial(_multiply_kernel, tiles=tiles, parts=parts, tile_counts=tile_counts)
    partial_sums = _call(
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
    """A block of rows, a tile of columns of one of the stacks, and a part of the matrix's rows."""
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
            mask = _mask(
                (tiles.rows, tiles.columns), _within(0, tiles.rows, out.shape[2]), _within_slice(columns, out.shape[3])
            )
            _store(out.at[part, block, _first(tiles.rows, block), columns], product, mask)

        first_tile += count


def _tile_product(
    x: Any, weight: Any, scales: Any, place: tuple, block: Any, tile: Any, part: Any, tiles: _Tiles, parts: _Parts
) -> jax.Array:
    """float32 `[rows, columns]`, the sum over one part."""
    columns = pl.ds(tile * tiles.columns, tiles.columns)
    inside = _within_slice(columns, weight.shape[-1])
    present = _within(0, tiles.rows, x.shape[1])
    first_rows = _first(tiles.rows, block)
    own = jnp.minimum(block, x.shape[0] - 1)  # the rows of all blocks may be the same
    ragged = parts.group_rows % (parts.cuts * tiles.inner) != 0

    def of_group(group: Any) -> jax.Array:
        """The sum over what of a scale group belongs to the part."""
        start = group * parts.group_rows + part % parts.cuts * parts.rows
        end = jnp.minimum(start + parts.rows, (group + 1) * parts.group_rows)

        def add(i: Any, total: jax.Array) -> jax.Array:
            inner = pl.ds(start + i * tiles.inner, tiles.inner)
            known = start + i * tiles.inner + jnp.arange(tiles.inner) < end if ragged else None
            inputs = _load(x.at[own, first_rows, inner], _mask((tiles.rows, tiles.inner), present, known))
            values = _load(
                weight.at[(*place, inner, columns)],
                _mask((tiles.inner, tiles.columns), known, inside),
                eviction_policy="evict_first",
            )
            return total + _dot(inputs, values.astype(inputs.dtype))

        zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        total = lax.fori_loop(0, pl.cdiv(parts.rows, tiles.inner), add, zeros)
        scale = _load(scales.at[(*place, group, columns)], inside)
        return total * scale.astype(jnp.float32)[None, :]

    if parts.groups_of_part == 1:
        return of_group(part // parts.cuts)
    first = part * parts.groups_of_part
    zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    return lax.fori_loop(0, parts.groups_of_part, lambda i, total: total + of_group(first + i), zeros)


def attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array | int,
    positions: jax.Array,
    slots: jax.Array | None,
    *,
    multiplier: float,
    cap: float,
) -> jax.Array:
    """What `grok1.ops.attention.cached_attention` describes.

    As capped logits need no maximum, programs that read different parts of a context just add their sums.
    """
    batch, seq, heads, size = query.shape
    kv_heads, capacity = keys.shape[2], keys.shape[3]
    count = heads // kv_heads * seq
    rows = min(_QUERY_ROWS, max(LEAST_ROWS, pl.next_power_of_2(count)))
    grouped = query.reshape(batch, seq, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, count, size).astype(keys.dtype)
    of_rows = positions if seq == 1 else jnp.tile(positions, (1, heads // kv_heads))
    programs = batch * kv_heads * pl.cdiv(count, rows)
    splits = 1
    while splits < _MOST_SPLITS and 2 * splits * _LEAST_SPLIT <= capacity and programs * splits < _ENOUGH_PROGRAMS:
        splits *= 2
    kernel = functools.partial(
        _attention_kernel, rows=rows, splits=splits, multiplier=multiplier, cap=cap, kv_heads=kv_heads
    )
    weighted, mass = _call(
        kernel,
        "grok1_attention",
        (pl.cdiv(count, rows), batch * kv_heads, splits),
        [
            jax.ShapeDtypeStruct((splits, batch, kv_heads, count, size), jnp.float32),
            jax.ShapeDtypeStruct((splits, batch, kv_heads, count), jnp.float32),
        ],
        4,
        2,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        jnp.arange(batch, dtype=jnp.int32) if slots is None else slots.astype(jnp.int32),
        of_rows.astype(jnp.int32),
        grouped,
        keys,
        values,
    )
    weighted, mass = jnp.sum(weighted, axis=0), jnp.sum(mass, axis=0)
    output = weighted / jnp.where(mass > 0, mass, 1.0)[..., None]  # padding sees nothing
    output = output.reshape(batch, kv_heads, heads // kv_heads, seq, size)
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, size)


def _attention_kernel(
    layer: Any,
    slots: Any,
    positions: Any,
    query: Any,
    keys: Any,
    values: Any,
    weighted: Any,
    mass: Any,
    *,
    rows: int,
    splits: int,
    multiplier: float,
    cap: float,
    kv_heads: int,
) -> None:
    """Some query rows of one key/value head, and every `splits`th block of the positions that they see."""
    count, size, capacity = query.shape[2], query.shape[3], keys.shape[3]
    width = max(LEAST_ROWS, pl.next_power_of_2(size))
    batch, head, split = pl.program_id(1) // kv_heads, pl.program_id(1) % kv_heads, pl.program_id(2)
    of_program = pl.ds(pl.program_id(0) * rows, rows)
    across = _first(width, split)
    present, inside = _within_slice(of_program, count), _within(0, width, size)
    if positions.shape[1] == 1:
        own = jnp.full((rows,), positions[batch, 0])
    else:
        own = _load(positions.at[batch, of_program], present)
    if present is not None:
        own = jnp.where(present, own, -1)
    inputs = _load(query.at[batch, head, of_program, across], _mask((rows, width), present, inside))
    blocks = (jnp.max(own) + _DECODE_BLOCK) // _DECODE_BLOCK  # up to the furthest row's own position
    place = layer[0], slots[batch], head

    def add(i: Any, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = (split + i * splits) * _DECODE_BLOCK
        at = start + jnp.arange(_DECODE_BLOCK)
        known = at < capacity if capacity % _DECODE_BLOCK else None
        block = (*place, pl.ds(start, _DECODE_BLOCK), across)
        mask = _mask((_DECODE_BLOCK, width), known, inside)
        logits = _dot(inputs, _load(keys.at[block], mask).T) * (multiplier / cap)
        visible = at[None, :] <= own[:, None]
        if known is not None:
            visible &= known[None, :]
        weights = jnp.where(visible, jnp.exp(cap * (jnp.tanh(logits) - 1)), 0.0)
        block_values = _load(values.at[block], mask)
        total, all_mass = totals
        return total + _dot(weights.astype(block_values.dtype), block_values), all_mass + jnp.sum(weights, axis=1)

    zeros = jnp.zeros((rows, width), jnp.float32), jnp.zeros((rows,), jnp.float32)
    total, all_mass = lax.fori_loop(0, (blocks - split + splits - 1) // splits, add, zeros)
    out = weighted.at[split, batch, head, of_program, across]
    _store(out, total, _mask((rows, width), present, inside))
    _store(mass.at[split, batch, head, of_program], all_mass, present)


def _call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    results: list[jax.ShapeDtypeStruct],
    warps: int,
    stages: int,
) -> Callable[..., Any]:
    """A kernel over arrays that lie in the GPU's memory; on a processor it is interpreted."""
    from jax.experimental.pallas import triton

    params = triton.CompilerParams(num_warps=warps, num_stages=stages)
    options = {"grid": grid, "out_shape": results, "name": name}
    compiled = pl.pallas_call(kernel, compiler_params=params, **options)  # type: ignore[arg-type]
    interpreted = pl.pallas_call(kernel, interpret=True, **options)  # type: ignore[arg-type]

    def call(*arrays: jax.Array) -> Any:
        return lax.platform_dependent(*arrays, cpu=interpreted, default=compiled)

    return call


def _first(size: int, program: Any) -> Any:
    """The first `size` places of an axis that may have fewer; JAX 0.12 refuses such only where it sees their start.

    Args:
        size: how many.
        program: a number that is known when the kernel runs.
    """
    return pl.ds(program * 0, size)


def _within(start: Any, size: int, count: int) -> jax.Array | None:
    """Which of the `size` places from `start` on there are, of `count`; None if all are."""
    return None if count % size == 0 else start + jnp.arange(size) < count


def _within_slice(places: Any, count: int) -> jax.Array | None:
    return _within(places.start, places.size, count)


def _mask(shape: tuple[int, int], rows: jax.Array | None = None, columns: jax.Array | None = None) -> jax.Array | None:
    """What of a tile there is, bool `[rows, columns]`; None if all is."""
    parts = [known for known in (None if rows is None else rows[:, None], columns) if known is not None]
    if not parts:
        return None
    return functools.reduce(jnp.logical_and, [jnp.broadcast_to(known, shape) for known in parts])


def _load(ref: Any, mask: jax.Array | None = None, eviction_policy: str | None = None) -> jax.Array:
    """A tile; 0 where the mask is false."""
    from jax.experimental.pallas import triton

    return triton.load(ref, mask=mask, other=None if mask is None else 0, eviction_policy=eviction_policy)


def _store(ref: Any, tile: jax.Array, mask: jax.Array | None = None) -> None:
    from jax.experimental.pallas import triton

    triton.store(ref, tile, mask=mask)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of tiles, float32; float32 operands are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
