"""The Linux control groups of this process, which may limit its memory and its CPU time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Return the directories of the process's control groups, innermost first, each with its version, 1 or 2.

    Args:
        root: the directory that contains `proc` and `sys`.
        controller: "memory" or "cpu"; version 2 has one hierarchy for all controllers.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, version = root / "sys/fs/cgroup", 2
        elif controller in controllers.split(","):
            mount, version = root / "sys/fs/cgroup" / controller, 1
        else:
            continue
        group = mount / path.lstrip("/")
        while group.is_relative_to(mount):
            yield group, version
            group = group.parent
