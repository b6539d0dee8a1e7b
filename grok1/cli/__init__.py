"""The command line: `execute` runs a command and converts errors into a message and an exit code.

To keep help and shell completion fast, commands are imported on use, and import JAX, NumPy, rich and prompt_toolkit
when they run.
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

_COMPLETION = "_GROK1_COMPLETE"

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
"""Command names; each is also a module in this package, which defines `command`."""


class _LazyGroup(click.Group):
    """A group that imports a command's module on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"grok1.cli.{cmd_name}").command
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, prog_name="grok1", message="%(prog)s %(version)s")
def cli() -> None:
    """Run the Grok-1 language model from its released checkpoint.

    To try grok1 without the 318 GB of weights, use a small model trained on Shakespeare:

    \b
      grok1 init bard --preset bard
      grok1 run -c bard "ROMEO."

    Results are written to standard output. Progress and statistics are shown on standard error if it is a terminal.

    Exit status: 0 on success, 1 on failure (with an error message), 2 on a usage error, 130 if interrupted.
    """


def main() -> int:
    """Run the command given by this process's arguments and return its exit code.

    If the variable `_GROK1_COMPLETE` is set, print a completion script or completions for a shell instead, as described
    in click's documentation.
    """
    if instruction := os.environ.get(_COMPLETION):
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, "grok1", _COMPLETION, instruction)
    if sys.stderr is None:  # closed; click would print errors on stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    terminal = Terminal()
    code = execute(sys.argv[1:], terminal, terminal.end_soon)
    if terminal.interrupted:
        # XLA may still be compiling in another thread, and crashes when the interpreter is finalized. After an
        # interrupt in `eval` or `exec`, Python exits with SIGINT instead of this code.
        os._exit(code)
    return code


def execute(arguments: Sequence[str], terminal: Terminal, on_interrupt: Callable[[], None] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: command-line arguments without the program's name.
        terminal: the output streams.
        on_interrupt: called as soon as an interrupt ends the command.
    """
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    try:
        # Not `cli.main`, which handles interrupts and broken pipes differently.
        with cli.make_context("grok1", list(arguments), obj=terminal) as context:
            cli.invoke(context)
        terminal.flush()
        return DONE
    except click.exceptions.Exit as exit_request:
        terminal.flush()
        return exit_request.exit_code
    except BrokenPipeError:
        _abandon_stdout()  # the reader has closed the pipe
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
        _abandon_stdout()  # writing to it may have failed
        return FAILED
    finally:
        terminal.clear()


def sentence_of(error: Exception) -> str:
    """Return the message for an error."""
    if isinstance(error, Grok1Error):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        found = f" ({text[:200]})" if text else ""
        return f"out of memory{found}: use more devices, a smaller --batch-size or --num-samples, or --dtype bfloat16"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"internal error: {type(error).__name__}: {text}; run again with --verbose for the traceback"


def _abandon_stdout() -> None:
    """Prevent errors about unwritten output when the interpreter flushes stdout at exit."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, AttributeError, ValueError):
        pass  # stdout is closed or has no file descriptor
