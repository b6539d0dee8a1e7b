#!/usr/bin/env python3
"""Writes docs/commands.md, the help of every command; a test holds the two equal.

Run it with the project installed, after a change to a command or an option.
"""

from pathlib import Path

import click

from grok1.cli import cli

TARGET = Path(__file__).parents[1] / "docs" / "commands.md"


def document() -> str:
    """The text of docs/commands.md."""
    parts = ["# Commands\n\nWhat `grok1 COMMAND --help` says. Written by `scripts/document_commands.py`.\n"]
    width = {"terminal_width": 100, "max_content_width": 100}
    group = click.Context(cli, info_name="grok1", **width, **cli.context_settings)
    parts.append(f"```\n{cli.get_help(group)}\n```\n")
    for name in cli.list_commands(group):
        command = cli.get_command(group, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=group, **width)
        parts.append(f"## grok1 {name}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
