"""Runs a job over a file of rows: validates all rows, processes those without a result, and writes the output."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol

from grok1.checkpoint.reader import Checkpoint
from grok1.engine.occupancy import Occupancy
from grok1.errors import Grok1Error, JobError, TooSmallError
from grok1.jobs.fingerprint import compare, job_fingerprint
from grok1.jobs.journal import Journal
from grok1.jobs.result_json import error_object, json_line
from grok1.jobs.results import OrderedResults, Results
from grok1.jobs.source import Source
from grok1.jobs.validate import AnyRow, Validation, validate
from grok1.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from grok1.model import Model

FINISHING = "finishing what has begun"


class JobStopped(Grok1Error):
    """The job was stopped before all rows had a result."""


class Reporter(Protocol):
    """Where a job reports: a terminal, a log or a server."""

    def status(self, text: str) -> None:
        """Reports what the job is doing; replaces the preceding status."""

    def note(self, text: str) -> None:
        """Reports something that should stay visible."""

    def bad_row(self, text: str) -> None:
        """Reports a bad row."""

    def result(self, line: str) -> None:
        """Takes a line of results, if there is no output file."""

    def processing(self, describe: Callable[[], str]) -> AbstractContextManager[None]:
        """Encloses the processing of rows; `describe` returns the current line of progress, in any thread."""


@dataclasses.dataclass(frozen=True)
class Batching:
    """How rows pass through the model.

    Attributes:
        batch_size: number of sequences at a time.
        lanes: number of prefill lanes of a step, see `grok1.engine.generate.generate`.
        logprobs: whether log-probabilities are computed for all rows.
    """

    batch_size: int
    lanes: int
    logprobs: bool


@dataclasses.dataclass
class JobProgress:
    """How far a job has come.

    Attributes:
        done: rows that have a result, bad rows and those of earlier runs included.
        tokens_in: prompt tokens of the rows that this run has finished; shared ones count for each row.
        tokens_out: tokens generated for these rows.
        occupancy: of the batch.
    """

    done: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    occupancy: Occupancy = dataclasses.field(default_factory=Occupancy)


@dataclasses.dataclass
class Job(ABC, Generic[AnyRow]):
    """What to do with the rows of an input; subclasses are the kinds of jobs.

    Attributes:
        source: the lines of the input.
        checkpoint: the model's.
        tokenizer: the model's; None if it has none.
    """

    command: ClassVar[str]
    source: Source
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None

    @abstractmethod
    def rows(self) -> Iterator[AnyRow]:
        """Reads all rows from the beginning, bad ones included."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The options that a result depends on, by name."""

    @abstractmethod
    def requests(self, row: AnyRow) -> Iterable[Any]:
        """What to ask the model for a row; together they have `row.sequences` outputs."""

    @abstractmethod
    def outputs(
        self, model: Model, requests: Iterator[Any], batching: Batching, occupancy: Occupancy
    ) -> Iterator[tuple[int, Any]]:
        """Yields the model's outputs as they finish, each with the number of its request."""

    @abstractmethod
    def result(self, row: AnyRow, outputs: list[Any]) -> tuple[str, int]:
        """The line of a row's result, the same in every run, and the number of generated tokens."""

    def collect(self, line: str) -> None:
        """Takes every line that goes to the reporter, in order."""

    def tail(self, lines: Iterable[str]) -> str:
        """What follows the last row's line; `lines` are those that were not passed to `collect`."""
        return ""


def process_rows(
    job: Job[AnyRow],
    model: Model,
    rows: Iterable[AnyRow],
    results: Results,
    batching: Batching,
    progress: JobProgress,
    stop: threading.Event,
) -> Iterator[None]:
    """Processes the rows that have no result.

    Args:
        job: what to do with them.
        model: the model.
        rows: taken one by one, as sequences become free.
        results: where results go.
        batching: how many sequences to process at a time.
        progress: kept up to date.
        stop: once it is set, no more rows are taken; those that have begun are finished.

    Yields:
        after each row.
    """
    pending: dict[int, tuple[AnyRow, list[int], list[Any]]] = {}  # by request: its row, all requests of it, outputs
    numbers = itertools.count()

    def requests() -> Iterator[Any]:
        for row in rows:
            if row.index in results:
                continue
            if row.error is not None:
                results.add(row.index, json_line(error_object(row)))
                progress.done += 1
                continue
            if stop.is_set():
                return
            entry: tuple[AnyRow, list[int], list[Any]] = row, [], []
            for request in job.requests(row):
                number = next(numbers)
                entry[1].append(number)
                pending[number] = entry
                yield request

    for number, output in job.outputs(model, requests(), batching, progress.occupancy):
        row, numbers_of_row, outputs = pending[number]
        outputs.append(output)
        if len(outputs) == row.sequences:
            for each in numbers_of_row:
                del pending[each]
            line, generated = job.result(row, outputs)
            results.add(row.index, line)
            progress.done += 1
            progress.tokens_in += len(row.tokens)
            progress.tokens_out += generated
            yield


@dataclasses.dataclass
class JobRunner(Generic[AnyRow]):
    """One run of a job.

    Attributes:
        job: what to do.
        journal: keeps the results until the output can be written; None passes them to the reporter.
        reporter: where to report.
        load: loads the model on a mesh and with a dtype, either of which may be None for the default.
        stop: ends the run early, once it is set; rows that have begun are finished.
        batch_size: number of sequences at a time; None chooses it.
        mesh: sizes of the (data, model) axes, if the caller chooses them.
        dtype: of activations and the KV cache, if the caller chooses it.
    """

    job: Job[AnyRow]
    journal: Journal | None
    reporter: Reporter
    load: Callable[[tuple[int, int] | None, str | None], Model]
    stop: threading.Event
    batch_size: int | None = None
    mesh: tuple[int, int] | None = None
    dtype: str | None = None
    _progress: JobProgress = dataclasses.field(default_factory=JobProgress, init=False)

    def run(self, *, skip_bad: bool) -> dict[str, Any]:
        """Validates all rows, processes those that have no result, and writes the output.

        Args:
            skip_bad: whether bad rows get a result with an "error" rather than end the job before it begins.

        Returns:
            "rows", "resumed_rows" and "failed", and if any row was left to process also "seconds", "tokens_in",
            "tokens_out", "tokens_read", "batch_size" and "mean_slot_use".

        Raises:
            JobError: if there are no rows, or bad ones, or the journal belongs to another job.
            JobStopped: if it was stopped before the end.
            TooSmallError: if the batch does not fit in memory.
        """
        journal, progress, reporter = self.journal, self._progress, self.reporter
        validation = self._validate(skip_bad)
        job, source = self.job, self.job.source
        fingerprint = job_fingerprint(job.command, source, job.checkpoint, job.tokenizer, job.options())
        if journal is not None and self._begun:
            given = {"batch_size": self.batch_size, "mesh": self.mesh, "dtype": self.dtype}
            compare(
                journal.path,
                self._begun,
                fingerprint | {key: value for key, value in given.items() if value is not None},
            )
        progress.done = 0 if journal is None else journal.rows
        outcome: dict[str, Any] = {"rows": validation.rows, "resumed_rows": progress.done, "failed": validation.bad}
        if progress.done < validation.rows:
            model = self._load()
            batching = self._settle(model, validation, fingerprint)
            outcome |= self._process(model, validation, batching)
        if progress.done < validation.rows:
            if journal is not None:
                reporter.note(f"{progress.done} of {validation.rows} rows are done; run the same command to resume")
            raise JobStopped(f"stopped after {progress.done} of {validation.rows} rows")
        if journal is not None:
            reporter.status("writing the output")
            journal.write_output(validation.rows, job.tail(journal.lines()))
        else:
            reporter.result(job.tail(()))
        return outcome

    @property
    def _begun(self) -> Mapping[str, Any]:
        """The fingerprint and settings in the journal; empty for a new one."""
        return (self.journal.job if self.journal is not None else None) or {}

    def _validate(self, skip_bad: bool) -> Validation:
        name, reporter = self.job.source.name, self.reporter
        reporter.status("checking the rows")
        validation = validate(
            self.job.rows(),
            lambda row: reporter.bad_row(f"{name}, line {row.line}: {row.error}"),
            lambda count: reporter.status(f"checking the rows, {count} so far"),
        )
        rows, bad = validation.rows, validation.bad
        if rows == 0:
            raise JobError(f"{name} has no rows: expected one per line")
        if bad and not skip_bad:
            raise JobError(
                f"{bad} of {rows} rows of {name} are bad; nothing was processed: fix them or pass --skip-bad"
            )
        return validation

    def _load(self) -> Model:
        """Loads the model, on the mesh and with the dtype of the journal."""
        mesh = self._begun.get("mesh")
        return self.load(
            self.mesh or (None if mesh is None else (mesh[0], mesh[1])), self.dtype or self._begun.get("dtype")
        )

    def _settle(self, model: Model, validation: Validation, fingerprint: Mapping[str, Any]) -> Batching:
        """Settles what depends on the loaded model, and begins the journal.

        Raises:
            JobError: if the journal was begun with other settings.
            TooSmallError: if the batch does not fit in memory.
        """
        engine, begun = model.engine, self._begun
        rows = engine.data_rows
        wanted = -(-validation.sequences // rows) * rows
        size = self.batch_size or begun.get("batch_size") or max(rows, min(model.best_batch_size(), wanted))
        if model.max_sequences is not None and size > max(rows, model.max_sequences):
            raise TooSmallError(
                f"there is memory for {model.max_sequences} sequences beside the weights, but the batch has {size}: "
                f"use --batch-size {model.max_sequences}, or --dtype bfloat16"
            )
        lanes = begun.get("lanes") or engine.lanes_for(validation.mean_new_tokens)
        settled = {
            "mesh": list(model.mesh_shape),
            "dtype": engine.dtype.name,
            "device": engine.mesh.devices.flat[0].device_kind,
            "batch_size": size,
            "lanes": lanes,
        }
        if self.journal is not None:
            if begun:
                compare(self.journal.path, begun, settled)
            self.journal.begin({**fingerprint, **settled})
        return Batching(size, lanes, validation.logprobs)

    def _process(self, model: Model, validation: Validation, batching: Batching) -> dict[str, Any]:
        """Processes rows until none is left or the job is stopped."""
        progress, occupancy = self._progress, self._progress.occupancy
        results: Results = OrderedResults(self._write) if self.journal is None else self.journal
        start, before = time.perf_counter(), progress.done
        rows = validation.unchanged(self.job.rows())
        with self.reporter.processing(lambda: self._describe(validation, start, before)):
            for _ in process_rows(self.job, model, rows, results, batching, progress, self.stop):
                pass
        return {
            "seconds": time.perf_counter() - start,
            "tokens_in": progress.tokens_in,
            "tokens_out": progress.tokens_out,
            "tokens_read": occupancy.read_tokens,
            "batch_size": occupancy.slots,
            "mean_slot_use": occupancy.mean_use,
        }

    def _write(self, line: str) -> None:
        self.job.collect(line)
        self.reporter.result(line)

    def _describe(self, validation: Validation, start: float, before: int) -> str:
        """The line of progress."""
        progress, occupancy, total = self._progress, self._progress.occupancy, validation.rows
        seconds = max(1e-3, time.perf_counter() - start)
        parts = [f"{progress.done} of {total} rows"]
        if self.stop.is_set():
            return f"{parts[0]} · {FINISHING}"
        if validation.bad:
            parts.append(f"{validation.bad} failed")
        if progress.done > before:
            parts.append(f"{_duration((total - progress.done) * seconds / (progress.done - before))} left")
        parts.append(f"{(occupancy.read_tokens + occupancy.copied_tokens) / seconds:.0f} tokens/s in")
        if occupancy.generated_tokens:
            parts.append(f"{occupancy.generated_tokens / seconds:.1f} out")
        return " · ".join([*parts, f"{occupancy.busy} of {occupancy.slots} slots"])


def summary(outcome: Mapping[str, Any], *more: str) -> str:
    """The outcome of `JobRunner.run` in one line."""
    parts = [f"{outcome['rows']} rows"]
    if outcome["resumed_rows"]:
        parts.append(f"{outcome['rows'] - outcome['resumed_rows']} of them now")
    if outcome["failed"]:
        parts.append(f"{outcome['failed']} failed")
    if "seconds" in outcome:
        seconds = max(1e-3, outcome["seconds"])
        for key, where in (("tokens_in", "tokens in"), ("tokens_out", "out")):
            if outcome[key]:
                parts.append(f"{outcome[key]} {where} ({outcome[key] / seconds:.1f}/s)")
        parts.append(f"in {_duration(seconds)}")
        if outcome["mean_slot_use"] is not None:
            parts.append(f"{outcome['mean_slot_use']:.0%} of {outcome['batch_size']} slots used")
    return "[" + " · ".join([*parts, *more]) + "]"


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
