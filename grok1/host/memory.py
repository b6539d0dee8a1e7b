"""How much memory there is, how much this process has needed, and a budget for what it takes for a while."""

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
"""Bytes of host memory beyond the weights that loading takes at most."""

MIN_LOAD_MEMORY = 16_000_000
"""The fewest that it can do with."""


class MemoryBudget:
    """Bytes that several threads may hold at a time, all together.

    with budget.hold(buffer_bytes):
        ...
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.held = 0
        self._released = threading.Condition()

    @contextlib.contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Waits until so many bytes are free, and holds them for the length of a `with` block.

        Raises:
            ValueError: if it is more than the whole budget.
        """
        if count > self.limit:
            raise ValueError(f"{count:,} bytes are more than the budget of {self.limit:,}")
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
    """How much memory processes can still get without swapping; None where the system does not say.

    It is what Linux counts as available, or what the process's control groups leave of their limits if that is less;
    the page cache counts as available in both.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return max(0, min([available, *_left_by_groups(root)]))


def _left_by_groups(root: Path) -> Iterator[int]:
    """What each control group that the process is in, of either version, leaves of its limit."""
    for group, version in control_groups(root, "memory"):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        cached = "" if version == 2 else "total_"
        with contextlib.suppress(OSError, KeyError, ValueError):  # ValueError: the limit is "max"
            limit, usage = (int((group / name).read_text()) for name in names)
            counts = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
            cache = sum(int(counts[f"{cached}{state}_file"]) for state in ("active", "inactive"))
            yield limit - usage + cache


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
