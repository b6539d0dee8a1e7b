"""The interactive session of `grok1 run`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.output import create_output

from grok1.cli.completions import CompletionPrinter
from grok1.errors import RequestError
from grok1.request import Request


class PrivateHistory(FileHistory):
    """Prompts of earlier sessions, in a file that only the user can read, created at the first prompt.

    If the file cannot be read or written, the session continues without it.
    """

    def load_history_strings(self) -> Iterable[str]:
        """Return the prompts, latest first."""
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        """Append a prompt."""
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(self.filename), mode=0o700, exist_ok=True)
            os.close(os.open(self.filename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
            super().store_string(string)


def _history() -> History:
    try:
        return PrivateHistory(platformdirs.user_state_path("grok1", appauthor=False) / "history")
    except (OSError, RuntimeError):  # no home directory
        return InMemoryHistory()


def run_session(printer: CompletionPrinter, request: Callable[[str], Request]) -> None:
    """Read prompts and print their completions until end of file.

    Args:
        printer: completes and prints.
        request: builds the request for a prompt.
    """
    terminal = printer.terminal
    # If results are redirected, the prompt is still shown on the terminal.
    output = create_output(stdout=None if terminal.shows_results else sys.stderr)
    session: PromptSession[str] = PromptSession(history=_history(), output=output)
    terminal.note("Type a prompt and press Enter. Ctrl-C stops a completion, Ctrl-D ends the session.")
    while True:
        try:
            prompt = session.prompt("> ")
        except KeyboardInterrupt:
            if not session.default_buffer.text:  # otherwise Ctrl-C has discarded the line
                terminal.note("Press Ctrl-D to end the session.")
            continue
        except EOFError:
            return
        if not prompt:
            continue
        try:
            with terminal.interruptible(patient=True):
                printer.run(request(prompt))
        except KeyboardInterrupt:
            terminal.interrupted = True
            terminal.end_line()
            terminal.note("[stopped]")
        except RequestError as error:
            terminal.end_line()
            terminal.error(str(error))
