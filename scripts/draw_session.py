#!/usr/bin/env python3
"""Generate docs/session.svg from a terminal session that runs the commands below.

Run this with grok1 installed after changing the output of these commands.
"""

import io
import os
import pty
import re
import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

TARGET = Path(__file__).parents[1] / "docs" / "session.svg"
WIDTH = 88  # columns

COMMANDS = [
    "grok1 init bard --preset bard",
    'grok1 run -c bard --seed 4 --max-tokens 60 "ROMEO."',
    'grok1 score -c bard --text "To be, or not to be"',
]


def run_in_terminal(command: str, folder: str) -> bytes:
    """Run a command in a pseudo-terminal and return its output."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.environ.update(TERM="xterm-256color", COLUMNS=str(WIDTH), LINES="40")
        os.execvp("bash", ["bash", "-c", command])
    output = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # raised on Linux once the last process closes the terminal
            break
        if not data:
            break
        output += data
    _, status = os.waitpid(process, 0)
    if status != 0:
        raise SystemExit(f"{command!r} failed: {output.decode(errors='replace')}")
    return output


def final_screen(output: bytes) -> list[str]:
    """Return the lines that remain on the screen, without erased progress bars, with colour codes.

    Interprets the control codes that rich uses: carriage return, cursor up and erase line.
    """
    lines, row = [""], 0
    for token in re.split(r"(\r|\n|\x1b\[1A|\x1b\[2K|\x1b\[\?25[lh])", output.decode()):
        if token == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif token == "\x1b[1A":
            row -= 1
        elif token == "\x1b[2K":
            lines[row] = ""
        elif token != "\r" and not token.startswith("\x1b[?25"):
            lines[row] += token
    return lines[:-1] if lines[-1] == "" else lines


def main() -> None:
    """Run the commands in an empty directory and write the SVG."""
    console = Console(record=True, width=WIDTH, force_terminal=True, color_system="truecolor", file=io.StringIO())
    folder = tempfile.mkdtemp()
    try:
        for command in COMMANDS:
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            for line in final_screen(run_in_terminal(command, folder)):
                console.print(Text.from_ansi(line))
            console.print()
    finally:
        shutil.rmtree(folder)
    picture = console.export_svg(title="grok1", unique_id="session")
    picture = re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL)  # web fonts
    TARGET.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
