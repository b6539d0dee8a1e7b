"""GPU kernels."""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from grok1.config import ModelConfig
from grok1.ops.accelerator import AcceleratorKernels
from grok1.ops.gpu.attention import attend
from grok1.ops.gpu.matmul import MAX_ROWS, multiply
from grok1.ops.gpu.tiles import MIN_ROWS
from grok1.params.tree import parameter_arrays
from grok1.params.weights import QuantizedMatrix

_MIN_CAPABILITY = 8.0
_TRIAL_ERROR = 0.02  # bfloat16 weights of attention have a rounding error of 1/256


def can_address(elements: int) -> bool:
    """Return whether the kernels can address every element of an int8 array.

    Pallas uses 64-bit offsets in arrays of more than 2**32 bytes and signed 32-bit offsets in smaller ones.
    """
    return elements <= 1 << 31 or elements > 1 << 32


@functools.cache
def why_not(device: jax.Device) -> str | None:
    """Return why the kernels cannot run on a GPU, or None if they run and give correct results.

    Compiles and runs two small kernels, which takes seconds if they are not in the compilation cache.
    """
    try:
        from jax.experimental.pallas import triton  # noqa: F401
    except ImportError:
        return f"JAX {jax.__version__} has no Pallas for Triton"
    capability = str(getattr(device, "compute_capability", ""))
    if capability.replace(".", "").isdigit() and float(capability) < _MIN_CAPABILITY:
        return f"{device.device_kind} has compute capability {capability}, and {_MIN_CAPABILITY} is needed for bfloat16"
    try:
        with jax.default_device(device):
            error = float(jax.jit(lambda: _trial())())
    except Exception as failure:
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200].rstrip(". ")
        return f"they fail on {device.device_kind} ({reason})"
    return (
        None
        if error < _TRIAL_ERROR
        else f"they give wrong results on {device.device_kind} (relative error {error:.1e})"
    )


def _trial() -> jax.Array:
    """Return the relative error of the kernels on small operands, compared with plain JAX."""
    size = 128
    ramp = jnp.arange(size * size, dtype=jnp.int32).reshape(size, size)
    weight = QuantizedMatrix((ramp % 251 - 125).astype(jnp.int8)[None, None], jnp.ones((1, 1, 1, size), jnp.bfloat16))
    x = (ramp[:MIN_ROWS] % 17 - 8).astype(jnp.bfloat16)
    product = multiply(x[None], [weight], 0, jnp.zeros(1, jnp.int32), jnp.ones(1, bool))[0][0]
    plain = jnp.dot(x.astype(jnp.float32), weight.values[0, 0].astype(jnp.float32), precision="highest")
    cache = jnp.sin(ramp.astype(jnp.float32)).astype(jnp.bfloat16)[None, None, None]
    query = jnp.ones((1, 1, 1, size), jnp.float32)
    attended = attend(query, cache, cache, 0, jnp.full((1, 1), size - 1), None, multiplier=0.1, cap=30.0)
    logits = 30 * jnp.tanh(jnp.sum(cache[0, 0, 0].astype(jnp.float32), axis=1) * (0.1 / 30))
    mean = jnp.dot(jax.nn.softmax(logits), cache[0, 0, 0].astype(jnp.float32), precision="highest")

    def error(found: jax.Array, expected: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected))

    return jnp.maximum(error(product, plain), error(attended.reshape(-1), mean))


class GPUKernels(AcceleratorKernels):
    """Triton kernels; XLA computes logits."""

    backend: ClassVar[str] = "gpu"
    block_rows: ClassVar[tuple[int, int]] = MIN_ROWS, MAX_ROWS
    block_products = staticmethod(multiply)
    attention = staticmethod(attend)

    @property
    def name(self) -> str:
        return "triton"

    def why_not_on(self, device: jax.Device) -> str | None:
        return why_not(device)

    def why_not_for(self, config: ModelConfig, shards: int) -> str | None:
        for array in parameter_arrays(config):
            size = math.prod(array.local_shape(shards))
            if array.spec.groups and not array.scales and not can_address(size):
                return f"they cannot address a stack of {size:,} bytes, such as {array.spec.module}"
        return None


KERNELS = GPUKernels()
