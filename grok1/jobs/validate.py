"""Validation of an input: every row is read and checked before any of them is processed."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from grok1.errors import JobError


class JobRow(Protocol):
    """What a job has to know about a row of any kind."""

    @property
    def index(self) -> int:
        """Counted from 0, bad rows included."""

    @property
    def line(self) -> int:
        """Line number in the file, from 1."""

    @property
    def id(self) -> str | int | None:
        """The row's own id."""

    @property
    def digest(self) -> int:
        """Hash of the line."""

    @property
    def error(self) -> str | None:
        """Why the row is bad; None for a good one."""

    @property
    def tokens(self) -> list[int]:
        """Token ids to read."""

    @property
    def sequences(self) -> int:
        """Number of sequences that it takes: samples to generate, or windows to score."""

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities of the likeliest tokens are requested."""


AnyRow = TypeVar("AnyRow", bound=JobRow)


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

    def unchanged(self, rows: Iterable[AnyRow]) -> Iterator[AnyRow]:
        """Yields the rows of a second reading.

        Raises:
            JobError: if a row differs from the first reading.
        """
        count = 0
        for row in rows:
            if row.index >= self.rows or row.digest != self.digests[row.index]:
                raise JobError(f"line {row.line} of the input changed while its rows were processed: restore it")
            count += 1
            yield row
        if count != self.rows:
            raise JobError(f"the input lost {self.rows - count} rows while they were processed: restore them")

    @property
    def mean_new_tokens(self) -> float:
        """Mean of `new_tokens` over the good rows."""
        return self.new_tokens / max(1, self.rows - self.bad)


def validate(rows: Iterable[AnyRow], on_bad: Callable[[AnyRow], None], progress: Callable[[int], None]) -> Validation:
    """Reads all rows and counts what they ask for.

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
        if row.error is not None:
            found.bad += 1
            on_bad(row)
            continue
        found.sequences += row.sequences
        found.new_tokens += len(row.tokens) - shared_prefix(previous, row.tokens)
        found.logprobs |= row.wants_logprobs
        previous = row.tokens
    return found


def shared_prefix(one: list[int], other: list[int]) -> int:
    """Number of tokens with which both texts begin."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)
