"""Number of CPU threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from grok1.host.control_groups import control_groups

THREADS_VARIABLE = "NPROC"
"""Environment variable with the size of XLA's thread pool."""


def default_threads(root: Path = Path("/")) -> int:
    """Number of physical cores that the affinity mask and the control groups allow this process.

    A second thread on a core reads memory no faster.

    Args:
        root: the directory that contains `proc` and `sys`.
    """
    try:
        usable = sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1
    cores = {_core(cpu, root) for cpu in usable}
    quota = min([float(len(cores)), *_quotas(root)])
    return max(1, min(len(cores), int(-(-quota // 1))))


def num_threads() -> int:
    """Return the value of NPROC, which XLA reads too, or `default_threads`."""
    given = os.environ.get(THREADS_VARIABLE, "")
    return int(given) if given.isascii() and given.isdigit() and int(given) > 0 else default_threads()


def set_threads(count: int | None = None) -> None:
    """Set the size of XLA's thread pool, by default `num_threads`. Call it before JAX starts."""
    os.environ[THREADS_VARIABLE] = str(num_threads() if count is None else count)


def _core(cpu: int, root: Path) -> str:
    """A string that is equal for the hardware threads of one core."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second is the older name
        try:
            return (topology / name).read_text().strip()
        except OSError:
            continue
    return str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """Number of CPUs that each control group of the process allows."""
    for group, version in control_groups(root, "cpu"):
        names = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        with contextlib.suppress(OSError, ValueError):  # ValueError: there is no limit: "max"
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if float(quota) > 0:
                yield float(quota) / float(period)
