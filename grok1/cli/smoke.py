"""`grok1 smoke`: test the installation end to end on a tiny model."""

from __future__ import annotations

import dataclasses
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from grok1.cli.options import output_options
from grok1.cli.param_types import complete_directory
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.errors import Grok1Error
from grok1.jobs.result_json import json_line

if TYPE_CHECKING:
    from grok1.diagnose.smoke import CheckResult


@click.command("smoke", short_help="Test the installation on a tiny model, in under a minute.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    metavar="DIR",
    show_default="a temporary directory",
    shell_complete=complete_directory,
    help="Write the checkpoint to DIR and keep it. DIR must not contain a checkpoint.",
)
@output_options
@pass_terminal
def command(terminal: Terminal, keep: Path | None, as_json: bool) -> None:
    """Test the installation end to end on a tiny model with random weights, and print one line per check.

    A checkpoint is written, verified, and loaded on one device and on all devices, and the results are compared.
    Without accelerators, the CPU is used as 8 virtual devices. The test takes less than a minute and 25 MB of disk
    space.

    The exit status is 0 if all checks pass and 1 otherwise.
    """
    from grok1.cli.loading import import_jax

    import_jax(terminal)
    from grok1.diagnose.smoke import run_smoke

    failed = []
    with ExitStack() as stack:
        folder = keep
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="grok1-smoke-")))
        stack.enter_context(terminal.interruptible())
        for check in run_smoke(folder, terminal.show_status):
            terminal.write(json_line(dataclasses.asdict(check)) if as_json else _line(check))
            if check.result == "FAILED":
                failed.append(check.name)
    if failed:
        verb = "check" if len(failed) == 1 else "checks"
        raise Grok1Error(f"{len(failed)} {verb} failed: {'; '.join(failed)}")


def _line(check: CheckResult) -> str:
    return f"{check.result:<8}{check.name:<31}{check.seconds:6.1f} s   {check.measured}\n"
