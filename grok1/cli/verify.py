"""`grok1 verify`: checks that a checkpoint is complete and valid."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from grok1.cli.options import checkpoint_argument, output_options
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.jobs.result_json import json_line

if TYPE_CHECKING:
    from grok1.checkpoint.audit.verify import Report


@click.command("verify", short_help="Check that a checkpoint is whole and sane.")
@checkpoint_argument
@click.option(
    "--content",
    is_flag=True,
    help="Read everything, and look for what no weight can be: NaN, scales that are not positive, matrices that are "
    "all zero or all the same, holes of an unfinished download.",
)
@click.option(
    "--manifest",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Read everything, and compare each file with its SHA-256 in FILE, which --write-manifest or sha256sum wrote.",
)
@click.option(
    "--write-manifest",
    "new_manifest",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Read everything, and write the SHA-256 and size of each file to FILE, if nothing is wrong. sha256sum -c "
    "understands it, in the folder that holds ckpt-0.",
)
@output_options
@pass_terminal
def command(
    terminal: Terminal,
    directory: Path,
    content: bool,
    manifest: Path | None,
    new_manifest: Path | None,
    as_json: bool,
) -> None:
    """Check that the checkpoint in DIR is whole, and say of each file that is not what is wrong and what to do.

    DIR holds ckpt-0, or is it; without DIR it is $GROK1_CHECKPOINT, or else checkpoints. Every file's structure is
    checked, which takes a second: that it is there, whole, and has the shape and type of its place. Files of the same
    shape in each other's place differ in their content only: a manifest tells them apart.

    The other checks read everything, and run as fast as the disk. Hashing that is interrupted goes on where it was
    when the command is given again: FILE.partial keeps what is done.

    Exit code 0 if all is right, 1 if not.

    \b
    grok1 verify checkpoints
    grok1 verify --content --write-manifest grok1.sha256 checkpoints
    grok1 verify --manifest grok1.sha256 checkpoints
    """
    if manifest is not None and new_manifest is not None:
        raise click.UsageError("--manifest and --write-manifest are both given: check against one first, then write.")

    from grok1.checkpoint.audit.verify import verify
    from grok1.checkpoint.reader import faults_sentence
    from grok1.errors import CheckpointError

    terminal.show_status("checking the structure")
    with terminal.interruptible():
        report = verify(
            directory, content=content, manifest=manifest, new_manifest=new_manifest, progress=terminal.show_bytes
        )
    terminal.clear()
    terminal.write(json_line(_as_json(report)) if as_json else _as_text(report))
    if report.resumed:
        terminal.note(f"{report.resumed} files were hashed before and have not changed.")
    if report.faults:
        if new_manifest is not None:
            terminal.note(f"{new_manifest} was not written.")
        if report.hollow:
            raise CheckpointError(f"{report.directory} is hollow, it has shapes but no weights: download the weights")
        raise CheckpointError(
            faults_sentence(report.directory, report.faults, report.files, has_config=report.stated, told=0)
        )


def _as_text(report: Report) -> str:
    lines = [f"{fault}: {fault.advice}" for fault in report.faults]
    lines += [f"warning: {warning}: {warning.advice}" for warning in report.warnings]
    if report.fetch_command is not None:
        lines.append(f"to fetch again: {report.fetch_command}")
    elif report.to_fetch:
        lines.append(f"files to fetch again: {' '.join(report.to_fetch)}")
    if not report.faults:
        lines.append(f"{report.files} files, {report.structure.total_bytes:,} bytes: right")
    return "".join(f"{line}\n" for line in lines)


def _as_json(report: Report) -> dict[str, object]:
    return {
        "directory": str(report.directory),
        "right": not report.faults,
        "files": report.files,
        "bytes": report.structure.total_bytes,
        "faults": [
            {"file": fault.file, "fault": fault.fault, "advice": fault.advice, "fetch": fault.fetch}
            for fault in report.faults
        ],
        "warnings": [
            {"file": warning.file, "warning": warning.fault, "advice": warning.advice} for warning in report.warnings
        ],
        "fetch_command": report.fetch_command,
    }
