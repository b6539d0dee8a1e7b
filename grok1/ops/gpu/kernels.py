"""The kernels of GPUs."""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from grok1.config import ModelConfig
from grok1.ops.accelerator import AcceleratorKernels
from grok1.ops.gpu.attention import attend
from grok1.ops.gpu.matmul import MOST_ROWS, multiply
from grok1.ops.gpu.tiles import LEAST_ROWS
from grok1.params.tree import parameter_arrays
from grok1.params.weights import QuantizedMatrix

_LEAST_CAPABILITY = 8.0
_TRIAL_ERROR = 0.02  # bfloat16 weights of attention are rounded by 1/256


def can_address(elements: int) -> bool:
    """Whether the kernels can address every element of an int8 array.

    Pallas counts with 64 bits in arrays beyond 2**32 bytes and with 32 bits, signed, in all others.
    """
    return elements <= 1 << 31 or elements > 1 << 32


@functools.cache
def why_not(device: jax.Device) -> str | None:
    """Why the kernels cannot run on a GPU; None if they run there and give correct results.

    Compiles and runs two small ones, which takes seconds on a GPU that is not in the compilation cache.
    """
    try:
        from jax.experimental.pallas import triton  # noqa: F401
    except ImportError:
        return f"JAX {jax.__version__} has no Pallas for Triton"
    capability = str(getattr(device, "compute_capability", ""))
    if capability.replace(".", "").isdigit() and float(capability) < _LEAST_CAPABILITY:
        return (
            f"{device.device_kind} has compute capability {capability} and they need {_LEAST_CAPABILITY} for bfloat16"
        )
    try:
        with jax.default_device(device):
            error = float(jax.jit(lambda: _trial())())
    except Exception as failure:
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200].rstrip(". ")
        return f"{device.device_kind} does not run them ({reason})"
    return None if error < _TRIAL_ERROR else f"{device.device_kind} computes them wrongly, by {error:.1e} of the whole"


def _trial() -> jax.Array:
    """How far the kernels are from plain JAX on small operands, as a part of the result's size."""
    size = 128
    ramp = jnp.arange(size * size, dtype=jnp.int32).reshape(size, size)
    weight = QuantizedMatrix((ramp % 251 - 125).astype(jnp.int8)[None, None], jnp.ones((1, 1, 1, size), jnp.bfloat16))
    x = (ramp[:LEAST_ROWS] % 17 - 8).astype(jnp.bfloat16)
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
    """Triton kernels; logits are left to XLA."""

    backend: ClassVar[str] = "gpu"
    block_rows: ClassVar[tuple[int, int]] = LEAST_ROWS, MOST_ROWS
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
                return f"a stack of {size:,} bytes, such as {array.spec.module}, has a size that they cannot address"
        return None


KERNELS = GPUKernels()
