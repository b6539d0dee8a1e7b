"""Output streams: results on stdout; progress, notes and errors on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from grok1.cli.interrupt import interrupts_end_at_once, interrupts_end_within_a_second
from grok1.errors import Grok1Error

if TYPE_CHECKING:
    from grok1.model import Progress

_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_CONTROL |= {0x7F: "\u2421"} | dict.fromkeys(range(128, 160), "�")

_PATIENCE = "stopping after the current step; press Ctrl-C again to exit immediately"
_RUNNING = {"prefill": "processing the prompt", "decoding": "generating", "scoring": "scoring"}  # slow programs


class OutputError(Grok1Error):
    """Results cannot be written to standard output."""


class Terminal:
    """The two output streams of a command.

    Attributes:
        quiet: whether to print only errors on stderr, even if it is a terminal.
        verbose: whether to print tracebacks and let libraries log.
        interrupted: whether Ctrl-C has stopped an operation.
        on_leave: called before `os._exit` ends the process, from any thread.
    """

    def __init__(self) -> None:
        """Initialize with the defaults of `--quiet` and `--verbose`."""
        self.quiet = False
        self.verbose = False
        self.interrupted = False
        self._live: Any = None
        self._shown: str | None = None
        self._mid_line = False
        self._describe: Callable[[], str] | None = None
        self.on_leave: Callable[[], None] | None = None

    @property
    def shows(self) -> bool:
        """Whether progress and notes are shown."""
        return not self.quiet and _is_terminal(sys.stderr)

    @property
    def shows_results(self) -> bool:
        """Whether stdout is a terminal."""
        return _is_terminal(sys.stdout)

    def write(self, text: str) -> None:
        """Write results to stdout and flush it.

        On a terminal, control characters other than newline and tab are replaced by symbols.

        Raises:
            OutputError: if the results cannot be written.
            BrokenPipeError: if the reader has closed the pipe.
        """
        if not text:
            return
        if self.shows_results:
            self.clear()
            text = text.translate(_CONTROL)
        if sys.stdout is None:
            raise OutputError("cannot write to standard output, which is closed: redirect it to a file with `>`")
        with _output_errors():
            sys.stdout.write(text)
            sys.stdout.flush()
        self._mid_line = not text.endswith("\n")

    def flush(self) -> None:
        """Flush stdout, to which libraries may have written."""
        if sys.stdout is not None:
            with _output_errors():
                sys.stdout.flush()

    def end_line(self) -> None:
        """Clear the progress display, and end an unfinished line of results on a terminal."""
        self.clear()
        if self._mid_line and self.shows_results:
            self._mid_line = False
            with contextlib.suppress(OSError):
                sys.stdout.write("\n")
                sys.stdout.flush()

    def note(self, text: str) -> None:
        """Print a line on stderr if it is a terminal."""
        if self.shows:
            self.end_line()
            with contextlib.suppress(OSError):
                click.echo(text.translate(_CONTROL), err=True)

    def error(self, sentence: str) -> None:
        """Print an error on stderr, in one line."""
        with contextlib.suppress(OSError):
            click.echo(f"grok1: error: {' '.join(sentence.split())}", err=True)

    def progress(self, progress: Progress) -> None:
        """Show the progress of a long operation; may be called from any thread."""
        if progress.stage == "loading":
            doing = f"loading weights, {progress.detail}" if progress.detail else "loading weights"
            self.show_bytes(doing, progress.done, progress.total)
        elif progress.stage == "compiling":
            self.show_status(f"compiling the {progress.detail} program")
        elif self._describe is not None:
            self._show("", describe=self._describe)
        elif progress.stage == "running":
            if progress.detail in _RUNNING:
                self.show_status(_RUNNING[progress.detail])
        elif progress.stage == "reading":
            self.show_status(f"processing the prompt, {progress.done} of {progress.total} tokens")
        else:
            self.show_status(f"{progress.stage} files")

    def show_status(self, text: str) -> None:
        """Show a status line with the elapsed time, until `clear` or the next status line."""
        self._show(text)

    def show_bytes(self, text: str, done: int, total: int) -> None:
        """Show a progress bar with the rate and the remaining time, until `clear` or the next status line."""
        if self._live is None or self._live.tasks[0].total is None:
            self._show(text, total)
        if self._live is not None:
            self._live.update(self._live.task_ids[0], description=text, completed=done, total=total)

    @contextlib.contextmanager
    def describing(self, describe: Callable[[], str]) -> Iterator[None]:
        """Within this block, show the status line that `describe` returns, called every 0.2 s in another thread."""
        self._describe = describe
        self._show("", describe=describe)
        try:
            yield
        finally:
            self._describe = None
            self.clear()

    def clear(self) -> None:
        """Clear the progress display."""
        if self._live is not None:
            self._live.stop()
            self._live = self._shown = None

    def _show(self, text: str, total: int | None = None, describe: Callable[[], str] | None = None) -> None:
        if not self.shows or self._shown == text or (self._mid_line and self.shows_results):
            return
        self.clear()
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            ProgressColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.table import Column
        from rich.text import Text

        class DescriptionColumn(ProgressColumn):
            max_refresh = 0.2

            def render(self, task: Any) -> Text:
                return Text(describe() if describe is not None else text, no_wrap=True, overflow="ellipsis")

        whole = Column(no_wrap=True)  # on a narrow terminal, only the description or the bar is cut
        columns: list[Any] = [SpinnerColumn(), DescriptionColumn(), TimeElapsedColumn(whole)]
        if total is not None:
            columns = [
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(table_column=whole),
                TransferSpeedColumn(table_column=whole),
                TimeRemainingColumn(compact=True, table_column=whole),
            ]
        self._live = Progress(
            *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, expand=False
        )
        self._live.add_task(text, total=total)
        self._shown = text
        self._live.start()

    @contextlib.contextmanager
    def interruptible(self, *, patient: bool = False, hint: str = _PATIENCE) -> Iterator[None]:
        """Within this block, Ctrl-C ends the process within a second, even while XLA compiles.

        Args:
            patient: whether only the second Ctrl-C ends the process; if the block does not react to the first, the hint
                is printed.
            hint: the text to print.
        """

        def show_hint() -> None:
            if self.shows and self._describe is None:  # otherwise its line contains the hint
                self._raw_to_stderr(f"\r\n{hint}\r\n".encode())

        with interrupts_end_within_a_second(patient=patient, hint=show_hint, leave=self._leave_terminal):
            yield

    def importing(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which Ctrl-C ends the process immediately, for importing JAX."""
        return interrupts_end_at_once(self._leave_terminal)

    def abort(self, sentence: str | None, code: int) -> None:
        """Print an error and end the process immediately, from any thread."""
        self._restore_terminal()
        if sentence is not None:
            self._raw_to_stderr(f"grok1: error: {sentence}\n".encode())
        os._exit(code)

    def end_soon(self) -> None:
        """End the process with status 130 if it has not ended within a second after an interrupt.

        An interrupted operation, such as an import, may have left a lock that a normal exit would wait for.
        """

        def end() -> None:
            self._leave_terminal()
            os._exit(130)

        timer = threading.Timer(1.0, end)
        timer.daemon = True
        timer.start()

    def _leave_terminal(self) -> None:
        if self.on_leave is not None:
            self.on_leave()
        self._restore_terminal()

    def _restore_terminal(self) -> None:
        # The main thread may hold any lock, so none may be acquired here.
        if _is_terminal(sys.stderr):
            self._raw_to_stderr(b"\r\x1b[2K\x1b[?25h" if self._live is not None else b"\r\n")

    @staticmethod
    def _raw_to_stderr(text: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), text)


pass_terminal = click.make_pass_decorator(Terminal, ensure=True)
"""Decorator that passes the `Terminal` as a command's first argument."""


def _is_terminal(stream: Any) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


@contextlib.contextmanager
def _output_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to standard output: {error.strerror}") from None
