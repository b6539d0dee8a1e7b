"""Memory of the machine and of this process, and a budget shared by threads."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from grok1.host.control_groups import control_groups

DEFAULT_LOAD_MEMORY = 2_000_000_000
"""Default limit of host memory for loading in bytes, in addition to the weights."""

MIN_LOAD_MEMORY = 16_000_000
"""The smallest such limit."""


class MemoryBudget:
    """A limit of the bytes that several threads hold together."""

    def __init__(self, limit: int):
        self.limit = limit
        self.held = 0
        self._released = threading.Condition()

    @contextlib.contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Wait until `count` bytes are free, and hold them during a `with` block.

        Raises:
            ValueError: if `count` exceeds the limit.
        """
        if count > self.limit:
            raise ValueError(f"{count:,} bytes exceed the budget of {self.limit:,}")
        with self._released:
            self._released.wait_for(lambda: self.held + count <= self.limit)
            self.held += count
        try:
            yield
        finally:
            with self._released:
                self.held -= count
                self._released.notify_all()


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory available without swapping: of the machine or within the limits of the control groups, if that is less.

    The page cache counts as available. None where the system does not say.

    Args:
        root: the directory that contains `proc` and `sys`.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return max(0, min([available, *_left_by_groups(root)]))


def _left_by_groups(root: Path) -> Iterator[int]:
    """Bytes below the limit of each control group of the process."""
    for group, version in control_groups(root, "memory"):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        cached = "" if version == 2 else "total_"
        with contextlib.suppress(OSError, KeyError, ValueError):  # ValueError: the limit is "max"
            limit, usage = (int((group / name).read_text()) for name in names)
            counts = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
            cache = sum(int(counts[f"{cached}{state}_file"]) for state in ("active", "inactive"))
            yield limit - usage + cache


def peak_resident_bytes() -> int | None:
    """Peak resident set size of the process; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(devices: Iterable[Any]) -> int | None:
    """Peak memory of the JAX device that used most; None if they do not say, as CPUs do not."""
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
