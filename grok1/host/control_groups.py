"""The control groups that Linux keeps this process in, which limit its memory and its share of the processors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """The folders of the groups that may limit this process, innermost first, each with its version, 1 or 2.

    Args:
        root: the folder that holds `proc` and `sys`.
        controller: of version 1, such as "memory" or "cpu"; version 2 has one hierarchy for all.
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
