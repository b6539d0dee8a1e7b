"""Validation of an input: every row is read and checked before any of them is processed."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from grok1.errors import JobError
from grok1.jobs.rows import AnyTask, Row


@dataclasses.dataclass
class Validation:
    """The result of validating an input.

    Attributes:
        rows: number of rows, bad ones included.
        bad: number of bad rows.
        sequences: number of sequences of all good rows.
        new_tokens: tokens that do not belong to a prefix shared with the preceding row.
        logprobs: whether any row wants log-probabilities.
        digests: of each row's line.
    """

    rows: int = 0
    bad: int = 0
    sequences: int = 0
    new_tokens: int = 0
    logprobs: bool = False
    digests: array[int] = dataclasses.field(default_factory=lambda: array("Q"))

    def unchanged(self, rows: Iterable[Row[AnyTask]]) -> Iterator[Row[AnyTask]]:
        """Yield the rows of a second reading.

        Raises:
            JobError: if a row differs from the first reading.
        """
        count = 0
        for row in rows:
            if row.index >= self.rows or row.digest != self.digests[row.index]:
                raise JobError(
                    f"line {row.line} of the input changed during the run; restore the file and run the command again"
                )
            count += 1
            yield row
        if count != self.rows:
            raise JobError(
                f"the input lost {self.rows - count} rows during the run; restore the file and run the command again"
            )

    @property
    def mean_new_tokens(self) -> float:
        """Mean of `new_tokens` over the good rows."""
        return self.new_tokens / max(1, self.rows - self.bad)


def validate(
    rows: Iterable[Row[Any]], on_bad: Callable[[Row[Any]], None], progress: Callable[[int], None]
) -> Validation:
    """Read all rows and counts what they ask for.

    Args:
        rows: all rows of the input.
        on_bad: called with each bad row.
        progress: called from time to time with the number of rows read.
    """
    found = Validation()
    previous: list[int] = []
    for row in rows:
        found.rows += 1
        found.digests.append(row.digest)
        if found.rows % 1000 == 0:
            progress(found.rows)
        task = row.task
        if task is None:
            found.bad += 1
            on_bad(row)
            continue
        found.sequences += task.sequences
        found.new_tokens += len(task.tokens) - shared_prefix(previous, task.tokens)
        found.logprobs |= task.logprobs
        previous = task.tokens
    return found


def shared_prefix(one: list[int], other: list[int]) -> int:
    """Length of the common prefix of both texts in tokens."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)
