"""Runs the jobs of `grok1 batch` and `grok1 score`, and reports on the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grok1.checkpoint.reader import Checkpoint
from grok1.cli.interrupt import GracefulShutdown
from grok1.cli.loading import ModelChoice, load_model, open_model
from grok1.cli.terminal import Terminal
from grok1.errors import JobError
from grok1.jobs.journal import Journal
from grok1.jobs.result_json import json_line
from grok1.jobs.run import FINISHING, Job, JobRunner, JobStopped, Reporter, summary
from grok1.jobs.score import Corpus
from grok1.jobs.source import Source
from grok1.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from grok1.model import Model

_SECOND_SIGNAL = "; Ctrl-C stops at once"


@dataclasses.dataclass(frozen=True)
class TerminalReporter:
    """Reports a job on the terminal; a `Reporter`."""

    terminal: Terminal
    shutdown: GracefulShutdown

    def status(self, text: str) -> None:
        """Shows what the job is doing."""
        self.terminal.show_status(text)

    def note(self, text: str) -> None:
        """Prints a line on stderr, if it is a terminal."""
        self.terminal.note(text)

    def bad_row(self, text: str) -> None:
        """Prints a line on stderr."""
        self.terminal.clear()
        click.echo(text, err=True)

    def result(self, line: str) -> None:
        """Prints a line of results."""
        self.terminal.write(line)

    @contextlib.contextmanager
    def processing(self, describe: Callable[[], str]) -> Iterator[None]:
        """Shows the line of progress, and shuts down gracefully at the first Ctrl-C."""

        def line() -> str:
            more = _SECOND_SIGNAL if self.shutdown.requested.is_set() else ""
            return describe() + more

        with (
            self.terminal.interruptible(patient=True, hint=FINISHING + _SECOND_SIGNAL),
            self.shutdown.graceful(),
            self.terminal.describing(line),
        ):
            yield


@dataclasses.dataclass(frozen=True)
class PerplexityReporter(TerminalReporter):
    """Prints the perplexity after each chunk, and that of all chunks, instead of JSON."""

    corpus: Corpus

    def result(self, line: str) -> None:
        """Prints what a line, which is part of the corpus already, means for the perplexity."""
        corpus = self.corpus
        value = corpus.perplexity
        if "corpus" not in json.loads(line):
            self.terminal.write(f"[{corpus.rows}]{'inf' if value is None else f'{value:.4f}'},")
            return
        error = corpus.standard_error
        told = "infinite" if value is None else f"{value:.4f}" + ("" if error is None else f" +/- {error:.5f}")
        if corpus.bits_per_byte is not None:
            told += f", bits per byte {corpus.bits_per_byte:.4f}"
        self.terminal.write(f"\nperplexity {told}, {corpus.num_scored} tokens of {corpus.rows} chunks\n")


@dataclasses.dataclass(frozen=True)
class JobFiles:
    """The files of a job, opened.

    Attributes:
        source: the input.
        journal: of the output; None for stdout.
        checkpoint: the model's.
        tokenizer: the model's; None if it has none.
        reporter: where to report.
        choice: the model that the user chose.
    """

    source: Source
    journal: Journal | None
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    reporter: TerminalReporter
    choice: ModelChoice

    @property
    def begun(self) -> Mapping[str, Any]:
        """The fingerprint in the journal of an interrupted job; empty for a new job."""
        return (self.journal.job if self.journal is not None else None) or {}

    def run(
        self, job: Job[Any], batch_size: int | None, skip_bad: bool, reporter: Reporter | None = None
    ) -> dict[str, Any]:
        """Runs a job on these files; see `JobRunner.run`.

        Raises:
            KeyboardInterrupt: if it was stopped by a signal.
        """
        runner = JobRunner(
            job,
            self.journal,
            reporter or self.reporter,
            self._load,
            self.reporter.shutdown.requested,
            batch_size,
            self.choice.mesh,
            self.choice.dtype,
        )
        try:
            return runner.run(skip_bad=skip_bad)
        except JobStopped:
            raise KeyboardInterrupt from None

    def _load(self, mesh: tuple[int, int] | None, dtype: str | None) -> Model:
        terminal = self.reporter.terminal
        choice = dataclasses.replace(self.choice, mesh=mesh, dtype=dtype)
        with terminal.interruptible():
            return load_model(choice, terminal, self.checkpoint, self.tokenizer)[0]

    def report(self, outcome: Mapping[str, Any], details: Mapping[str, Any], shown: list[str], as_json: bool) -> None:
        """Reports how a job ended.

        Args:
            outcome: of the job.
            details: more of it for JSON.
            shown: more of it for the line on stderr.
            as_json: whether to print JSON.

        Raises:
            JobError: if there were bad rows.
        """
        terminal = self.reporter.terminal
        if as_json:
            terminal.write(json_line({**outcome, **details}))
        terminal.note(summary(outcome, *shown))
        if outcome["failed"]:
            where = "" if self.journal is None else f" in {self.journal.output}"
            raise JobError(f'{outcome["failed"]} of {outcome["rows"]} rows failed: their lines{where} have an "error"')


@contextlib.contextmanager
def opened_files(
    terminal: Terminal,
    choice: ModelChoice,
    input_file: Path,
    row_format: Any,
    output: Path | None,
    restart: bool,
) -> Iterator[JobFiles]:
    """Opens the files of a job, and locks its journal.

    Args:
        terminal: where to report.
        choice: the model.
        input_file: a file of rows.
        row_format: of its lines; None to go by its name.
        output: the file to write; None for stdout.
        restart: whether to discard the results of an interrupted run.

    Raises:
        JobError: if a file cannot be opened, or the output is the input.
    """
    if restart and output is None:
        raise click.UsageError("--restart needs -o: there is nothing to resume on standard output.")
    shutdown = GracefulShutdown()
    with shutdown.installed(), contextlib.ExitStack() as stack:
        source = Source.open(input_file, row_format)
        journal = None
        if output is not None:
            if source.path is not None and output.exists() and output.samefile(source.path):
                raise JobError(f"{output} is the input: name another file to write")
            journal = stack.enter_context(Journal.open(output, restart=restart))
            if journal.dropped_bytes and journal.job is not None:
                terminal.note(f"{journal.path}: dropped {journal.dropped_bytes} bytes of an incomplete row")
        checkpoint, tokenizer = open_model(choice, terminal)
        yield JobFiles(source, journal, checkpoint, tokenizer, TerminalReporter(terminal, shutdown), choice)
