"""What the commands over files of rows share: the journal or stdout, interrupts, and the line of progress."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grok1.cli.terminal import Terminal
from grok1.errors import JobError

if TYPE_CHECKING:
    from grok1.jobs.journal import Journal
    from grok1.jobs.source import Source

FINISHING = "finishing what has begun; Ctrl-C stops at once"

_JOB = [
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write the results to this file, all at once when they are done; what is done before is kept in "
        "FILE.journal, and the same command goes on after an interruption.  [default: standard output, row by row]",
    ),
    click.option(
        "--format",
        "row_format",
        type=click.Choice(["txt", "jsonl"]),
        help="What the lines of INPUT are.  [default: by its ending; jsonl for standard input]",
    ),
    click.option(
        "--skip-bad",
        is_flag=True,
        help='Go on without bad rows; their results have an "error", and the exit code is 1.',
    ),
    click.option(
        "--restart", is_flag=True, help="Forget what an interrupted run has done, and replace FILE if it is there."
    ),
]


def job_options(command: Any) -> Any:
    """Adds the options of a file of rows: `output`, `row_format`, `skip_bad` and `restart`."""
    for option in reversed(_JOB):
        command = option(command)
    return command


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
    from grok1.jobs.journal import Journal

    if source.path is not None and output.exists() and output.samefile(source.path):
        raise JobError(f"{output} is the input: name another file to write")
    with Journal.open(output, restart=restart) as journal:
        if journal.dropped_bytes and journal.job is not None:
            terminal.note(f"{journal.path}: its last {journal.dropped_bytes} bytes are no whole row, and are dropped")
        yield journal


def check_rows(terminal: Terminal, source: Source, bad: int, rows: int, skip_bad: bool) -> None:
    """Refuses a file of rows that has bad ones, unless they are to be skipped, or none at all.

    Raises:
        JobError: if so.
    """
    terminal.clear()
    if rows == 0:
        raise JobError(f"{source.name} has no rows: give one a line")
    if bad and not skip_bad:
        raise JobError(
            f"{bad} of {rows} rows of {source.name} are bad, and nothing was begun: correct them, or leave them out "
            "with --skip-bad"
        )


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


def line_of_progress(
    total: int, done: Callable[[], int], rest: Callable[[float], list[str]], stopping: Stopping
) -> Callable[[], str]:
    """A function that describes a job at the moment, for `Terminal.describing`.

    Args:
        total: rows.
        done: gives the rows done so far.
        rest: gives what else there is to say, from the seconds since the start.
        stopping: whether the job is to stop.
    """
    start, before = time.perf_counter(), done()

    def describe() -> str:
        seconds = max(1e-3, time.perf_counter() - start)
        finished = done()
        if stopping.requested.is_set():
            return f"{finished} of {total} rows · {FINISHING}"
        parts = [f"{finished} of {total} rows"]
        if finished > before:
            parts.append(f"{duration((total - finished) * seconds / (finished - before))} left")
        return " · ".join([*parts, *rest(seconds)])

    return describe


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
