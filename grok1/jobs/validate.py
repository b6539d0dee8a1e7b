"""What a file of rows asks for, found before any of it is done, and how far it is."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from grok1.engine.occupancy import Occupancy
from grok1.errors import JobError


@dataclasses.dataclass(frozen=True)
class Batching:
    """How rows go through the model.

    Attributes:
        batch_size: sequences that go on at a time.
        lanes: parts of prompts that a step reads, see `grok1.engine.generate.generate`.
        logprobs: whether log-probabilities are computed for all rows.
    """

    batch_size: int
    lanes: int
    logprobs: bool


@dataclasses.dataclass
class JobProgress:
    """How far a job is.

    Attributes:
        done: rows that have a result, an error too.
        tokens_in: read for the rows that this run has finished, shared ones counted for each.
        tokens_out: generated for these.
        occupancy: of the batch.
    """

    done: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    occupancy: Occupancy = dataclasses.field(default_factory=Occupancy)


class SurveyedRow(Protocol):
    """What a survey wants to know of a row."""

    @property
    def index(self) -> int:
        """Counted from 0, bad rows too."""

    @property
    def line(self) -> int:
        """Its line in the file."""

    @property
    def id(self) -> str | int | None:
        """As the row gives it."""

    @property
    def digest(self) -> int:
        """Of the line."""

    @property
    def error(self) -> str | None:
        """What is wrong with a bad row."""

    @property
    def tokens(self) -> list[int]:
        """Token ids to be read."""

    @property
    def sequences(self) -> int:
        """How many places of a batch it takes in all."""

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities of likely tokens are asked for."""


AnyRow = TypeVar("AnyRow", bound=SurveyedRow)


@dataclasses.dataclass
class Survey:
    """What a file of rows asks for.

    Attributes:
        rows: how many there are, bad ones too.
        bad: how many are no rows.
        sequences: places of a batch that they take in all.
        new_tokens: tokens that a row does not have in common with the beginning of the one before it.
        logprobs: whether a row wants log-probabilities.
        digests: of each row's line.
    """

    rows: int = 0
    bad: int = 0
    sequences: int = 0
    new_tokens: int = 0
    logprobs: bool = False
    digests: array[int] = dataclasses.field(default_factory=lambda: array("Q"))

    @classmethod
    def of(cls, rows: Iterable[AnyRow], on_bad: Callable[[AnyRow], None], progress: Callable[[int], None]) -> Survey:
        """Reads all rows.

        Args:
            rows: all of them.
            on_bad: is called with each that is none.
            progress: is called with the number of rows read, now and then.
        """
        survey = cls()
        before: list[int] = []
        for row in rows:
            survey.rows += 1
            survey.digests.append(row.digest)
            if survey.rows % 1000 == 0:
                progress(survey.rows)
            if row.error is not None:
                survey.bad += 1
                on_bad(row)
                continue
            survey.sequences += row.sequences
            survey.new_tokens += len(row.tokens) - common_beginning(before, row.tokens)
            survey.logprobs |= row.wants_logprobs
            before = row.tokens
        return survey

    def unchanged(self, rows: Iterable[AnyRow]) -> Iterator[AnyRow]:
        """The same rows, read again.

        Raises:
            JobError: if one is another than it was.
        """
        count = 0
        for row in rows:
            if row.index >= self.rows or row.digest != self.digests[row.index]:
                raise JobError(f"line {row.line} of the input changed while its rows were worked on: put it back")
            count += 1
            yield row
        if count != self.rows:
            raise JobError(f"the input lost {self.rows - count} rows while they were worked on: put them back")

    @property
    def mean_new_tokens(self) -> float:
        """Mean of the tokens that have to be read for one row alone, about."""
        return self.new_tokens / max(1, self.rows - self.bad)


def common_beginning(before: list[int], tokens: list[int]) -> int:
    """How many tokens two texts have in common at their beginnings."""
    length = min(len(before), len(tokens))
    return next((i for i in range(length) if before[i] != tokens[i]), length)
