"""Texts and token ids from arguments, files and standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from grok1.errors import RequestError
from grok1.jobs.source import decode_utf8


def stdin_is_terminal() -> bool:
    """Whether a person could type on stdin."""
    return sys.stdin is not None and sys.stdin.isatty()


def given_text(argument: str | None, file: Path | None, *, argument_name: str, file_option: str) -> str | None:
    """Reads a text from an argument, a file or stdin; None if neither is given and stdin is a terminal.

    One newline at the end of a file or stdin is not part of the text.

    Args:
        argument: the text itself, or "-" for stdin.
        file: a file to read.
        argument_name: name of the argument in messages.
        file_option: name of the file's option in messages.

    Raises:
        RequestError: if the text cannot be read or is not UTF-8.
    """
    if argument is not None and file is not None:
        raise click.UsageError(f"{argument_name} and {file_option} are both given: give one of them.")
    if file is not None:
        return decode_utf8(read_file(file), str(file)).removesuffix("\n")
    if argument == "-" or (argument is None and not stdin_is_terminal()):
        return decode_utf8(read_stdin(), "standard input").removesuffix("\n")
    if argument is not None:
        return checked_argument(argument, argument_name)
    return None


def checked_argument(text: str, name: str) -> str:
    """Returns an argument unchanged.

    Raises:
        RequestError: if it was not UTF-8 on the command line.
    """
    return decode_utf8(text.encode("utf-8", "surrogateescape"), name)


def read_file(path: Path) -> bytes:
    """Reads a file.

    Raises:
        RequestError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {path} ({error.strerror}): check its name and permissions") from None


def read_stdin() -> bytes:
    """Reads standard input to its end.

    Raises:
        RequestError: if it is closed or cannot be read.
    """
    if sys.stdin is None:
        raise RequestError("standard input is closed: give the text as an argument or in a file")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise RequestError(f"cannot read standard input ({error.strerror})") from None


def parsed_ids(text: str) -> list[int]:
    """Parses token ids in a JSON list, or separated by spaces, newlines or commas.

    Raises:
        RequestError: if the text contains anything else.
    """
    if text.lstrip().startswith("["):
        return json_ids(text, "the list")
    numbers = []
    for word in text.replace(",", " ").split():
        if not (word.isascii() and word.isdigit()):
            raise RequestError(f"{word!r} is no token id: expected whole numbers from 0 on")
        if len(word) > 18:
            raise RequestError(f"{word[:18]}… is no token id: it has {len(word)} digits")
        numbers.append(int(word))
    return numbers


def json_ids(text: str, source: str) -> list[int]:
    """Parses a JSON list of token ids.

    Raises:
        RequestError: if the text is anything else.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{source} is not JSON ({error}): expected a list of token ids") from None
    if not isinstance(values, list):
        raise RequestError(
            f"{source} holds a JSON {type(values).__name__}, expected a list of token ids such as [422, 3033]"
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RequestError(f"{value!r} in {source} is no token id: expected whole numbers from 0 on")
    return values
