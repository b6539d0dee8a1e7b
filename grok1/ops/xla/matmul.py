"""Products with quantized matrices in plain JAX, as a loop over blocks of their rows.

For a product with an entire int8 matrix, XLA first writes the matrix as floats, which costs five times the memory
traffic and a copy as large as the weights. Here each block of rows is sliced from the stack, converted and multiplied
while it is in the cache: the weight is read once and never copied.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from grok1.ops.experts import ExpertBlocks
from grok1.params.weights import QuantizedMatrix

# Up to this many rows of activations, a block is multiplied as a sum of scaled rows of the weight, which XLA fuses with
# the conversion. For more rows, a matrix product per block is faster.
_FUSED_ROWS = 4
_PRODUCT_BLOCK = 256
_PRODUCT_BLOCK_ACCELERATOR = 2048


def product_precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Return the highest precision for float32 operands, which accelerators would otherwise round."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _fused_block(inner: int, columns: int) -> int:
    """Return the number of rows per fused block: more are faster for large matrices, but slower to compile."""
    if inner * columns < 1 << 20:
        return 16
    return 32 if columns >= 4096 else 64


def multiply(x: jax.Array, weight: QuantizedMatrix, index: tuple[jax.Array | int, ...]) -> jax.Array:
    """Return `x @ weight[index]` in float32.

    Args:
        x: float `[M, K]`.
        weight: a stack `[..., K, N]` with its scales `[..., G, N]`.
        index: index of the matrix on each leading axis.

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
        for i in range(size):  # sliced row by row: XLA would copy a block with several uses
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
    """Compute `grok1.ops.xla.kernels.Kernels.grouped_matmuls` for one stack."""
    size = blocks.block_rows

    def one_block(i: jax.Array, y: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice(x, (i * size, 0), (size, x.shape[1]))
        product = multiply(rows, weight, (layer, blocks.expert[i]))
        return lax.dynamic_update_slice(y, product, (i * size, 0))

    y = jnp.zeros((blocks.num_slots, weight.shape[-1]), jnp.float32)
    return lax.fori_loop(0, blocks.used, one_block, y)
