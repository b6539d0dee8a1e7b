"""Specifications of devices, and detection of available ones. Importing this does not import JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from grok1.config import DTypeName, default_dtype
from grok1.errors import DeviceKindError
from grok1.host import memory

GPU_MEMORY_FRACTION = 0.92
"""Fraction of a GPU's memory that JAX may use; the rest is for the driver, collectives and kernels."""

_USABLE = {"gpu": GPU_MEMORY_FRACTION, "tpu": 0.97, "cpu": 0.95}


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """A kind of device and its vendor's specifications; None where unknown.

    Attributes:
        name: as `--device` takes it.
        platform: "gpu", "tpu" or "cpu".
        memory_bytes: memory of one device; of the machine for a CPU.
        bandwidth: memory bandwidth in bytes per second.
        flops: dense operations per second in the default dtype of activations: float32 on CPUs, otherwise bfloat16.
        jax_name: lower-case substring of JAX's name of such a device.
    """

    name: str
    platform: str
    memory_bytes: int | None
    bandwidth: float | None
    flops: float | None
    jax_name: str | None = None

    @property
    def dtype(self) -> DTypeName:
        """Default dtype of activations and of the KV cache."""
        return default_dtype(self.platform)

    @property
    def shares_memory(self) -> bool:
        """Whether all devices of a machine share one memory and its bandwidth."""
        return self.platform == "cpu"


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices of one kind.

    Attributes:
        kind: kind of the devices.
        count: number of devices.
        usable_bytes: usable memory per device, or of the machine if they share it; None if unknown.
    """

    kind: DeviceKind
    count: int
    usable_bytes: int | None


_GB, _TB, _TFLOPS = 10**9, 10**12, 10**12

# A gigabyte is 10^9 bytes throughout. GPUs have slightly more memory than their names say.
DEVICE_KINDS = {
    kind.name: kind
    for kind in (
        # NVIDIA A100 data sheet, 80GB SXM: 2,039 GB/s, bfloat16 tensor core 312 TFLOPS
        DeviceKind("a100-80gb", "gpu", 80 * _GB, 2039 * _GB, 312 * _TFLOPS, "a100-sxm4-80gb"),
        # NVIDIA A100 data sheet, 40GB SXM: 1,555 GB/s
        DeviceKind("a100-40gb", "gpu", 40 * _GB, 1555 * _GB, 312 * _TFLOPS, "a100-sxm4-40gb"),
        # NVIDIA H100 data sheet, SXM: 80 GB, 3.35 TB/s, 1,979 TFLOPS with sparsity, half of it without
        DeviceKind("h100-80gb", "gpu", 80 * _GB, 3.35 * _TB, 989.5 * _TFLOPS, "h100 80gb hbm3"),
        # Same as the H100 except for links between devices and float64
        DeviceKind("h800-80gb", "gpu", 80 * _GB, 3.35 * _TB, 989.5 * _TFLOPS, "h800"),
        # NVIDIA H200 data sheet, SXM: 141 GB, 4.8 TB/s, 1,979 TFLOPS with sparsity
        DeviceKind("h200", "gpu", 141 * _GB, 4.8 * _TB, 989.5 * _TFLOPS, "h200"),
        # One eighth of the NVIDIA DGX B200 data sheet: 1,440 GB, 64 TB/s, 36 PFLOPS bfloat16 with sparsity
        DeviceKind("b200", "gpu", 180 * _GB, 8.0 * _TB, 2250 * _TFLOPS, "b200"),
        # AMD Instinct MI300X data sheet: 192 GB, 5.3 TB/s, bfloat16 1,307.4 TFLOPS
        DeviceKind("mi300x", "gpu", 192 * _GB, 5.3 * _TB, 1307.4 * _TFLOPS, "mi300x"),
        # cloud.google.com/tpu/docs/v4, per chip: 32 GiB, 1,200 GB/s, 275 TFLOPS
        DeviceKind("tpu-v4", "tpu", 32 * _GB, 1200 * _GB, 275 * _TFLOPS, "tpu v4"),
        # cloud.google.com/tpu/docs/v5e, per chip: 16 GB, 819 GB/s, 197 TFLOPS
        DeviceKind("tpu-v5e", "tpu", 16 * _GB, 819 * _GB, 197 * _TFLOPS, "tpu v5 lite"),
        # cloud.google.com/tpu/docs/v5p, per chip: 95 GB, 2,765 GB/s, 459 TFLOPS
        DeviceKind("tpu-v5p", "tpu", 95 * _GB, 2765 * _GB, 459 * _TFLOPS, "tpu v5"),
        # cloud.google.com/tpu/docs/v6e, per chip: 32 GB, 1,638 GB/s, 918 TFLOPS
        DeviceKind("tpu-v6e", "tpu", 32 * _GB, 1638 * _GB, 918 * _TFLOPS, "tpu v6 lite"),
        # ark.intel.com, Xeon Gold 6338: 8 channels of DDR4-3200 (204.8 GB/s), 32 cores at 2.0 GHz with two 512-bit FMA
        # units, 4.1 TFLOPS float32. Only a typical server: CPUs differ by more than a factor of ten.
        DeviceKind("cpu", "cpu", None, 204.8 * _GB, 4.1 * _TFLOPS),
    )
}
"""The kinds of device that `--device` accepts."""


def named_devices(name: str, count: int, memory_bytes: int | None = None) -> Devices:
    """Describe devices that need not be present.

    Args:
        name: a name of `DEVICE_KINDS`.
        count: number of devices.
        memory_bytes: memory per device, or of the machine for a CPU; by default that of the kind, or of this machine
            for a CPU.

    Raises:
        DeviceKindError: if the name or the memory of this machine is unknown.
    """
    kind = DEVICE_KINDS.get(name.lower())
    if kind is None:
        raise DeviceKindError(f'unknown device kind "{name}", expected one of {", ".join(DEVICE_KINDS)}')
    total = memory_bytes or kind.memory_bytes or memory.total_bytes()
    if total is None:
        raise DeviceKindError("cannot determine the memory of this machine; specify it with --memory, such as 512GB")
    return Devices(dataclasses.replace(kind, memory_bytes=total), count, int(total * _USABLE[kind.platform]))


def present_devices(devices: Sequence[Any]) -> Devices:
    """Describe JAX devices of one kind and their free memory."""
    first = devices[0]
    if first.platform == "cpu":
        kind = dataclasses.replace(DEVICE_KINDS["cpu"], memory_bytes=memory.total_bytes())
        return Devices(kind, len(devices), memory.available_bytes())
    free = [_free_bytes(device) for device in devices]
    known = [count for count in free if count is not None]
    return Devices(_kind_of(first), len(devices), min(known) if known else None)


def _kind_of(device: Any) -> DeviceKind:
    """Return the kind of a JAX device, without specifications if its name is unknown."""
    name = device.device_kind
    kinds = [kind for kind in DEVICE_KINDS.values() if kind.jax_name and kind.jax_name in name.lower()]
    if kinds:
        return max(kinds, key=lambda kind: len(kind.jax_name or ""))  # "tpu v5 lite" also contains "tpu v5"
    return DeviceKind(name, "tpu" if device.platform == "tpu" else "gpu", None, None, None)


def _free_bytes(device: Any) -> int | None:
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def make_virtual_devices(count: int) -> None:
    """Make JAX show the CPU as `count` devices, unless JAX has started or the user has set a number."""
    import jax

    chosen = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen:
        with contextlib.suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", count)
