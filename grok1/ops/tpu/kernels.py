"""TPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from grok1.ops.accelerator import AcceleratorKernels
from grok1.ops.tpu.matmul import MAX_ROWS, MIN_ROWS, can_multiply, multiply
from grok1.ops.xla import matmul as xla
from grok1.params.weights import QuantizedMatrix


class TPUKernels(AcceleratorKernels):
    """Mosaic kernels for matrices that divide into tiles; XLA computes everything else."""

    backend: ClassVar[str] = "tpu"
    block_rows: ClassVar[tuple[int, int]] = MIN_ROWS, MAX_ROWS
    # The compiler would choose another layout for writing, and copy the entire cache to it and back.
    keeps_cache_layout: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "mosaic"

    def block_products(
        self,
        x: jax.Array,
        weights: Sequence[QuantizedMatrix],
        layer: jax.Array | int,
        expert: jax.Array,
        active: jax.Array,
    ) -> list[jax.Array]:
        return [
            (multiply if can_multiply(weight) else _multiply_by_xla)(x, weight, layer, expert, active)
            for weight in weights
        ]


def _multiply_by_xla(
    x: jax.Array, weight: QuantizedMatrix, layer: jax.Array | int, expert: jax.Array, active: jax.Array
) -> jax.Array:
    def one_block(i: jax.Array, y: jax.Array) -> jax.Array:
        rows = x[0] if x.shape[0] == 1 else x[i]
        return lax.cond(active[i], lambda: y.at[i].set(xla.multiply(rows, weight, (layer, expert[i]))), lambda: y)

    blocks = expert.shape[0]
    return lax.fori_loop(0, blocks, one_block, jnp.zeros((blocks, x.shape[1], weight.shape[-1]), jnp.float32))


KERNELS = TPUKernels()
