"""Runs a job over a file of rows: validates all rows, processes those without a result, and writes the output."""

from __future__ import annotations

import dataclasses
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol

from grok1.checkpoint.reader import Checkpoint
from grok1.engine.occupancy import Occupancy
from grok1.errors import Grok1Error, JobError, TooSmallError
from grok1.jobs.fingerprint import compare, job_fingerprint
from grok1.jobs.journal import Journal
from grok1.jobs.result_json import json_line
from grok1.jobs.rows import AnyTask, Row
from grok1.jobs.source import Source
from grok1.jobs.validate import Validation, validate
from grok1.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from grok1.model import Model

FINISHING = "finishing what has begun"


class JobStopped(Grok1Error):
    """The job was stopped before all rows had a result."""


class Reporter(Protocol):
    """Where a job reports: a terminal, a log or a server."""

    def status(self, text: str) -> None:
        """Report what the job is doing; replaces the preceding status."""

    def note(self, text: str) -> None:
        """Report something that should stay visible."""

    def bad_row(self, text: str) -> None:
        """Report a bad row."""

    def result(self, line: str) -> None:
        """Write a line of results if there is no output file."""

    def processing(self, describe: Callable[[], str]) -> AbstractContextManager[None]:
        """Enclose the processing of rows; `describe` returns the current line of progress, in any thread."""


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
class Job(ABC, Generic[AnyTask]):
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
    def rows(self) -> Iterator[Row[AnyTask]]:
        """Read all rows from the beginning, bad ones included."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return the options that a result depends on, by name."""

    @abstractmethod
    def outputs(self, model: Model, requests: Iterator[Any], *, logprobs: bool, **batching: Any) -> Iterator[Any]:
        """Yield the model's outputs as they finish, each with the index of its request as `request_index`.

        Args:
            model: the model.
            requests: of the rows, taken one by one.
            logprobs: whether any row wants log-probabilities.
            **batching: `batch_size`, `lanes` and `occupancy`, as for `Model.complete_many`.
        """

    @abstractmethod
    def result(self, task: AnyTask, outputs: list[Any]) -> dict[str, Any]:
        """A row's result as JSON, the same in every run; `completion_tokens` is the number of generated tokens."""

    def collect(self, line: str) -> None:
        """Take every line that goes to the reporter, in order."""

    def tail(self, lines: Iterable[str]) -> str:
        """What follows the last row's line; `lines` are those that were not passed to `collect`."""
        return ""


class OrderedResults:
    """Passes lines on in the order of their rows, each as soon as all preceding ones have been added."""

    def __init__(self, write: Callable[[str], None]):
        self._write = write
        self._waiting: dict[int, str] = {}
        self._next = 0

    def __contains__(self, index: int) -> bool:
        return index < self._next or index in self._waiting

    def add(self, index: int, line: str) -> None:
        """Add a finished row's line; writes every line that is now in order."""
        self._waiting[index] = line
        while (ready := self._waiting.pop(self._next, None)) is not None:
            self._write(ready)
            self._next += 1


def process_rows(
    job: Job[AnyTask],
    model: Model,
    rows: Iterable[Row[AnyTask]],
    results: Journal | OrderedResults,
    progress: JobProgress,
    stop: threading.Event,
    batching: Mapping[str, Any],
) -> Iterator[None]:
    """Process the rows that have no result.

    Args:
        job: what to do with them.
        model: the model.
        rows: taken one by one, as sequences become free.
        results: where results go.
        progress: kept up to date.
        stop: once it is set, only rows in progress are finished.
        batching: keyword arguments of `Job.outputs`, except `occupancy`.

    Yields:
        after each row.
    """
    owners: dict[int, tuple[Row[AnyTask], AnyTask]] = {}  # of requests, by index
    pending: defaultdict[int, list[Any]] = defaultdict(list)  # outputs of unfinished rows, by row

    def finish(row: Row[AnyTask], result: dict[str, Any]) -> None:
        results.add(row.index, json_line({"index": row.index, "id": row.id, **result}))
        progress.done += 1

    def requests() -> Iterator[Any]:
        count = 0
        for row in rows:
            if row.index in results:
                continue
            if row.task is None:
                finish(row, {"line": row.line, "error": row.error})
                continue
            if stop.is_set():
                return
            for request in row.task.requests:
                owners[count] = row, row.task
                count += 1
                yield request

    for output in job.outputs(model, requests(), occupancy=progress.occupancy, **batching):
        row, task = owners[output.request_index]
        pending[row.index].append(output)
        if len(pending[row.index]) == task.sequences:
            outputs = pending.pop(row.index)
            for index in {output.request_index for output in outputs}:
                del owners[index]
            result = job.result(task, outputs)
            finish(row, result)
            progress.tokens_in += len(task.tokens)
            progress.tokens_out += result.get("completion_tokens", 0)
            yield


@dataclasses.dataclass
class JobRunner(Generic[AnyTask]):
    """One run of a job.

    Attributes:
        job: what to do.
        journal: stores the results until the output can be written; None passes them to the reporter.
        reporter: where to report.
        load: loads the model with a mesh and a dtype; either may be None for the default.
        stop: once it is set, only rows in progress are finished.
        batch_size: number of sequences at a time; None for the journal's, or a default.
        mesh: sizes of the (data, model) axes; None likewise.
        dtype: of activations and the KV cache; None likewise.
    """

    job: Job[AnyTask]
    journal: Journal | None
    reporter: Reporter
    load: Callable[[tuple[int, int] | None, str | None], Model]
    stop: threading.Event
    batch_size: int | None = None
    mesh: tuple[int, int] | None = None
    dtype: str | None = None
    _progress: JobProgress = dataclasses.field(default_factory=JobProgress, init=False)

    def run(self, *, skip_bad: bool) -> dict[str, Any]:
        """Validate all rows, processes those that have no result, and writes the output.

        Args:
            skip_bad: whether bad rows get a result with an "error", instead of being an error of the job.

        Returns:
            "rows", "resumed_rows" and "failed", and if any row was left to process also "seconds", "tokens_in",
            "tokens_out", "tokens_read", "batch_size" and "mean_slot_use".

        Raises:
            JobError: if the input is empty or has invalid rows, or the journal belongs to another job.
            JobStopped: if it was stopped before the end.
            TooSmallError: if the batch does not fit in memory.
        """
        job, journal, progress, reporter = self.job, self.journal, self._progress, self.reporter
        validation = self._validate(skip_bad)
        fingerprint = job_fingerprint(job.command, job.source, job.checkpoint, job.tokenizer, job.options())
        given = {"batch_size": self.batch_size, "mesh": self.mesh, "dtype": self.dtype}
        compare(journal, fingerprint | {key: value for key, value in given.items() if value is not None})
        progress.done = 0 if journal is None else journal.rows
        outcome: dict[str, Any] = {"rows": validation.rows, "resumed_rows": progress.done, "failed": validation.bad}
        if progress.done < validation.rows:
            mesh = self.mesh or self._begun.get("mesh")
            model = self.load(None if mesh is None else (mesh[0], mesh[1]), self.dtype or self._begun.get("dtype"))
            settings = self._settings(model, validation)
            if journal is not None:
                journal.begin({**fingerprint, **settings})
            outcome |= self._process(model, validation, settings["batch_size"], settings["lanes"])
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
            raise JobError(f"{name} is empty; expected one row per line")
        if bad and not skip_bad:
            raise JobError(
                f"{bad} of {rows} rows of {name} {'is' if bad == 1 else 'are'} invalid and nothing was processed; "
                "fix them or pass --skip-bad"
            )
        return validation

    def _settings(self, model: Model, validation: Validation) -> dict[str, Any]:
        """Return the settings of the job that depend on the loaded model.

        Raises:
            JobError: if the journal has other settings.
            TooSmallError: if the batch does not fit in memory.
        """
        engine, begun = model.engine, self._begun
        rows = engine.data_rows
        wanted = -(-validation.sequences // rows) * rows
        size = self.batch_size or begun.get("batch_size") or max(rows, min(model.best_batch_size(), wanted))
        if model.max_sequences is not None and size > max(rows, model.max_sequences):
            raise TooSmallError(
                f"--batch-size is {size}, but only {model.max_sequences} sequences fit in memory; "
                f"use --batch-size {model.max_sequences}, or --dtype bfloat16"
            )
        settings = {
            "mesh": list(model.mesh_shape),
            "dtype": engine.dtype.name,
            "device": engine.mesh.devices.flat[0].device_kind,
            "batch_size": size,
            "lanes": begun.get("lanes") or engine.lanes_for(validation.mean_new_tokens),
            "kernels": model.kernels,
        }
        compare(self.journal, settings)
        return settings

    def _process(self, model: Model, validation: Validation, batch_size: int, lanes: int) -> dict[str, Any]:
        """Process rows until none is left or the job is stopped."""
        progress, occupancy = self._progress, self._progress.occupancy
        results = OrderedResults(self._write) if self.journal is None else self.journal
        start, before = time.perf_counter(), progress.done
        rows = validation.unchanged(self.job.rows())
        batching = {"batch_size": batch_size, "lanes": lanes, "logprobs": validation.logprobs}
        with self.reporter.processing(lambda: self._describe(validation, start, before)):
            for _ in process_rows(self.job, model, rows, results, progress, self.stop, batching):
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
        """Return the line of progress."""
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
    """Return the outcome of `JobRunner.run` in one line."""
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
