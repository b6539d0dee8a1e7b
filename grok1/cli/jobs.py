"""Running the jobs of `grok1 batch` and `grok1 score`, with progress on the terminal."""

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

_SECOND_SIGNAL = "; press Ctrl-C again to stop immediately"


@dataclasses.dataclass(frozen=True)
class TerminalReporter:
    """A `Reporter` that prints to the terminal."""

    terminal: Terminal
    shutdown: GracefulShutdown

    def status(self, text: str) -> None:
        """Show a status line."""
        self.terminal.show_status(text)

    def note(self, text: str) -> None:
        """Print a line on stderr if it is a terminal."""
        self.terminal.note(text)

    def bad_row(self, text: str) -> None:
        """Print the error of a row on stderr."""
        self.terminal.clear()
        click.echo(text, err=True)

    def result(self, line: str) -> None:
        """Print a line of results."""
        self.terminal.write(line)

    @contextlib.contextmanager
    def processing(self, describe: Callable[[], str]) -> Iterator[None]:
        """Show the progress line, and shut down gracefully at the first Ctrl-C."""

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
    """A `Reporter` that prints the cumulative perplexity after each chunk, and the final one, instead of JSON."""

    corpus: Corpus

    def result(self, line: str) -> None:
        """Print the perplexity of `corpus`, to which the line has already been added."""
        corpus = self.corpus
        value = corpus.perplexity
        if "corpus" not in json.loads(line):
            self.terminal.write(f"[{corpus.rows}]{'inf' if value is None else f'{value:.4f}'},")
            return
        error = corpus.standard_error
        final = "infinite" if value is None else f"{value:.4f}" + ("" if error is None else f" +/- {error:.5f}")
        if corpus.bits_per_byte is not None:
            final += f", bits per byte {corpus.bits_per_byte:.4f}"
        self.terminal.write(f"\nperplexity {final}, {corpus.num_scored} tokens in {corpus.rows} chunks\n")


@dataclasses.dataclass(frozen=True)
class JobFiles:
    """The open files of a job.

    Attributes:
        source: the input.
        journal: the journal of the output; None for stdout.
        checkpoint: the checkpoint of the model.
        tokenizer: the tokenizer of the model, or None.
        reporter: receives progress and results.
        choice: the options that select the model.
    """

    source: Source
    journal: Journal | None
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    reporter: TerminalReporter
    choice: ModelChoice

    @property
    def begun(self) -> Mapping[str, Any]:
        """Fingerprint in the journal of an interrupted job; empty for a new job."""
        return (self.journal.job if self.journal is not None else None) or {}

    def run(
        self, job: Job[Any], batch_size: int | None, skip_bad: bool, reporter: Reporter | None = None
    ) -> dict[str, Any]:
        """Run a job on these files; see `JobRunner.run`.

        Raises:
            KeyboardInterrupt: if a signal stopped it.
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
        """Print the summary of a job.

        Args:
            outcome: the return value of `run`.
            details: additional fields of the JSON summary.
            shown: additional parts of the line on stderr.
            as_json: whether to print a JSON summary.

        Raises:
            JobError: if rows have failed.
        """
        terminal = self.reporter.terminal
        if as_json:
            terminal.write(json_line({**outcome, **details}))
        terminal.note(summary(outcome, *shown))
        if outcome["failed"]:
            where = "the output" if self.journal is None else self.journal.output
            raise JobError(
                f'{outcome["failed"]} of {outcome["rows"]} rows failed: see "error" in their lines of {where}'
            )


@contextlib.contextmanager
def opened_files(
    terminal: Terminal,
    choice: ModelChoice,
    input_file: Path,
    row_format: Any,
    output: Path | None,
    restart: bool,
) -> Iterator[JobFiles]:
    """Open the files of a job, and lock its journal.

    Args:
        terminal: the output streams.
        choice: the options that select the model.
        input_file: the file of rows, or "-" for stdin.
        row_format: the format of the rows; None to derive it from the file name.
        output: the file to write; None for stdout.
        restart: whether to discard the results of an interrupted run.

    Raises:
        JobError: if a file cannot be opened, or the output is the input.
    """
    if restart and output is None:
        raise click.UsageError("--restart requires -o.")
    shutdown = GracefulShutdown()
    with shutdown.installed(), contextlib.ExitStack() as stack:
        source = Source.open(input_file, row_format)
        journal = None
        if output is not None:
            if source.path is not None and output.exists() and output.samefile(source.path):
                raise JobError(f"{output} is both input and output: choose another output file")
            journal = stack.enter_context(Journal.open(output, restart=restart))
            if journal.dropped_bytes and journal.job is not None:
                terminal.note(f"Discarded {journal.dropped_bytes} bytes of an incomplete row in {journal.path}.")
        checkpoint, tokenizer = open_model(choice, terminal)
        yield JobFiles(source, journal, checkpoint, tokenizer, TerminalReporter(terminal, shutdown), choice)
