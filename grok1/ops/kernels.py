"""Selection of kernels: those written for the platform, or plain JAX compiled by XLA."""

from __future__ import annotations

import dataclasses
import os
from typing import cast, get_args

import jax
from jax.sharding import Mesh

from grok1.config import KernelsName, ModelConfig
from grok1.errors import KernelsError
from grok1.ops.cpu.kernels import KERNELS as CPU
from grok1.ops.gpu.kernels import KERNELS as GPU
from grok1.ops.tpu.kernels import KERNELS as TPU
from grok1.ops.xla.kernels import CPU_LIMITS, XLA, Kernels
from grok1.params.sharding import MODEL_AXIS, local_devices

ENVIRONMENT_VARIABLE = "GROK1_KERNELS"
"""Environment variable that overrides "auto"."""

_NATIVE: dict[str, Kernels] = {"cpu": CPU, "gpu": GPU, "tpu": TPU}


@dataclasses.dataclass(frozen=True)
class ChosenKernels:
    """The selected kernels.

    Attributes:
        kernels: the kernels.
        fallback: the reason if "auto" selected XLA because native kernels cannot be used; otherwise None.
    """

    kernels: Kernels
    fallback: str | None = None

    @property
    def name(self) -> str:
        """Displayed name, such as "amx-int8", "triton", "mosaic" or "xla"."""
        return self.kernels.name

    @property
    def native(self) -> bool:
        """Whether the kernels are written for the platform."""
        return self.kernels.backend != "xla"


def xla_kernels(platform: str) -> Kernels:
    """Return the kernels in plain JAX, with the limits of a platform."""
    return Kernels(**CPU_LIMITS) if platform == "cpu" else XLA


def kernels_without_packing(platform: str) -> Kernels:
    """Return a platform's native kernels if they read unpacked weights, otherwise plain JAX; no device is used."""
    native = _NATIVE.get(platform)
    return xla_kernels(platform) if native is None or native.packs_weights else native


def choose_kernels(config: ModelConfig, mesh: Mesh, kernels: KernelsName = "auto") -> ChosenKernels:
    """Select the kernels for a model.

    Args:
        config: the model.
        mesh: the devices.
        kernels: the requested kernels; "auto" uses the environment variable GROK1_KERNELS if it is set, otherwise
            native kernels if available.

    Raises:
        KernelsError: if native kernels are requested and not available, or the variable is invalid.
    """
    device = mesh.devices.flat[0]
    if jax.process_count() > 1:  # a process cannot run tests on devices of another
        device = (local_devices(mesh.devices.flat) or jax.local_devices())[0]
    return _choose(device, kernels, (config, mesh.shape[MODEL_AXIS]))


def kernels_in_use(device: jax.Device, kernels: KernelsName = "auto") -> ChosenKernels:
    """Select the kernels on a device for a model that they support.

    Raises:
        KernelsError: as `choose_kernels`.
    """
    return _choose(device, kernels, None)


def _choose(device: jax.Device, kernels: KernelsName, model: tuple[ModelConfig, int] | None) -> ChosenKernels:
    chosen = _from_environment() if kernels == "auto" else kernels
    xla = xla_kernels(device.platform)
    if chosen == "xla":
        return ChosenKernels(xla)
    native = _NATIVE.get(device.platform)
    if native is None:
        reason: str | None = f"there are none for the platform {device.platform}"
    else:
        reason = native.why_not_on(device) or (native.why_not_for(*model) if model is not None else None)
    if native is not None and reason is None:
        # XLA is faster on a CPU than the portable kernels.
        return ChosenKernels(xla if chosen == "auto" and native.name == "portable" else native)
    if chosen == "native":
        raise KernelsError(f"native kernels are not available: {reason}; use --kernels auto")
    return ChosenKernels(xla, reason)


def _from_environment() -> KernelsName:
    named = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if named not in get_args(KernelsName):
        choices = ", ".join(get_args(KernelsName))
        raise KernelsError(f'invalid value "{named}" of {ENVIRONMENT_VARIABLE}: expected one of {choices}')
    return cast(KernelsName, named)
