"""Building blocks of the GPU kernels: launching, and tiles that may reach beyond an array."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

LEAST_ROWS = 16
"""Rows of the smallest product of a GPU's matrix units; fewer are padded."""

ENOUGH_PROGRAMS = 512
"""Programs that keep a GPU's memory busy: 132 multiprocessors run a few of each kernel at a time."""


def launch(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    results: list[jax.ShapeDtypeStruct],
    warps: int,
    stages: int,
) -> Callable[..., Any]:
    """A kernel over arrays in GPU memory; on a CPU it is interpreted."""
    from jax.experimental.pallas import triton

    params = triton.CompilerParams(num_warps=warps, num_stages=stages)
    options = {"grid": grid, "out_shape": results, "name": name}
    compiled = pl.pallas_call(kernel, compiler_params=params, **options)  # type: ignore[arg-type]
    interpreted = pl.pallas_call(kernel, interpret=True, **options)  # type: ignore[arg-type]

    def call(*arrays: jax.Array) -> Any:
        return lax.platform_dependent(*arrays, cpu=interpreted, default=compiled)

    return call


def leading(size: int, program: Any) -> Any:
    """The first `size` elements of an axis that may have fewer; JAX 0.12 only rejects one with a static start.

    Args:
        size: number of elements.
        program: a number that is known only when the kernel runs.
    """
    return pl.ds(program * 0, size)


def within(start: Any, size: int, count: int) -> jax.Array | None:
    """Which of the `size` elements from `start` on are below `count`; None if all are."""
    return None if count % size == 0 else start + jnp.arange(size) < count


def within_slice(places: Any, count: int) -> jax.Array | None:
    """Which elements of a `pl.ds` slice are below `count`; None if all are."""
    return within(places.start, places.size, count)


def mask_of(
    shape: tuple[int, int], rows: jax.Array | None = None, columns: jax.Array | None = None
) -> jax.Array | None:
    """The elements of a tile that exist, bool `[rows, columns]`; None if all do."""
    parts = [known for known in (None if rows is None else rows[:, None], columns) if known is not None]
    if not parts:
        return None
    return functools.reduce(jnp.logical_and, [jnp.broadcast_to(known, shape) for known in parts])


def load(ref: Any, mask: jax.Array | None = None, eviction_policy: str | None = None) -> jax.Array:
    """A tile; 0 where the mask is false."""
    from jax.experimental.pallas import triton

    return triton.load(ref, mask=mask, other=None if mask is None else 0, eviction_policy=eviction_policy)


def store(ref: Any, tile: jax.Array, mask: jax.Array | None = None) -> None:
    """Writes a tile where the mask is true."""
    from jax.experimental.pallas import triton

    triton.store(ref, tile, mask=mask)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of tiles, float32; float32 operands are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
