"""Products of rows with the matrix of the expert that each row was sent to.

Rows are sorted by expert and cut into blocks of one expert each, so that a weight is read once a block, no row is
dropped and no row is computed for an expert that it was not sent to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from grok1.ops.backend import Backend
from grok1.ops.gpu import kernels as gpu
from grok1.ops.tpu import kernels as tpu
from grok1.ops.xla import blocked
from grok1.params.weights import QuantizedMatrix

MOST_ROWS: dict[Backend, int] = {"gpu": gpu.MOST_ROWS, "tpu": tpu.MOST_ROWS}
"""Rows of a block of `block_products`."""

# Rows of the smallest and of the largest block.
_BLOCK_ROWS: dict[Backend, tuple[int, int]] = {
    "xla": (1, 128),
    "cpu": (1, 128),
    "gpu": (gpu.LEAST_ROWS, gpu.MOST_ROWS),
    "tpu": (tpu.LEAST_ROWS, tpu.MOST_ROWS),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertBlocks:
    """Rows in blocks, each block of one expert.

    Attributes:
        slot: int32 `[rows]`, the place of each row among the blocks' rows; `blocks * block_rows` where a row goes to
            no expert.
        expert: int32 `[blocks]`, each block's expert.
        used: int32 scalar, the number of blocks that hold rows.
        block_rows: rows of a block.
    """

    slot: jax.Array
    expert: jax.Array
    used: jax.Array
    block_rows: int = dataclasses.field(metadata={"static": True})

    @property
    def num_slots(self) -> int:
        """Places in all blocks together."""
        return int(self.expert.shape[0]) * self.block_rows


def group_by_expert(expert: jax.Array, num_experts: int, backend: Backend = "xla") -> ExpertBlocks:
    """Sorts rows into blocks of one expert each, keeping the rows' order inside an expert.

    Args:
        expert: int32 `[rows]`, each row's expert; `num_experts` sends a row nowhere.
        num_experts: how many experts there are.
        backend: what is to multiply them, which decides how large blocks are.
    """
    rows = expert.shape[0]
    block_rows = _block_rows(rows / num_experts, backend)
    # Each expert fills its last block by itself, and no expert without rows has one.
    blocks = min(rows, (rows + min(num_experts, rows) * (block_rows - 1)) // block_rows)
    one_hot = jax.nn.one_hot(expert, num_experts, dtype=jnp.int32)  # [rows, experts]
    rank = jnp.cumsum(one_hot, axis=0) - one_hot  # of a row among those of each expert
    blocks_of = -(-jnp.sum(one_hot, axis=0) // block_rows)  # [experts]
    last_block = jnp.cumsum(blocks_of)
    first_slot = (last_block - blocks_of) * block_rows
    slot = jnp.sum(one_hot * (first_slot + rank), axis=1)
    slot = jnp.where(expert < num_experts, slot, blocks * block_rows)
    block_expert = jnp.sum(last_block[None, :] <= jnp.arange(blocks)[:, None], axis=1)
    return ExpertBlocks(
        slot=slot.astype(jnp.int32),
        expert=jnp.minimum(block_expert, num_experts - 1).astype(jnp.int32),
        used=last_block[-1].astype(jnp.int32),
        block_rows=block_rows,
    )


def _block_rows(rows: float, backend: Backend) -> int:
    """The power of 2 that holds so many rows of an expert, as far as blocks go."""
    size, most = _BLOCK_ROWS[backend]
    while size < min(rows, most):
        size *= 2
    return size


def scatter_rows(x: jax.Array, blocks: ExpertBlocks) -> jax.Array:
    """Rows `[rows, K]` laid out in blocks, `[slots, K]`; places without a row are 0."""
    return jnp.zeros((blocks.num_slots, x.shape[1]), x.dtype).at[blocks.slot].set(x, mode="drop")


def gather_rows(y: jax.Array, blocks: ExpertBlocks) -> jax.Array:
    """Rows `[rows, N]` out of their blocks `[slots, N]`; rows that went to no expert are 0."""
    return y.at[blocks.slot].get(mode="fill", fill_value=0)


def grouped_matmul(
    x: jax.Array, weight: QuantizedMatrix, layer: jax.Array | int, blocks: ExpertBlocks, backend: Backend = "xla"
) -> jax.Array:
    """Each block's rows times the matrix of the block's expert.

    Args:
        x: float `[slots, K]`, rows in blocks.
        weight: a stack `[layers, experts, K, N]`.
        layer: the layer's index in the stack; may be traced.
        blocks: the blocks of `x`.
        backend: what computes it, for which the blocks were made.

    Returns:
        float32 `[slots, N]`; blocks that hold no row mean nothing.
    """
    return grouped_matmuls(x, [weight], layer, blocks, backend)[0]


def grouped_matmuls(
    x: jax.Array,
    weights: Sequence[QuantizedMatrix],
    layer: jax.Array | int,
    blocks: ExpertBlocks,
    backend: Backend = "xla",
) -> list[jax.Array]:
    """`grouped_matmul` with several stacks, which one kernel reads where a backend has such."""
    if backend in ("gpu", "tpu"):
        active = jnp.arange(blocks.expert.shape[0]) < blocks.used
        in_blocks = x.reshape(-1, blocks.block_rows, x.shape[1])
        products = block_products(in_blocks, weights, layer, blocks.expert, active, backend)
        return [product.reshape(blocks.num_slots, -1) for product in products]
    return [_grouped_matmul(x, weight, layer, blocks) for weight in weights]


def block_products(
    x: jax.Array,
    weights: Sequence[QuantizedMatrix],
    layer: jax.Array | int,
    expert: jax.Array,
    active: jax.Array,
    backend: Backend,
) -> list[jax.Array]:
    """Blocks of rows times the matrices of their experts, by the kernels of an accelerator.

    Args:
        x: float `[blocks, rows, K]`, or `[1, rows, K]` for rows that are those of every block.
        weights: stacks `[layers, experts, K, N]`, each with its own N.
        layer: which layer; may be traced.
        expert: int32 `[blocks]`, the expert of each block.
        active: bool `[blocks]`; the results of other blocks mean nothing.
        backend: "gpu" or "tpu"; for matrices that are no whole tiles of a TPU, XLA multiplies.

    Returns:
        float32 `[blocks, rows, N]` for each stack.
    """
    if backend == "gpu":
        return gpu.multiply(x, weights, layer, expert, active)
    tiled = [tpu.can_multiply(weight) for weight in weights]
    return [
        tpu.multiply(x, weight, layer, expert, active) if tiles else _block_products(x, weight, layer, expert, active)
        for weight, tiles in zip(weights, tiled, strict=True)
    ]


def _block_products(
    x: jax.Array, weight: QuantizedMatrix, layer: jax.Array | int, expert: jax.Array, active: jax.Array
) -> jax.Array:
    def one_block(i: jax.Array, y: jax.Array) -> jax.Array:
        rows = x[0] if x.shape[0] == 1 else x[i]
        return lax.cond(active[i], lambda: y.at[i].set(blocked.multiply(rows, weight, (layer, expert[i]))), lambda: y)

    blocks = expert.shape[0]
    return lax.fori_loop(0, blocks, one_block, jnp.zeros((blocks, x.shape[1], weight.shape[-1]), jnp.float32))


def _grouped_matmul(x: jax.Array, weight: QuantizedMatrix, layer: jax.Array | int, blocks: ExpertBlocks) -> jax.Array:
    size = blocks.block_rows

    def one_block(i: jax.Array, y: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice(x, (i * size, 0), (size, x.shape[1]))
        product = blocked.multiply(rows, weight, (layer, blocks.expert[i]))
        return lax.dynamic_update_slice(y, product, (i * size, 0))

    y = jnp.zeros((blocks.num_slots, weight.shape[-1]), jnp.float32)
    return lax.fori_loop(0, blocks.used, one_block, y)


def definition(x: jax.Array, weight: QuantizedMatrix, layer: jax.Array | int, expert: jax.Array) -> jax.Array:
    """What scattering, `grouped_matmul` and gathering compute together, for rows `[rows, K]` with their experts."""
    matrices = weight[layer].dequantize()  # [experts, K, N]
    every = jnp.einsum("mk,ekn->men", x.astype(jnp.float32), matrices, precision="highest")
    chosen = jax.nn.one_hot(expert, matrices.shape[0], dtype=jnp.float32)
    return jnp.einsum("men,me->mn", every, chosen, precision="highest")
