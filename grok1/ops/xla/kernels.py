"""The operations of the network in plain JAX, and the interface that the kernels of each platform implement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from grok1.config import ModelConfig
from grok1.ops.experts import (
    ExpertBlocks,
    gated,
    gather_rows,
    group_by_expert,
    scatter_rows,
    weighted_sum,
)
from grok1.ops.logits import reference_logits
from grok1.ops.xla.attention import attend
from grok1.ops.xla.matmul import grouped_multiply, multiply
from grok1.params.weights import QuantizedMatrix


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The operations in which the network spends its time, and the limits of steps composed of them.

    This class compiles plain JAX by XLA and runs on every platform; the kernels of a platform override its methods.
    `reference_*` functions beside this package define what each operation computes.

    Attributes:
        max_chunk: most tokens of a sequence that one step should read. With 2048 tokens, 256 for an expert, an
            accelerator has more to compute than weights to read.
        min_lanes: fewest lanes of a step that reads several prefill chunks. Accelerators read all weights for any step,
            and process 256 tokens in the time of a few.
        backend: "xla", or the platform that the kernels are written for.
        block_rows: rows of the smallest and of the largest block that the rows of an expert are cut into.
        keeps_cache_layout: whether the compiler must be held to the layout that the key/value cache has.
        attention: attention over the key/value cache, as `grok1.ops.xla.attention.attend`.
        output_logits: logits over the vocabulary, as `grok1.ops.logits.reference_logits`.
    """

    max_chunk: int = 2048
    min_lanes: int = 16
    backend: ClassVar[str] = "xla"
    block_rows: ClassVar[tuple[int, int]] = 1, 128
    keeps_cache_layout: ClassVar[bool] = False

    attention = staticmethod(attend)
    output_logits = staticmethod(reference_logits)

    @property
    def name(self) -> str:
        """Name for users, such as "amx-int8", "triton", "mosaic" or "xla"."""
        return "xla"

    @property
    def pack_box(self) -> Callable[[np.ndarray, np.ndarray, int, int, int, int], None] | None:
        """Function that puts a box of a matrix into panels, for kernels that read panels; otherwise None."""
        return None

    @property
    def packs_weights(self) -> bool:
        """Whether the kernels read quantized matrices in panels."""
        return self.pack_box is not None

    def why_not_on(self, device: jax.Device) -> str | None:
        """Why the kernels cannot run on a device; None if they can."""
        return None

    def why_not_for(self, config: ModelConfig, shards: int) -> str | None:
        """Why the kernels cannot run a model divided into `shards` model shards; None if they can."""
        return None

    def set_threads(self, count: int) -> None:
        """Sets the number of CPU threads of the kernels, over all devices of the process."""

    def check_layout(self, *weights: QuantizedMatrix) -> None:
        """Raises TypeError for matrices in a layout that the kernels do not read."""
        if any((weight.layout is not None) != self.packs_weights for weight in weights):
            expected = "in panels" if self.packs_weights else "in the release's order"
            raise TypeError(f"{self.name} kernels read matrices {expected}, and some are not")

    def matmul(self, x: jax.Array, weight: QuantizedMatrix, index: tuple[jax.Array | int, ...]) -> jax.Array:
        """`x @ weight[index]`, accumulated in float32.

        Takes the whole stack and the index, so that no slice of a weight need be copied out of it first.

        Args:
            x: float `[M, K]`.
            weight: a stack `[..., K, N]`.
            index: index of the matrix on each leading axis; may be traced.

        Returns:
            float32 `[M, N]`.
        """
        return self.matmuls(x, [weight], index)[0]

    def matmuls(
        self, x: jax.Array, weights: Sequence[QuantizedMatrix], index: tuple[jax.Array | int, ...]
    ) -> list[jax.Array]:
        """`matmul` with several stacks, each with its own N, in one kernel where possible."""
        self.check_layout(*weights)
        return [multiply(x, weight, index) for weight in weights]

    def grouped_matmuls(
        self, x: jax.Array, weights: Sequence[QuantizedMatrix], layer: jax.Array | int, blocks: ExpertBlocks
    ) -> list[jax.Array]:
        """Each block's rows times the matrix of the block's expert, for several stacks.

        Args:
            x: float `[slots, K]`, rows in blocks.
            weights: stacks `[layers, experts, K, N]`, each with its own N.
            layer: which layer; may be traced.
            blocks: the blocks of `x`.

        Returns:
            float32 `[slots, N]` for each stack; unused blocks are undefined.
        """
        return [grouped_multiply(x, weight, layer, blocks) for weight in weights]

    def gated_experts(
        self,
        x: jax.Array,
        gate: QuantizedMatrix,
        value: QuantizedMatrix,
        project: QuantizedMatrix,
        layer: jax.Array | int,
        experts: jax.Array,
        factors: jax.Array,
    ) -> jax.Array:
        """`(gelu(x @ gate) * (x @ value)) @ project` with the matrices of each row's experts (Shazeer, 2020), summed.

        GELU is the tanh approximation. Between the two products activations have the dtype of `x`.

        Args:
            x: float `[rows, K]`.
            gate: a stack `[layers, experts, K, F]`.
            value: another.
            project: a stack `[layers, experts, F, N]`.
            layer: which layer; may be traced.
            experts: int32 `[rows, selected]`; the number of experts sends a row nowhere, which gives 0.
            factors: float32 `[rows, selected]`, what each expert's output is multiplied by.

        Returns:
            float32 `[rows, N]`.
        """
        self.check_layout(gate, value, project)
        blocks = group_by_expert(experts.reshape(-1), gate.shape[1], self.block_rows)
        inputs = scatter_rows(jnp.repeat(x, experts.shape[1], axis=0), blocks)
        hidden = gated(*self.grouped_matmuls(inputs, [gate, value], layer, blocks)).astype(x.dtype)
        (outputs,) = self.grouped_matmuls(hidden, [project], layer, blocks)
        return weighted_sum(gather_rows(outputs, blocks), factors)


XLA = Kernels()

CPU_LIMITS = {"max_chunk": 512, "min_lanes": 2}
"""Limits of any kernels on a CPU, where a step takes about as long for an unused lane as for a used one."""
