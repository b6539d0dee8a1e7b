"""The command line: `execute` runs a command and turns any error into one sentence and an exit code.

Commands are imported when they are used, and import JAX, NumPy, rich and prompt_toolkit when they run, so that help
is immediate.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import click

from grok1.cli.terminal import Terminal
from grok1.config import VERSION
from grok1.errors import Grok1Error

DONE, FAILED, INTERRUPTED = 0, 1, 130

_COMMANDS = (
    "run",
    "batch",
    "score",
    "init",
    "inspect",
    "verify",
    "plan",
    "bench",
    "launch",
    "tokenize",
    "detokenize",
    "smoke",
)
"""Each is the object `command` of the module of that name in this package."""


class _LazyGroup(click.Group):
    """A group that imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"grok1.cli.{cmd_name}").command
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="grok1", message="%(prog)s %(version)s")
def cli() -> None:
    """Run the released Grok-1 model from the command line.

    Results go to standard output. Progress and statistics go to standard error, and only if that is a terminal.

    Exit codes: 0 done, 1 failed with one line that says why, 2 wrong usage, 130 interrupted.

    \b
    To try it without the release's weights, on a small model trained on Shakespeare:
      grok1 init bard --preset bard
      grok1 run -c bard "ROMEO."
    """


def main() -> int:
    """Runs the command of this process's arguments and returns its exit code."""
    if sys.stderr is None:  # closed: click would print errors on stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    terminal = Terminal()
    code = execute(sys.argv[1:], terminal, terminal.end_soon)
    if terminal.interrupted:
        # XLA may still be compiling in another thread, and crashes when the interpreter is finalized. And after some
        # interrupts, of `eval` and `exec`, Python ends itself with SIGINT instead of this code.
        os._exit(code)
    return code


def execute(arguments: Sequence[str], terminal: Terminal, on_interrupt: Callable[[], None] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        arguments: of the command line, without the program's name.
        terminal: where to print.
        on_interrupt: called as soon as an interrupt ends the command.
    """
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    try:
        # Not `cli.main`, which handles interrupts and broken pipes in another way.
        with cli.make_context("grok1", list(arguments), obj=terminal) as context:
            cli.invoke(context)
        terminal.flush()
        return DONE
    except click.exceptions.Exit as exit_request:
        terminal.flush()
        return exit_request.exit_code
    except BrokenPipeError:
        _abandon_stdout()  # the reader of the results has seen enough
        return DONE
    except (KeyboardInterrupt, click.Abort):
        terminal.interrupted = True
        if on_interrupt is not None:
            on_interrupt()
        if terminal.verbose:
            traceback.print_exc()
        terminal.end_line()
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:
        terminal.end_line()
        if terminal.verbose:
            traceback.print_exc()
        terminal.error(sentence_of(error))
        _abandon_stdout()  # it may be what failed
        return FAILED
    finally:
        terminal.clear()


def sentence_of(error: Exception) -> str:
    """The sentence that the user reads about an error."""
    if isinstance(error, Grok1Error):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        found = text[:200] or "the system gave no more"
        return (
            f"out of memory ({found}): use more devices with --mesh, fewer "
            "samples or sequences at a time, or --dtype bfloat16"
        )
    if isinstance(error, OSError) and error.strerror:
        name = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{name}: make room, or check names and permissions"
    return f"internal error: {type(error).__name__}: {text} (run again with --verbose for the traceback)"


def _abandon_stdout() -> None:
    """Prevents errors about unwritten output when the interpreter flushes stdout at its end."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, AttributeError, ValueError):
        pass  # stdout is closed or not a file
