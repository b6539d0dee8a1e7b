"""The native CPU kernels, compiled when the package is installed if a C++ compiler is available."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grok1.params.weights import PANEL_COLUMNS, QuantizedMatrix, panels_shape

LIBRARY = Path(__file__).with_name("_kernels.so")
"""Path of the library compiled from `native/`."""

_TARGETS = {
    "grok1_multiply": "Grok1Multiply",
    "grok1_gated": "Grok1MultiplyGated",
    "grok1_transposed": "Grok1MultiplyTransposed",
    "grok1_attention": "Grok1Attention",
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Load the compiled kernels; None if they were not built or cannot be loaded."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for symbol in _TARGETS.values():
            getattr(library, symbol)
        library.Grok1KernelsName.argtypes = [ctypes.c_int64]
        library.Grok1KernelsName.restype = ctypes.c_char_p
        size = ctypes.c_int64
        library.Grok1Pack.argtypes = [ctypes.c_void_p, size, size, size, size, size, ctypes.c_void_p, size, size]
        library.Grok1Pack.restype = None
        library.Grok1Read.argtypes = [ctypes.c_void_p, size]
        library.Grok1Read.restype = ctypes.c_uint64
        library.Grok1SetThreads.argtypes = [size]
        library.Grok1SetThreads.restype = None
    except (OSError, AttributeError):
        return None
    return library


def _required_library() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError("the kernels were not built")
    return library


@functools.cache
def why_not() -> str | None:
    """Register the kernels with XLA; return why they cannot be used, or None if they can."""
    library = _library()
    if library is None:
        return "no kernels for this processor were built (install a C++ compiler such as g++ and install grok1 again)"
    jax.devices("cpu")  # without a backend, JAX would defer the registration, and a failure would prevent the backend
    try:
        for target, symbol in _TARGETS.items():
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except jax.errors.JaxRuntimeError as error:
        if "API version" not in str(error):
            raise
        version = importlib.metadata.version("jaxlib")
        return f"the kernels were built for another version of jaxlib than {version} (install grok1 again)"
    return None


@functools.cache
def kernel_names() -> tuple[str, ...]:
    """Return the names of the kernels that this processor can run, fastest first; empty if none were built."""
    library = _library()
    names: list[str] = []
    while library is not None and (name := library.Grok1KernelsName(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def kernel_name() -> str | None:
    """Return the name of the kernels used by default on this processor, or None if none were built."""
    return kernel_names()[0] if kernel_names() else None


def _kernel(target: str, result: jax.ShapeDtypeStruct) -> Callable[..., jax.Array]:
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    return jax.ffi.ffi_call(target, result)


def set_threads(count: int) -> None:
    """Set the number of threads of the kernels, for all devices of the process."""
    library = _library()
    if library is not None:
        library.Grok1SetThreads(count)


def read(memory: np.ndarray) -> int:
    """Read an array of a multiple of 256 bytes with all threads, to measure memory bandwidth."""
    library = _required_library()
    if not memory.flags.c_contiguous or memory.nbytes % 256:
        raise ValueError(f"cannot read an array of {memory.nbytes:,} bytes, expected contiguous multiples of 256")
    return int(library.Grok1Read(memory.ctypes.data, memory.nbytes))


def pack_box(
    box: np.ndarray, packed: np.ndarray, first_row: int, first_column: int, groups: int, group_rows: int
) -> None:
    """Write a box of a matrix into panels. Threads may write disjoint boxes at the same time.

    Args:
        box: int8 `[rows, columns]`, with contiguous rows.
        packed: uint8, the panels of one entire matrix, C-contiguous.
        first_row: row of the matrix at which the box starts.
        first_column: column of the matrix at which the box starts.
        groups: number of scale groups of the matrix.
        group_rows: rows per group.
    """
    library = _required_library()
    rows, columns = box.shape
    most_columns = packed.shape[0] * PANEL_COLUMNS
    inside = 0 <= first_row <= groups * group_rows - rows and 0 <= first_column <= most_columns - columns
    whole = packed.shape == panels_shape((groups * group_rows, most_columns), groups) and packed.flags.c_contiguous
    if not inside or not whole or box.strides[1] != 1:
        raise ValueError(f"a box of {box.shape} at {first_row}, {first_column} does not fit panels of {packed.shape}")
    library.Grok1Pack(
        box.ctypes.data, box.strides[0], first_row, rows, first_column, columns, packed.ctypes.data, groups, group_rows
    )


def multiply(x: jax.Array, weight: QuantizedMatrix, index: jax.Array, kernels: str = "") -> jax.Array:
    """Multiply rows of `x` by matrices of a stack.

    Each matrix is read once for all its rows. The result of a row does not depend on the other rows.

    Args:
        x: float `[M, K]`.
        weight: a stack `[..., K, N]` in panels.
        index: int32 `[R]`, R a multiple of M: for each row of the result, the index of its matrix, flattened over all
            leading axes; a negative index gives zeros. Row r is the product of row `r // (R // M)` of `x`.
        kernels: one of `kernel_names()`; the fastest by default.

    Returns:
        float32 `[R, N]`.
    """
    product = _kernel("grok1_multiply", jax.ShapeDtypeStruct((*index.shape, weight.shape[-1]), jnp.float32))
    return product(
        x.astype(jnp.float32),
        weight.values,
        weight.scales,
        index.astype(jnp.int32),
        group_rows=_group_rows(weight),
        kernels=kernels,
    )


def multiply_gated(
    x: jax.Array, gate: QuantizedMatrix, value: QuantizedMatrix, index: jax.Array, kernels: str = ""
) -> jax.Array:
    """Return `gelu(x @ gate) * (x @ value)`, with the tanh approximation of GELU and stacks of equal shape.

    Arguments and result are otherwise those of `multiply`.
    """
    product = _kernel("grok1_gated", jax.ShapeDtypeStruct((*index.shape, gate.shape[-1]), jnp.float32))
    return product(
        x.astype(jnp.float32),
        gate.values,
        gate.scales,
        value.values,
        value.scales,
        index.astype(jnp.int32),
        group_rows=_group_rows(gate),
        kernels=kernels,
    )


def multiply_transposed(x: jax.Array, table: jax.Array, kernels: str = "") -> jax.Array:
    """Return `x @ table.T` for few rows, reading the table once. The result of a row does not depend on the others.

    Args:
        x: float `[M, K]`.
        table: float32 or bfloat16 `[N, K]`.
        kernels: one of `kernel_names()`; the fastest by default.

    Returns:
        float32 `[M, N]`.
    """
    product = _kernel("grok1_transposed", jax.ShapeDtypeStruct((x.shape[0], table.shape[0]), jnp.float32))
    return product(x.astype(jnp.float32), table, kernels=kernels)


def attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array | int,
    positions: jax.Array,
    slots: jax.Array | None = None,
    *,
    multiplier: float,
    cap: float,
    kernels: str = "",
) -> jax.Array:
    """Compute `grok1.ops.xla.attention.attend`, for a float32 or bfloat16 cache."""
    rows = jnp.arange(query.shape[0]) if slots is None else slots
    attend = _kernel("grok1_attention", jax.ShapeDtypeStruct(query.shape, jnp.float32))
    return attend(
        query.astype(jnp.float32),
        keys,
        values,
        jnp.asarray(layer, jnp.int32),
        positions.astype(jnp.int32),
        rows.astype(jnp.int32),
        multiplier=np.float32(multiplier),
        cap=np.float32(cap),
        kernels=kernels,
    )


def _group_rows(weight: QuantizedMatrix) -> np.int64:
    if weight.layout is None:
        raise TypeError("the CPU kernels need packed matrices")
    return np.int64(weight.layout.group_rows)


def index_in_stack(weight: QuantizedMatrix, index: tuple[jax.Array | int, ...]) -> jax.Array:
    """Flatten the index of a matrix over all leading axes of its stack."""
    flat = jnp.zeros((), jnp.int32)
    for size, axis in zip(weight.shape, index, strict=False):
        flat = flat * size + axis
    return flat
