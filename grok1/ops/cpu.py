"""The kernels for processors, which are built when the package is installed and a C++ compiler is there.

Without them everything runs all the same, through `grok1.ops.blocked`.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from grok1.quantize import QuantizedWeight

LIBRARY = Path(__file__).with_name("_kernels.so")
"""Where the build puts the compiled `native/quantized_matmul.cc`."""

_TARGET = "grok1_quantized_matmul"


@functools.cache
def kernel_name() -> str | None:
    """Which kernel runs on this processor, "avx512-vnni" or "portable"; None if none was built or can be loaded."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library.Grok1QuantizedMatmul), platform="cpu")
    library.Grok1KernelName.restype = ctypes.c_char_p
    name: bytes = library.Grok1KernelName()
    return name.decode()


def fits(weight: QuantizedWeight) -> bool:
    """Whether a kernel is there that multiplies with such a weight faster than XLA does."""
    return weight.scales.dtype == jnp.bfloat16 and kernel_name() == "avx512-vnni"


def multiply(x: jax.Array, weight: QuantizedWeight, index: jax.Array, *, portable: bool = False) -> jax.Array:
    """Each row of `x` times a matrix of its own out of a stack.

    A matrix is read once for all of its rows. What a row gives depends on nothing beside it.

    Args:
        x: float `[M, K]`.
        weight: a stack `[..., K, N]` with its scales `[..., G, N]`.
        index: int32 `[M]`, the place of the row's matrix in the stack, counted over all leading axes; negative gives 0.
        portable: use the kernel that runs on every processor.

    Returns:
        float32 `[M, N]`.
    """
    *lead, inner, columns = weight.shape
    stack = math.prod(lead)
    product = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((x.shape[0], columns), jnp.float32))
    return product(
        x.astype(jnp.float32),
        weight.weight.reshape(stack, inner, columns),
        weight.scales.reshape(stack, weight.groups, columns),
        index.astype(jnp.int32),
        portable=portable,
    )
