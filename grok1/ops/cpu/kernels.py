"""CPU kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from grok1.config import ModelConfig
from grok1.ops.cpu import library
from grok1.ops.experts import weighted_sum
from grok1.ops.xla.kernels import CPU_LIMITS, Kernels
from grok1.params.table import parameter_table
from grok1.params.weights import MAX_GROUP_ROWS, QuantizedMatrix

_FEW_ROWS = 16  # up to this many, XLA, with one thread, is slower than memory in computing logits


class CPUKernels(Kernels):
    """The native kernels in `library`, which read packed matrices."""

    backend: ClassVar[str] = "cpu"
    set_threads = staticmethod(library.set_threads)
    attention = staticmethod(library.attention)

    @property
    def name(self) -> str:
        return library.kernel_name() or "xla"

    @property
    def pack_box(self) -> Callable[[np.ndarray, np.ndarray, int, int, int, int], None]:
        return library.pack_box

    def why_not_on(self, device: jax.Device) -> str | None:
        return library.why_not()

    def why_not_for(self, config: ModelConfig, shards: int) -> str | None:
        rows = max(spec.shape[-2] // spec.groups for spec in parameter_table(config) if spec.groups)
        if rows <= MAX_GROUP_ROWS:
            return None
        return f"a scale group has {rows:,} rows and they support at most {MAX_GROUP_ROWS:,}"

    def matmuls(
        self, x: jax.Array, weights: Sequence[QuantizedMatrix], index: tuple[jax.Array | int, ...]
    ) -> list[jax.Array]:
        self.check_layout(*weights)
        return [
            library.multiply(x, weight, jnp.full(x.shape[:1], library.index_in_stack(weight, index)))
            for weight in weights
        ]

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
        self.check_layout(gate, value, project)
        num_experts = gate.shape[1]
        chosen = experts.reshape(-1)
        index = jnp.where(chosen < num_experts, layer * num_experts + chosen, -1)
        hidden = library.multiply_gated(x, gate, value, index).astype(x.dtype)
        return weighted_sum(library.multiply(hidden, project, index), factors)

    def output_logits(self, x: jax.Array, embeddings: jax.Array) -> jax.Array:
        if x.shape[0] <= _FEW_ROWS:
            return library.multiply_transposed(x, embeddings)
        return super().output_logits(x, embeddings)


KERNELS = CPUKernels(**CPU_LIMITS)
