"""Where finished rows go: into a journal, or straight out in the order of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from grok1.jobs.result_json import json_line
from grok1.jobs.validate import SurveyedRow


class Results(Protocol):
    """Takes the lines of finished rows; a `Journal` or `OrderedResults`."""

    def __contains__(self, index: int) -> bool:
        """Whether a row is finished already."""

    def add(self, index: int, line: str) -> None:
        """Takes a row's line."""


class OrderedResults:
    """Hands out lines in the order of their rows, as soon as all before them are there."""

    def __init__(self, write: Callable[[str], None]):
        self._write = write
        self._waiting: dict[int, str] = {}
        self._next = 0

    def __contains__(self, index: int) -> bool:
        return index < self._next or index in self._waiting

    def add(self, index: int, line: str) -> None:
        """Takes a row's line; writes it, and those that have waited for it."""
        self._waiting[index] = line
        while (ready := self._waiting.pop(self._next, None)) is not None:
            self._write(ready)
            self._next += 1


def error_line(row: SurveyedRow) -> str:
    """The line of the output for a bad row."""
    return json_line({"index": row.index, "id": row.id, "line": row.line, "error": row.error})
