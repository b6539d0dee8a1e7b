"""Progress of long operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Progress:
    """The current state of a long operation.

    Attributes:
        stage: "checking" files, "loading" weights, "compiling" a program, "running" it for the first time, or "reading"
            a long prompt.
        detail: the checkpoint; the program; or, while several processes load, the slowest of them, whose bytes are
            counted.
        done: bytes loaded or tokens read; 0 if unknown.
        total: bytes to load or tokens to read; 0 if unknown.
    """

    stage: Literal["checking", "loading", "compiling", "running", "reading"]
    detail: str
    done: int = 0
    total: int = 0


ProgressCallback = Callable[[Progress], None]
