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
    chosen = _chosen(kernels)
    reason = _why_not_native(mesh.devices.flat[0].platform) or _why_not_packed(config)
    if chosen == "native" and reason is not None:
        raise KernelsError(f"the native kernels cannot be used, as {reason}")
    return reason is None and _prefers_native(chosen)


def kernels_in_use(platform: str, kernels: KernelsName = "auto") -> str:
    """The name of the kernels that models run on there, such as "amx-int8", or "xla".

    Args:
        platform: of the devices.
        kernels: what is asked for.

    Raises:
        KernelsError: if the environment variable names none.
    """
    native = _prefers_native(_chosen(kernels)) and _why_not_native(platform) is None
    return (cpu.kernel_name() if native else None) or "xla"


def _chosen(kernels: KernelsName) -> KernelsName:
    return _from_environment() if kernels == "auto" else kernels


def _prefers_native(chosen: KernelsName) -> bool:
    """Whether native kernels that can be had are to run; portable ones make less of a processor than XLA does."""
    return chosen == "native" or (chosen == "auto" and cpu.kernel_name() != "portable")


def _from_environment() -> KernelsName:
    named = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if named not in get_args(KernelsName):
        choices = ", ".join(get_args(KernelsName))
        raise KernelsError(
            f"{ENVIRONMENT_VARIABLE} is {named!r}, expected one of {choices}: set it to one, or unset it"
        )
    return cast(KernelsName, named)


def _why_not_native(platform: str) -> str | None:
    if platform != "cpu":
        return f"they are for processors and the devices are of the platform {platform}: use --kernels auto"
    if not cpu.kernel_names():
        return f"none were built: {HOW_TO_BUILD}, or use --kernels auto"
    return None


def _why_not_packed(config: ModelConfig) -> str | None:
    rows = max(leaf.scale_groups(leaf.file_shape[-2])[1] for leaf in stored_leaves(config, packed=True) if leaf.packed)
    if rows > MOST_GROUP_ROWS:
        return f"a scale group has {rows:,} rows and they take {MOST_GROUP_ROWS:,} at most: use --kernels auto"
    return None
