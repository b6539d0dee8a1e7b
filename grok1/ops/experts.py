"""The expert layer: gated linear units of the experts that the router selected for each row.

Many rows are sorted by expert and cut into blocks of one expert each. A weight is read once per block, no row is
dropped, and no row is computed for an expert that was not selected for it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from grok1.params.weights import QuantizedMatrix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertBlocks:
    """Rows sorted into blocks of one expert each.

    Attributes:
        slot: int32 `[rows]`, index of each row among the rows of all blocks; `blocks * block_rows` for a row without
            expert.
        expert: int32 `[blocks]`, expert of each block.
        used: int32 scalar, number of blocks that contain rows.
        block_rows: number of rows per block.
    """

    slot: jax.Array
    expert: jax.Array
    used: jax.Array
    block_rows: int = dataclasses.field(metadata={"static": True})

    @property
    def num_slots(self) -> int:
        """Total number of rows in all blocks, used or not."""
        return int(self.expert.shape[0]) * self.block_rows


def group_by_expert(expert: jax.Array, num_experts: int, block_rows: tuple[int, int]) -> ExpertBlocks:
    """Sort rows into blocks of one expert each, preserving the order of an expert's rows.

    Args:
        expert: int32 `[rows]`, expert of each row; `num_experts` for none.
        num_experts: number of experts.
        block_rows: minimum and maximum number of rows per block, powers of 2.
    """
    rows = expert.shape[0]
    size, most = block_rows
    while size < min(rows / num_experts, most):
        size *= 2
    # The last block of each expert may be partly filled; an expert without rows has none.
    blocks = min(rows, (rows + min(num_experts, rows) * (size - 1)) // size)
    one_hot = jax.nn.one_hot(expert, num_experts, dtype=jnp.int32)  # [rows, experts]
    rank = jnp.cumsum(one_hot, axis=0) - one_hot  # of each row among the rows of each expert
    blocks_of = -(-jnp.sum(one_hot, axis=0) // size)  # [experts]
    last_block = jnp.cumsum(blocks_of)
    first_slot = (last_block - blocks_of) * size
    slot = jnp.sum(one_hot * (first_slot + rank), axis=1)
    slot = jnp.where(expert < num_experts, slot, blocks * size)
    block_expert = jnp.sum(last_block[None, :] <= jnp.arange(blocks)[:, None], axis=1)
    return ExpertBlocks(
        slot=slot.astype(jnp.int32),
        expert=jnp.minimum(block_expert, num_experts - 1).astype(jnp.int32),
        used=last_block[-1].astype(jnp.int32),
        block_rows=size,
    )


def scatter_rows(x: jax.Array, blocks: ExpertBlocks) -> jax.Array:
    """Arrange rows `[rows, K]` in blocks `[slots, K]`; slots without a row are 0."""
    return jnp.zeros((blocks.num_slots, x.shape[1]), x.dtype).at[blocks.slot].set(x, mode="drop")


def gather_rows(y: jax.Array, blocks: ExpertBlocks) -> jax.Array:
    """Collect rows `[rows, N]` from their blocks `[slots, N]`; rows without expert are 0."""
    return y.at[blocks.slot].get(mode="fill", fill_value=0)


def gated(gates: jax.Array, values: jax.Array) -> jax.Array:
    """Return `gelu(gates) * values`, with the tanh approximation of GELU."""
    return jax.nn.gelu(gates, approximate=True) * values


def weighted_sum(outputs: jax.Array, factors: jax.Array) -> jax.Array:
    """Sum outputs `[rows * selected, N]` over experts, weighted by `factors` `[rows, selected]`: `[rows, N]`."""
    return jnp.sum(outputs.reshape(*factors.shape, -1) * factors[..., None], axis=1)


def reference_gated_experts(
    x: jax.Array,
    gate: QuantizedMatrix,
    value: QuantizedMatrix,
    project: QuantizedMatrix,
    layer: jax.Array | int,
    experts: jax.Array,
    factors: jax.Array,
) -> jax.Array:
    """Compute `Kernels.gated_experts` with dequantized matrices and all experts for every row."""
    gate_matrices, value_matrices, project_matrices = (
        weight.dequantize()[layer]
        for weight in (gate, value, project)  # [experts, K, N]
    )
    x = x.astype(jnp.float32)
    gates = jnp.einsum("mk,ekn->men", x, gate_matrices, precision="highest")
    hidden = gated(gates, jnp.einsum("mk,ekn->men", x, value_matrices, precision="highest"))
    every = jnp.einsum("men,enk->mek", hidden, project_matrices, precision="highest")
    chosen = jax.nn.one_hot(experts, gate.shape[1], dtype=jnp.float32)  # [rows, selected, experts]
    return jnp.einsum("mek,mse,ms->mk", every, chosen, factors, precision="highest")
