"""Destinations of finished rows: a journal, or a stream in the order of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Results(Protocol):
    """Takes the lines of finished rows; a `Journal` or `OrderedResults`."""

    def __contains__(self, index: int) -> bool:
        """Whether a row is finished."""

    def add(self, index: int, line: str) -> None:
        """Adds a finished row's line."""


class OrderedResults:
    """Passes lines on in the order of their rows, each as soon as all preceding ones have been added."""

    def __init__(self, write: Callable[[str], None]):
        self._write = write
        self._waiting: dict[int, str] = {}
        self._next = 0

    def __contains__(self, index: int) -> bool:
        return index < self._next or index in self._waiting

    def add(self, index: int, line: str) -> None:
        """Adds a finished row's line; writes every line that is now in order."""
        self._waiting[index] = line
        while (ready := self._waiting.pop(self._next, None)) is not None:
            self._write(ready)
            self._next += 1
