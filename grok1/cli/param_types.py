"""Types of option values, and shell completion of directory names."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem

from grok1.host.sizes import format_bytes, parse_bytes


class MeshShape(click.ParamType):
    """The shape of a device mesh, such as 1,8, parsed into a tuple."""

    name = "DATA,MODEL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse the shape."""
        try:
            data, model = (int(part) for part in value.split(","))
        except ValueError:
            data = model = 0
        if data < 1 or model < 1:
            self.fail(f'expected two positive integers such as 1,8, got "{value}".', param, ctx)
        return data, model


class ByteSize(click.ParamType):
    """A size in bytes, such as 80GB or 512MiB, parsed into an int of at least `at_least`."""

    name = "SIZE"

    def __init__(self, at_least: int = 1):
        self.at_least = at_least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse the size."""
        if isinstance(value, int):
            return value
        try:
            size = parse_bytes(value)
        except ValueError:
            self.fail(f'expected a size such as 512MB, 80GB or 2GiB, got "{value}".', param, ctx)
        if size < self.at_least:
            least = f"at least {format_bytes(self.at_least)}" if self.at_least > 1 else "more than 0"
            self.fail(f'expected {least}, got "{value}".', param, ctx)
        return size


class Numbers(click.ParamType):
    """One or more positive integers, such as 64,512, parsed into a tuple."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse the numbers."""
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            numbers = (0,)
        if min(numbers) < 1:
            self.fail(f'expected one or more positive integers such as 64,512, got "{value}".', param, ctx)
        return numbers


def complete_directory(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a directory in the shell; a `shell_complete` of click."""
    return [CompletionItem(incomplete, type="dir")]
