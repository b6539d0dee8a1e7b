"""Which kernels a model runs on: those of its platform, or what XLA makes of plain JAX."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import cast, get_args

import jax
from jax.sharding import Mesh

from grok1.config import KernelsName, ModelConfig
from grok1.errors import KernelsError
from grok1.ops.backend import Backend
from grok1.ops.cpu import kernels as cpu
from grok1.ops.gpu import kernels as gpu
from grok1.params.sharding import MODEL_AXIS, local_devices
from grok1.params.table import parameter_table
from grok1.params.tree import parameter_arrays
from grok1.params.weights import MAX_GROUP_ROWS

ENVIRONMENT_VARIABLE = "GROK1_KERNELS"
"""Names the kernels that "auto" stands for."""

HOW_TO_BUILD = "install a C++ compiler such as g++ and install grok1 again"

_BACKENDS: dict[str, Backend] = {"cpu": "cpu", "gpu": "gpu", "tpu": "tpu"}


@dataclasses.dataclass(frozen=True)
class ChosenKernels:
    """What computes.

    Attributes:
        backend: where the operations find it.
        fallback: why it is XLA where "auto" would have taken the platform's kernels; None if it did, or XLA was asked
            for.
    """

    backend: Backend
    fallback: str | None = None

    @property
    def name(self) -> str:
        """What users are told, such as "amx-int8", "triton", "mosaic" or "xla"."""
        names = {"cpu": cpu.kernel_name() or "xla", "gpu": "triton", "tpu": "mosaic", "xla": "xla"}
        return names[self.backend]


def choose_kernels(config: ModelConfig, mesh: Mesh, kernels: KernelsName = "auto") -> ChosenKernels:
    """What computes for a model, whose weights are packed if it is the kernels for processors.

    Args:
        config: the model.
        mesh: where it is to run.
        kernels: what was asked for; "auto" takes what the environment variable GROK1_KERNELS names, and without one the
            platform's own where they can be had.

    Raises:
        KernelsError: if the platform's own were asked for and cannot be had, or the variable names none.
    """
    device = mesh.devices.flat[0]
    if jax.process_count() > 1:  # this process can try nothing on the devices of another
        device = (local_devices(mesh.devices.flat) or jax.local_devices())[0]
    return _choose(device, kernels, _why_not_for(config, mesh.shape[MODEL_AXIS], device.platform))


def kernels_in_use(device: jax.Device, kernels: KernelsName = "auto") -> ChosenKernels:
    """What computes on a device, for models that fit its kernels.

    Args:
        device: one of those that there are.
        kernels: what is asked for.

    Raises:
        KernelsError: as `choose_kernels`.
    """
    return _choose(device, kernels, None)


def _choose(device: jax.Device, kernels: KernelsName, why_not_model: str | None) -> ChosenKernels:
    chosen = _from_environment() if kernels == "auto" else kernels
    if chosen == "xla":
        return ChosenKernels("xla")
    reason = _why_not_on(device) or why_not_model
    if reason is None and chosen == "auto" and device.platform == "cpu" and cpu.kernel_name() == "portable":
        return ChosenKernels("xla")  # which makes more of a processor than the portable ones do
    if reason is None:
        return ChosenKernels(_BACKENDS[device.platform])
    if chosen == "native":
        raise KernelsError(f"the native kernels cannot be used, as {reason}: use --kernels auto")
    return ChosenKernels("xla", reason)


def _from_environment() -> KernelsName:
    named = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if named not in get_args(KernelsName):
        choices = ", ".join(get_args(KernelsName))
        raise KernelsError(
            f"{ENVIRONMENT_VARIABLE} is {named!r}, expected one of {choices}: set it to one, or unset it"
        )
    return cast(KernelsName, named)


def _why_not_on(device: jax.Device) -> str | None:
    """Why a device's kernels cannot be had."""
    if device.platform == "cpu":
        return None if cpu.kernel_names() else f"no kernels for this processor were built ({HOW_TO_BUILD})"
    if device.platform == "gpu":
        return gpu.why_not(device)
    if device.platform == "tpu":
        return None
    return f"there are none for devices of the platform {device.platform}"


def _why_not_for(config: ModelConfig, shards: int, platform: str) -> str | None:
    """Why a model does not fit the kernels of a platform."""
    if platform == "cpu":
        rows = max(spec.shape[-2] // spec.groups for spec in parameter_table(config) if spec.groups)
        if rows > MAX_GROUP_ROWS:
            return f"a scale group has {rows:,} rows and they take {MAX_GROUP_ROWS:,} at most"
    if platform == "gpu":
        for array in parameter_arrays(config):
            size = math.prod(array.local_shape(shards))
            if array.spec.groups and not array.scales and not gpu.can_address(size):
                return f"a stack of {size:,} bytes, such as {array.spec.module}, has a size that they cannot address"
    return None
