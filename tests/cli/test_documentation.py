"""The documentation agrees with the program: its examples run, and its links lead somewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grok1.cli import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "checkpoints" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(r"(<!-- not tested: .+? -->\n)?^```(sh|python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A code block, preceded by a comment if it is not to be run."""

PREPARE = f'set -euo pipefail\ngrok1() {{ "{sys.executable}" -m grok1 "$@"; }}\n'
"""`grok1` in the examples is the program under test."""


def _name(path):
    return str(path.relative_to(ROOT))


def _run(command, folder):
    """Runs an example and returns what it prints."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GROK1_")}
    variables["PYTHONPATH"] = f"{ROOT}{os.pathsep}{variables.get('PYTHONPATH', '')}"
    flags = variables["XLA_FLAGS"].split()
    variables["XLA_FLAGS"] = " ".join(flag for flag in flags if "device_count" not in flag)  # one device
    done = subprocess.run(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    return done.returncode, done.stdout


def _pattern(expected):
    """A regular expression for an expected output, in which a line `...` stands for any lines."""
    lines = ["(.*\n)*" if line == "...\n" else re.escape(line) for line in expected.splitlines(keepends=True)]
    return re.compile("".join(lines))


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if BLOCK.search(path.read_text())], ids=_name)
def test_examples_run(document, tmp_path):
    text = document.read_text(encoding="utf-8")
    if "grok1 init bard" not in text:
        assert _run(["bash", "-c", PREPARE + "grok1 init bard --preset bard"], tmp_path)[0] == 0
    for excluded, language, block in BLOCK.findall(text):
        if excluded:
            continue
        if language == "python":
            code, output = _run([sys.executable, "-c", block], tmp_path)
            assert code == 0, f"{block}\n{output}"
        elif language == "sh":
            code, output = _run(["bash", "-c", PREPARE + block], tmp_path)
            assert code == 0, f"{block}\n{output}"
        else:  # commands after "$ ", each followed by its output
            for command, expected in re.findall(r"^\$ (.*\n)((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
                _, output = _run(["bash", "-c", PREPARE + command], tmp_path)
                assert _pattern(expected).fullmatch(output), f"{command}\n{output}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_links_lead_to_files_and_headings(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}, target


def test_commands_md_is_the_help_of_every_command():
    spec = importlib.util.spec_from_file_location("document_commands", ROOT / "scripts" / "document_commands.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == script.document()


def test_the_readme_names_every_command():
    named = set(re.findall(r"`grok1 ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert set(cli.list_commands(None)) <= named


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
