import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_documented_commands_are_what_help_says():
    spec = importlib.util.spec_from_file_location("document_commands", ROOT / "scripts" / "document_commands.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == script.document()


def test_the_readme_names_every_command():
    from grok1.cli import cli

    named = set(re.findall(r"`grok1 ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert set(cli.list_commands(None)) <= named
