"""Quantized products as a loop over blocks of a weight's rows, in plain JAX: runs on every platform.

A product over a whole int8 matrix makes XLA write the matrix out as floats first, which costs five times the memory
traffic and a copy as large as the weights. Here a block of rows is sliced out of the stack, converted and multiplied
while it is in the cache, so that the weight is read once and no copy of it is ever made.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from grok1.ops.experts import ExpertBlocks
from grok1.params.weights import QuantizedMatrix

# Up to this many rows of activations a block is multiplied as a sum of scaled weight rows, which XLA fuses with the
# conversion; with more, a matrix product per block is faster.
_FUSED_ROWS = 4
_PRODUCT_BLOCK = 256
_PRODUCT_BLOCK_ACCELERATOR = 2048


def product_precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Full precision for float32 operands, where accelerators would round them to fewer bits."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _fused_block(inner: int, columns: int) -> int:
    """Rows of a fused block: many are faster on large matrices, where they are long enough, and slower to compile."""
    if inner * columns < 1 << 20:
        return 16
    return 32 if columns >= 4096 else 64


def multiply(x: jax.Array, weight: QuantizedMatrix, index: tuple[jax.Array | int, ...]) -> jax.Array:
    """`x @ weight[index]`, in float32.

    Args:
        x: float `[M, K]`.
        weight: a stack `[..., K, N]` with its scales `[..., G, N]`.
        index: the place of the matrix in the stack, an index for each leading axis.

    Returns:
        float32 `[M, N]`.
    """
    fused = x.shape[0] <= _FUSED_ROWS
    block = _fused_block(*weight.shape[-2:]) if fused else _PRODUCT_BLOCK
    return lax.platform_dependent(
        x,
        weight,
        index,
        cpu=partial(_multiply, block=block, fused=fused),
        default=partial(_multiply, block=_PRODUCT_BLOCK_ACCELERATOR, fused=False),
    )


def _multiply(
    x: jax.Array, weight: QuantizedMatrix, index: tuple[jax.Array | int, ...], *, block: int, fused: bool
) -> jax.Array:
    *_, inner, columns = weight.shape
    group_rows = inner // weight.groups
    block = min(block, group_rows)
    lead = len(index)

    def slice_rows(start: jax.Array | int, size: int) -> jax.Array:
        rows = lax.dynamic_slice(weight.values, (*index, start, 0), (*(1,) * lead, size, columns))
        return rows.reshape(size, columns)

    def block_product(start: jax.Array | int, size: int, total: jax.Array) -> jax.Array:
        inputs = lax.dynamic_slice(x, (0, start), (x.shape[0], size))
        if not fused:
            return total + jnp.dot(
                inputs,
                slice_rows(start, size).astype(x.dtype),
                precision=product_precision(x.dtype),
                preferred_element_type=jnp.float32,
            )
        for i in range(size):  # each row sliced by itself: XLA would copy a block of several uses out of the stack
            total += inputs[:, i, None].astype(jnp.float32) * slice_rows(start + i, 1).astype(jnp.float32)
        return total

    def add_group(group: jax.Array | int, total: jax.Array) -> jax.Array:
        first = group * group_rows
        partial = jnp.zeros((x.shape[0], columns), jnp.float32)
        whole_blocks, rest = divmod(group_rows, block)
        partial = lax.fori_loop(0, whole_blocks, lambda i, p: block_product(first + i * block, block, p), partial)
        if rest:
            partial = block_product(first + whole_blocks * block, rest, partial)
        scales = lax.dynamic_slice(weight.scales, (*index, group, 0), (*(1,) * lead, 1, columns))
        return total + partial * scales.reshape(1, columns).astype(jnp.float32)

    return lax.fori_loop(0, weight.groups, add_group, jnp.zeros((x.shape[0], columns), jnp.float32))


def grouped_multiply(x: jax.Array, weight: QuantizedMatrix, layer: jax.Array | int, blocks: ExpertBlocks) -> jax.Array:
    """As `grok1.ops.xla.kernels.Kernels.grouped_matmuls`, with one stack."""
    size = blocks.block_rows

    def one_block(i: jax.Array, y: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice(x, (i * size, 0), (size, x.shape[1]))
        product = multiply(rows, weight, (layer, blocks.expert[i]))
        return lax.dynamic_update_slice(y, product, (i * size, 0))

    y = jnp.zeros((blocks.num_slots, weight.shape[-1]), jnp.float32)
    return lax.fori_loop(0, blocks.used, one_block, y)
