"""Texts and token ids from arguments, files and standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from grok1.errors import RequestError, json_value
from grok1.jobs.source import decode_utf8


def stdin_is_terminal() -> bool:
    """Return whether stdin is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def given_text(argument: str | None, file: Path | None, *, argument_name: str, file_option: str) -> str | None:
    """Read a text from an argument, a file or stdin; return None if neither is given and stdin is a terminal.

    One newline at the end of a file or stdin is removed.

    Args:
        argument: the text itself, or "-" for stdin.
        file: a file to read.
        argument_name: name of the argument in messages.
        file_option: name of the option for `file` in messages.

    Raises:
        RequestError: if the text cannot be read or is not UTF-8.
    """
    if argument is not None and file is not None:
        raise click.UsageError(f"{argument_name} and {file_option} cannot be used together.")
    if file is not None:
        return decode_utf8(read_file(file), str(file)).removesuffix("\n")
    if argument == "-" or (argument is None and not stdin_is_terminal()):
        return decode_utf8(read_stdin(), "standard input").removesuffix("\n")
    if argument is not None:
        return checked_argument(argument, argument_name)
    return None


def checked_argument(text: str, name: str) -> str:
    """Return an argument unchanged.

    Raises:
        RequestError: if it is not valid UTF-8 on the command line.
    """
    return decode_utf8(text.encode("utf-8", "surrogateescape"), name)


def read_file(path: Path) -> bytes:
    """Read a file.

    Raises:
        RequestError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None


def read_stdin() -> bytes:
    """Read standard input to its end.

    Raises:
        RequestError: if it is closed or cannot be read.
    """
    if sys.stdin is None:
        raise RequestError("standard input is closed: pass the input as an argument or in a file")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise RequestError(f"cannot read standard input: {error.strerror}") from None


def parsed_ids(text: str) -> list[int]:
    """Parse token ids in a JSON list, or separated by white space or commas.

    Raises:
        RequestError: if the text contains anything else.
    """
    if text.lstrip().startswith("["):
        return json_ids(text, "input")
    numbers = []
    for word in text.replace(",", " ").split():
        if not (word.isascii() and word.isdigit()):
            raise RequestError(f'invalid token id "{word}", expected a non-negative integer')
        if len(word) > 18:
            raise RequestError(f"invalid token id {word[:18]}… of {len(word)} digits, expected at most 18")
        numbers.append(int(word))
    return numbers


def json_ids(text: str, source: str) -> list[int]:
    """Parse a JSON list of token ids.

    Raises:
        RequestError: if the text is anything else.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{source} is not valid JSON ({error}), expected a list of token ids such as [422, 3033]"
        ) from None
    if not isinstance(values, list):
        raise RequestError(f"{source} is not a JSON list, expected a list of token ids such as [422, 3033]")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RequestError(f"{source}: invalid token id {json_value(value)}, expected a non-negative integer")
    return values
