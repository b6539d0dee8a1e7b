"""The network's operations in plain JAX, which are also the interface of each platform's kernels."""

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
    """The operations that take most of a model's time, and the limits of the steps that use them.

    This class is plain JAX compiled by XLA and runs on every platform; the kernels of a platform override its methods.
    The `reference_*` functions in `grok1.ops` define each operation.

    Attributes:
        max_chunk: maximum number of tokens in a prefill chunk. With 2048 tokens, 256 per expert, an accelerator is
            limited by computation rather than by reading weights.
        min_lanes: minimum number of lanes of a step with several prefill chunks. Accelerators read all weights in every
            step, and 256 tokens take them as long as a few.
        backend: "xla", or the platform that the kernels are written for.
        block_rows: minimum and maximum number of rows per block of an expert.
        keeps_cache_layout: whether the compiler must be forced to preserve the layout of the KV cache.
        attention: attention over the KV cache, as `grok1.ops.xla.attention.attend`.
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
        """Displayed name, such as "amx-int8", "triton", "mosaic" or "xla"."""
        return "xla"

    @property
    def pack_box(self) -> Callable[[np.ndarray, np.ndarray, int, int, int, int], None] | None:
        """The function that packs a box of a matrix into panels; None if the kernels read unpacked matrices."""
        return None

    @property
    def packs_weights(self) -> bool:
        """Whether the kernels read packed matrices."""
        return self.pack_box is not None

    def why_not_on(self, device: jax.Device) -> str | None:
        """Return why the kernels cannot run on a device, or None if they can."""
        return None

    def why_not_for(self, config: ModelConfig, shards: int) -> str | None:
        """Return why the kernels cannot run a model split into `shards` model shards, or None if they can."""
        return None

    def set_threads(self, count: int) -> None:
        """Set the number of CPU threads of the kernels, for all devices of the process."""

    def check_layout(self, *weights: QuantizedMatrix) -> None:
        """Raise TypeError if a matrix has a layout that the kernels do not read."""
        if any((weight.layout is not None) != self.packs_weights for weight in weights):
            raise TypeError(f"{self.name} kernels need {'packed' if self.packs_weights else 'unpacked'} matrices")

    def matmul(self, x: jax.Array, weight: QuantizedMatrix, index: tuple[jax.Array | int, ...]) -> jax.Array:
        """Return `x @ weight[index]`, accumulated in float32.

        The argument is the entire stack, so that no matrix is copied out of it.

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
        """Compute `matmul` for several stacks, each with its own N, in one kernel where possible."""
        self.check_layout(*weights)
        return [multiply(x, weight, index) for weight in weights]

    def grouped_matmuls(
        self, x: jax.Array, weights: Sequence[QuantizedMatrix], layer: jax.Array | int, blocks: ExpertBlocks
    ) -> list[jax.Array]:
        """Multiply the rows of each block by the matrix of its expert, for several stacks.

        Args:
            x: float `[slots, K]`, rows in blocks.
            weights: stacks `[layers, experts, K, N]`, each with its own N.
            layer: index of the layer; may be traced.
            blocks: the blocks of `x`.

        Returns:
            float32 `[slots, N]` for each stack; rows of unused blocks are undefined.
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
        """Return `(gelu(x @ gate) * (x @ value)) @ project` (Shazeer, 2020), summed over each row's experts.

        GELU is the tanh approximation. Activations between the products have the dtype of `x`.

        Args:
            x: float `[rows, K]`.
            gate: a stack `[layers, experts, K, F]`.
            value: a stack `[layers, experts, K, F]`.
            project: a stack `[layers, experts, F, N]`.
            layer: index of the layer; may be traced.
            experts: int32 `[rows, selected]`; an index equal to the number of experts contributes 0.
            factors: float32 `[rows, selected]`, by which the outputs are multiplied.

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
"""Limits of all kernels on CPUs, where an unused lane takes about as long as a used one."""
