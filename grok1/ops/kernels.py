"""Selects the kernels that a model runs on: those of its platform, or plain JAX compiled by XLA."""

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
"""Names the kernels that "auto" selects."""

_NATIVE: dict[str, Kernels] = {"cpu": CPU, "gpu": GPU, "tpu": TPU}


@dataclasses.dataclass(frozen=True)
class ChosenKernels:
    """The selected kernels.

    Attributes:
        kernels: the kernels.
        fallback: why "auto" selected XLA although the platform has kernels of its own; otherwise None.
    """

    kernels: Kernels
    fallback: str | None = None

    @property
    def name(self) -> str:
        """Name for users, such as "amx-int8", "triton", "mosaic" or "xla"."""
        return self.kernels.name

    @property
    def native(self) -> bool:
        """Whether they are the platform's own kernels."""
        return self.kernels.backend != "xla"


def xla_kernels(platform: str) -> Kernels:
    """Plain JAX, with the limits of a platform."""
    return Kernels(**CPU_LIMITS) if platform == "cpu" else XLA


def kernels_without_packing(platform: str) -> Kernels:
    """A platform's own kernels if they read weights in the release's order, otherwise plain JAX; no device is tried."""
    native = _NATIVE.get(platform)
    return xla_kernels(platform) if native is None or native.packs_weights else native


def choose_kernels(config: ModelConfig, mesh: Mesh, kernels: KernelsName = "auto") -> ChosenKernels:
    """Selects the kernels for a model.

    Args:
        config: the model.
        mesh: the devices it is to run on.
        kernels: the user's choice; "auto" takes what the environment variable GROK1_KERNELS names, and without one the
            platform's own if they are available.

    Raises:
        KernelsError: if the platform's own were requested and are not available, or the variable has an invalid value.
    """
    device = mesh.devices.flat[0]
    if jax.process_count() > 1:  # this process cannot try anything on the devices of another
        device = (local_devices(mesh.devices.flat) or jax.local_devices())[0]
    return _choose(device, kernels, (config, mesh.shape[MODEL_AXIS]))


def kernels_in_use(device: jax.Device, kernels: KernelsName = "auto") -> ChosenKernels:
    """Selects the kernels on a device for models that they support.

    Args:
        device: an available device.
        kernels: the user's choice.

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
        reason: str | None = f"there are none for devices of the platform {device.platform}"
    else:
        reason = native.why_not_on(device) or (native.why_not_for(*model) if model is not None else None)
    if native is not None and reason is None:
        # XLA is faster on a CPU than the portable kernels.
        return ChosenKernels(xla if chosen == "auto" and native.name == "portable" else native)
    if chosen == "native":
        raise KernelsError(f"the native kernels cannot be used, as {reason}: use --kernels auto")
    return ChosenKernels(xla, reason)


def _from_environment() -> KernelsName:
    named = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if named not in get_args(KernelsName):
        choices = ", ".join(get_args(KernelsName))
        raise KernelsError(
            f"{ENVIRONMENT_VARIABLE} is {named!r}, expected one of {choices}: set it to one, or unset it"
        )
    return cast(KernelsName, named)
