"""Which kernels a model runs on: the native ones for processors, or what XLA makes of plain JAX."""

from __future__ import annotations

import os
from typing import cast, get_args

from jax.sharding import Mesh

from grok1.checkpoint.parameters import stored_leaves
from grok1.config import KernelsName, ModelConfig
from grok1.errors import KernelsError
from grok1.ops import cpu
from grok1.quantize import MOST_GROUP_ROWS

ENVIRONMENT_VARIABLE = "GROK1_KERNELS"
"""Names the kernels that "auto" stands for."""

HOW_TO_BUILD = "install a C++ compiler such as g++ and install grok1 again"


def use_native_kernels(config: ModelConfig, mesh: Mesh, kernels: KernelsName = "auto") -> bool:
    """Whether a model is to run on the kernels for processors, for which its weights are packed.

    Args:
        config: the model.
        mesh: where it is to run.
        kernels: what was asked for; "auto" takes what the environment variable GROK1_KERNELS names, and without one the
            native ones where they can be had.

    Raises:
        KernelsError: if the native ones were asked for and cannot be had, or the variable names none.
    """
    if kernels == "auto":
        kernels = _from_environment()
    reason = _why_not_native(config, mesh)
    if kernels == "native" and reason is not None:
        raise KernelsError(f"the native kernels cannot be used, as {reason}")
    if kernels == "auto" and cpu.kernel_name() == "portable":
        return False  # XLA makes better use of a processor that no other kernels are made for
    return kernels != "xla" and reason is None


def kernels_in_use(platform: str, kernels: KernelsName = "auto") -> str:
    """The name of the kernels that a model would run on there, such as "amx-int8", or "xla".

    Args:
        platform: of the devices.
        kernels: what is asked for.

    Raises:
        KernelsError: as `use_native_kernels`.
    """
    chosen = _from_environment() if kernels == "auto" else kernels
    name = cpu.kernel_name() if platform == "cpu" else None
    return "xla" if chosen == "xla" or name is None or (chosen == "auto" and name == "portable") else name


def _from_environment() -> KernelsName:
    named = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if named not in get_args(KernelsName):
        choices = ", ".join(get_args(KernelsName))
        raise KernelsError(
            f"{ENVIRONMENT_VARIABLE} is {named!r}, expected one of {choices}: set it to one, or unset it"
        )
    return cast(KernelsName, named)


def _why_not_native(config: ModelConfig, mesh: Mesh) -> str | None:
    platform = mesh.devices.flat[0].platform
    if platform != "cpu":
        return f"they are for processors and the devices are of the platform {platform}: use --kernels auto"
    if not cpu.kernel_names():
        return f"none were built: {HOW_TO_BUILD}, or use --kernels auto"
    rows = max(leaf.scale_groups(leaf.file_shape[-2])[1] for leaf in stored_leaves(config, packed=True) if leaf.packed)
    if rows > MOST_GROUP_ROWS:
        return f"a scale group has {rows:,} rows and they take {MOST_GROUP_ROWS:,} at most: use --kernels auto"
    return None
