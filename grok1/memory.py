"""How much memory this process has needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any


def peak_resident_bytes() -> int | None:
    """The most main memory that the process has held at a time; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(devices: Iterable[Any]) -> int | None:
    """The most memory that any of these JAX devices has held; None if they do not say, as CPUs do not."""
    peaks = [
        stats["peak_bytes_in_use"]
        for d in devices
        if (stats := d.memory_stats() or {}) and "peak_bytes_in_use" in stats
    ]
    return max(peaks, default=None)


def total_bytes() -> int | None:
    """Main memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows, or a system without these names
        return None


def available_bytes() -> int | None:
    """Main memory that programs may still take without anything being swapped out; None if not known."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None
