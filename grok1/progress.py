"""What a long operation reports while it runs. Nothing here imports JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a long step is doing.

    Attributes:
        stage: "checking" files, "loading" weights, "compiling" a program, "running" it for the first time, or "reading"
            a long prompt.
        detail: what in particular; of loading in several processes, which is the slowest, whose bytes these are.
        done: bytes loaded or tokens read; 0 where it is not known.
        total: bytes to load or tokens to read; 0 where it is not known.
    """

    stage: Literal["checking", "loading", "compiling", "running", "reading"]
    detail: str
    done: int = 0
    total: int = 0


ProgressCallback = Callable[[Progress], None]
