"""How many threads to compute with on processors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from grok1.host.control_groups import control_groups

VARIABLE = "NPROC"
"""Names how many threads XLA's pool is to have."""


def default_threads(root: Path = Path("/")) -> int:
    """One thread for each physical core that this process may use: the affinity mask and control groups count.

    A second thread on a core reads memory no faster.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    try:
        usable = sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1
    cores = {_core(cpu, root) for cpu in usable}
    quota = min([float(len(cores)), *_quotas(root)])
    return max(1, min(len(cores), int(-(-quota // 1))))


def thread_count() -> int:
    """What the environment's NPROC says, which XLA obeys by itself, or else `default_threads`."""
    given = os.environ.get(VARIABLE, "")
    return int(given) if given.isascii() and given.isdigit() and int(given) > 0 else default_threads()


def set_threads(count: int | None = None) -> None:
    """Sets how many threads XLA's pool will have, by default `thread_count`; comes before JAX starts."""
    os.environ[VARIABLE] = str(thread_count() if count is None else count)


def _core(cpu: int, root: Path) -> str:
    """What the hardware threads of one core have in common."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second is the older name
        try:
            return (topology / name).read_text().strip()
        except OSError:
            continue
    return str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """How many processors' time each control group of the process, of either version, may use."""
    for group, version in control_groups(root, "cpu"):
        names = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        with contextlib.suppress(OSError, ValueError):  # ValueError: there is no limit: "max"
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if float(quota) > 0:
                yield float(quota) / float(period)
