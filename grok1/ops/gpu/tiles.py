"""Building blocks of the GPU kernels: launching, and tiles that may extend beyond an array."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

MIN_ROWS = 16
"""Rows of the smallest product of a GPU's tensor cores; fewer rows are padded."""

MIN_PROGRAMS = 512
"""Number of programs that saturates a GPU's memory: 132 multiprocessors run a few each at a time."""


def launch(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    results: list[jax.ShapeDtypeStruct],
    warps: int,
    stages: int,
) -> Callable[..., Any]:
    """Return a function that runs a kernel on arrays in GPU memory, or interprets it on a CPU."""
    from jax.experimental.pallas import triton

    params = triton.CompilerParams(num_warps=warps, num_stages=stages)
    options = {"grid": grid, "out_shape": results, "name": name}
    compiled = pl.pallas_call(kernel, compiler_params=params, **options)  # type: ignore[arg-type]
    interpreted = pl.pallas_call(kernel, interpret=True, **options)  # type: ignore[arg-type]

    def call(*arrays: jax.Array) -> Any:
        return lax.platform_dependent(*arrays, cpu=interpreted, default=compiled)

    return call


def leading(size: int, program: Any) -> Any:
    """Return a slice of the first `size` elements of an axis that may have fewer.

    JAX 0.12 rejects such a slice if its start is static.

    Args:
        size: number of elements.
        program: any integer that is traced.
    """
    return pl.ds(program * 0, size)


def within(start: Any, size: int, count: int) -> jax.Array | None:
    """Return a mask of the `size` indices from `start` on that are below `count`, or None if `size` divides `count`."""
    return None if count % size == 0 else start + jnp.arange(size) < count


def within_slice(indices: Any, count: int) -> jax.Array | None:
    """Return a mask of the indices of a `pl.ds` slice that are below `count`, or None if all are."""
    return within(indices.start, indices.size, count)


def mask_of(
    shape: tuple[int, int], rows: jax.Array | None = None, columns: jax.Array | None = None
) -> jax.Array | None:
    """Combine masks of rows and columns into one of a tile, bool `[rows, columns]`, or None if both are None."""
    parts = [known for known in (None if rows is None else rows[:, None], columns) if known is not None]
    if not parts:
        return None
    return functools.reduce(jnp.logical_and, [jnp.broadcast_to(known, shape) for known in parts])


def load(ref: Any, mask: jax.Array | None = None, eviction_policy: str | None = None) -> jax.Array:
    """Load a tile; elements are 0 where the mask is false."""
    from jax.experimental.pallas import triton

    return triton.load(ref, mask=mask, other=None if mask is None else 0, eviction_policy=eviction_policy)


def store(ref: Any, tile: jax.Array, mask: jax.Array | None = None) -> None:
    """Store a tile where the mask is true."""
    from jax.experimental.pallas import triton

    triton.store(ref, tile, mask=mask)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the product of two tiles in float32, without rounding float32 operands."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
