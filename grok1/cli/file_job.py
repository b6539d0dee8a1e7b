"""What the commands over files of rows share: the journal or stdout, interrupts, progress, and the run itself."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic

import click

from grok1.checkpoint.audit.fingerprint import fingerprint
from grok1.cli.model_choice import ModelChoice
from grok1.cli.terminal import Terminal
from grok1.errors import JobError, TooSmallError
from grok1.jobs.fingerprint import check_same, versions
from grok1.jobs.journal import Journal
from grok1.jobs.results import OrderedResults, Results
from grok1.jobs.source import Source
from grok1.jobs.validate import AnyRow, Batching, JobProgress, Survey

if TYPE_CHECKING:
    from grok1.checkpoint.reader import Checkpoint
    from grok1.model import Model

FINISHING = "finishing what has begun; Ctrl-C stops at once"


@contextlib.contextmanager
def opened_journal(terminal: Terminal, source: Source, output: Path | None, restart: bool) -> Iterator[Journal | None]:
    """The journal of an output, locked; None for standard output.

    Raises:
        JobError: if there cannot be one, or the output is the input.
    """
    if output is None:
        if restart:
            raise click.UsageError("--restart needs -o: standard output has nothing to go on from.")
        yield None
        return
    if source.path is not None and output.exists() and output.samefile(source.path):
        raise JobError(f"{output} is the input: name another file to write")
    with Journal.open(output, restart=restart) as journal:
        if journal.dropped_bytes and journal.job is not None:
            terminal.note(f"{journal.path}: its last {journal.dropped_bytes} bytes are no whole row, and are dropped")
        yield journal


class Stopping:
    """Stops a job gently at the first SIGINT or SIGTERM, and at once at the second.

    Before the block `gently` any of them is a `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        """Signals are caught only inside `caught`."""
        self.requested = threading.Event()
        self._gentle = self._asked = False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Within this block the signals do what this class says."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def gently(self) -> Iterator[None]:
        """Within this block the first signal only sets `requested`."""
        self._gentle = True
        try:
            yield
        finally:
            self._gentle = False

    def _handle(self, number: int, frame: object) -> None:
        if not self._gentle or self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self.requested.set()


class FileJob(ABC, Generic[AnyRow]):
    """One run of a command over a file of rows: `check` everything, then `run`."""

    command: ClassVar[str]

    def __init__(
        self,
        terminal: Terminal,
        source: Source,
        journal: Journal | None,
        checkpoint: Checkpoint,
        choice: ModelChoice,
        batch_size: int | None,
        stopping: Stopping,
    ):
        """Reads the tokenizer; all else is kept as it is.

        Args:
            terminal: where to tell of it.
            source: the rows' lines.
            journal: None to write the results to stdout.
            checkpoint: the model's.
            choice: the model, as the user chose it.
            batch_size: as the user chose it.
            stopping: how signals end it.
        """
        from grok1.cli.loading import read_tokenizer

        self.terminal = terminal
        self.source = source
        self.journal = journal
        self.checkpoint = checkpoint
        self.tokenizer = read_tokenizer(choice, checkpoint.config)
        self.choice = choice
        self.batch_size = batch_size
        self.stopping = stopping
        self.survey: Survey
        self.progress = JobProgress()
        self._identity: dict[str, Any]

    # What a command brings

    @abstractmethod
    def rows(self) -> Iterator[AnyRow]:
        """Reads all rows, from the first on."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The options that a result depends on, by their names."""

    @abstractmethod
    def work(self, model: Model, rows: Iterator[AnyRow], results: Results, batching: Batching) -> Iterator[None]:
        """Works on rows that have no result, and keeps `progress` up to date; yields after each row."""

    def tail(self) -> str:
        """What follows the last row's line in the output."""
        return ""

    def write_line(self, line: str) -> None:
        """Writes a row's line to stdout."""
        self.terminal.write(line)

    # What they share

    @property
    def begun(self) -> Mapping[str, Any]:
        """What the journal says of the job that it was begun for; empty for a new one."""
        return (self.journal.job if self.journal is not None else None) or {}

    def check(self, skip_bad: bool) -> None:
        """Checks all rows, and that the journal is this job's.

        Raises:
            JobError: if there are no rows, or bad ones that are not to be skipped, or the journal is another job's.
        """
        terminal, name = self.terminal, self.source.name
        terminal.show_status("checking the rows")

        def on_bad(row: AnyRow) -> None:
            terminal.clear()
            click.echo(f"{name}, line {row.line}: {row.error}", err=True)

        self.survey = Survey.of(
            self.rows(), on_bad, lambda count: terminal.show_status(f"checking the rows, {count} so far")
        )
        terminal.clear()
        rows, bad = self.survey.rows, self.survey.bad
        if rows == 0:
            raise JobError(f"{name} has no rows: give one a line")
        if bad and not skip_bad:
            raise JobError(
                f"{bad} of {rows} rows of {name} are bad, and nothing was begun: correct them, or leave them out with "
                "--skip-bad"
            )
        self._identity = {
            "command": self.command,
            "input": self.source.sha256,
            "checkpoint": fingerprint(self.checkpoint),
            "tokenizer": self.tokenizer.sha256 if self.tokenizer is not None else None,
            **versions(),
            "format": self.source.format,
            **self.options(),
        }
        if self.journal is not None and self.begun:
            given = {"batch_size": self.batch_size, "mesh": self.choice.mesh, "dtype": self.choice.dtype}
            told = {key: value for key, value in given.items() if value is not None}
            check_same(self.journal.path, self.begun, self._identity | told)

    def run(self) -> dict[str, Any]:
        """Works on what is not done yet and writes the output.

        Returns:
            what there is to tell of it: "rows", "resumed_rows", "failed", and if there was anything left to do
            "seconds", "tokens_in", "tokens_out", "tokens_read", "batch_size", "mean_slot_use".

        Raises:
            KeyboardInterrupt: if it was stopped before the end.
        """
        journal, survey, progress = self.journal, self.survey, self.progress
        results = journal if journal is not None else OrderedResults(self.write_line)
        progress.done = 0 if journal is None else journal.rows
        outcome: dict[str, Any] = {"rows": survey.rows, "resumed_rows": progress.done, "failed": survey.bad}
        if progress.done < survey.rows:
            with self.terminal.interruptible():
                model = self._load()
            batching = self._settle(model)
            outcome |= self._work(model, results, batching)
        if progress.done < survey.rows:
            self.terminal.clear()
            if journal is not None:
                self.terminal.note(
                    f"{progress.done} of {survey.rows} rows are done; the same command goes on from there"
                )
            raise KeyboardInterrupt
        if journal is not None:
            self.terminal.show_status("writing the output")
            journal.write_output(survey.rows, self.tail())
        else:
            self.terminal.write(self.tail())
        return outcome

    def refuse_failures(self) -> None:
        """Ends a job that had bad rows.

        Raises:
            JobError: if it had.
        """
        if self.survey.bad:
            where = "" if self.journal is None else f" in {self.journal.output}"
            raise JobError(f'{self.survey.bad} of {self.survey.rows} rows failed: their lines{where} have an "error"')

    def _load(self) -> Model:
        """Loads the model, on the mesh that the job was begun on."""
        from grok1.cli.loading import load_model

        mesh = self.begun.get("mesh")
        choice = dataclasses.replace(
            self.choice,
            mesh=self.choice.mesh or (None if mesh is None else (mesh[0], mesh[1])),
            dtype=self.choice.dtype or self.begun.get("dtype"),
        )
        return load_model(choice, self.terminal)[0]

    def _settle(self, model: Model) -> Batching:
        """Settles what can only be known with the model, and begins the journal.

        Raises:
            JobError: if the journal was begun on something else.
            TooSmallError: if the batch does not fit in memory.
        """
        engine, begun = model.engine, self.begun
        rows = engine.data_rows
        wanted = -(-self.survey.sequences // rows) * rows
        size = self.batch_size or begun.get("batch_size") or max(rows, min(model.best_batch_size(), wanted))
        if model.max_sequences is not None and size > max(rows, model.max_sequences):
            raise TooSmallError(
                f"there is memory for {model.max_sequences} sequences beside the weights, but the batch has {size}: "
                f"use --batch-size {model.max_sequences}, or --dtype bfloat16"
            )
        lanes = begun.get("lanes") or engine.lanes_for(self.survey.mean_new_tokens)
        settled = {
            "mesh": list(model.mesh_shape),
            "dtype": engine.dtype.name,
            "device": engine.mesh.devices.flat[0].device_kind,
            "batch_size": size,
            "lanes": lanes,
        }
        if self.journal is not None:
            if begun:
                check_same(self.journal.path, begun, settled)
            self.journal.begin(self._identity | settled)
        return Batching(size, lanes, self.survey.logprobs)

    def _work(self, model: Model, results: Results, batching: Batching) -> dict[str, Any]:
        """Works on rows until none is left or a signal comes."""
        progress, occupancy = self.progress, self.progress.occupancy
        start, before = time.perf_counter(), progress.done
        with (
            self.terminal.interruptible(patient=True, hint=FINISHING),
            self.stopping.gently(),
            self.terminal.describing(lambda: self._describe(start, before)),
        ):
            for _ in self.work(model, self.survey.unchanged(self.rows()), results, batching):
                pass
        return {
            "seconds": time.perf_counter() - start,
            "tokens_in": progress.tokens_in,
            "tokens_out": progress.tokens_out,
            "tokens_read": occupancy.read_tokens,
            "batch_size": occupancy.slots,
            "mean_slot_use": occupancy.mean_use,
        }

    def _describe(self, start: float, before: int) -> str:
        """The line of progress."""
        progress, occupancy, total = self.progress, self.progress.occupancy, self.survey.rows
        seconds = max(1e-3, time.perf_counter() - start)
        done = f"{progress.done} of {total} rows"
        if self.stopping.requested.is_set():
            return f"{done} · {FINISHING}"
        parts = [done]
        if self.survey.bad:
            parts.append(f"{self.survey.bad} failed")
        if progress.done > before:
            parts.append(f"{duration((total - progress.done) * seconds / (progress.done - before))} left")
        parts.append(f"{(occupancy.read_tokens + occupancy.copied_tokens) / seconds:.0f} tokens/s in")
        if occupancy.generated_tokens:
            parts.append(f"{occupancy.generated_tokens / seconds:.1f} out")
        return " · ".join([*parts, f"{occupancy.busy} of {occupancy.slots} slots"])

    def summary(self, outcome: Mapping[str, Any], *more: str) -> str:
        """One line for people about what `run` gives."""
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
            parts.append(f"in {duration(seconds)}")
            if outcome["mean_slot_use"] is not None:
                parts.append(f"{outcome['mean_slot_use']:.0%} of {outcome['batch_size']} slots used")
        return "[" + " · ".join([*parts, *more]) + "]"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
