"""`grok1 verify`: check that a checkpoint is complete and valid."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from grok1.cli.options import checkpoint_argument, output_options
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.jobs.result_json import json_line

if TYPE_CHECKING:
    from grok1.checkpoint.audit.verify import Report


@click.command("verify", short_help="Check that a checkpoint is complete and valid.")
@checkpoint_argument
@click.option(
    "--content",
    is_flag=True,
    help="Read all data and check for invalid values: NaN, scales that are not positive, constant matrices, and holes "
    "left by an incomplete download.",
)
@click.option(
    "--manifest",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Read all data and compare the SHA-256 checksum of each file with that in FILE, written by --write-manifest "
    "or sha256sum.",
)
@click.option(
    "--write-manifest",
    "new_manifest",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Read all data and, if no errors are found, write the SHA-256 checksum and size of each file to FILE. To "
    "check it with sha256sum -c, change to the directory that contains ckpt-0.",
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
    """Check that the checkpoint in DIR is complete and valid, and print what is wrong with each file and how to fix it.

    DIR contains ckpt-0, or is the ckpt-0 directory itself. The default is $GROK1_CHECKPOINT, or else "checkpoints".

    By default, only the structure of the files is checked, which takes about a second: each file must exist, have the
    right size, and contain an array of the expected shape and data type. Two swapped files of the same shape are only
    detected with --manifest.

    --content, --manifest and --write-manifest read all data, at the speed of the disk. If computing checksums is
    interrupted, run the same command again to resume; the checksums so far are saved in FILE.partial.

    The exit status is 0 if no errors are found and 1 otherwise.

    \b
    Examples:
      grok1 verify checkpoints
      grok1 verify --content --write-manifest grok1.sha256 checkpoints
      grok1 verify --manifest grok1.sha256 checkpoints
    """
    if manifest is not None and new_manifest is not None:
        raise click.UsageError("--manifest and --write-manifest cannot be used together.")

    from grok1.checkpoint.audit.verify import verify
    from grok1.checkpoint.reader import faults_sentence
    from grok1.errors import CheckpointError

    terminal.show_status("checking the structure of the files")
    with terminal.interruptible():
        report = verify(
            directory, content=content, manifest=manifest, new_manifest=new_manifest, progress=terminal.show_bytes
        )
    terminal.clear()
    terminal.write(json_line(_as_json(report)) if as_json else _as_text(report))
    if report.resumed:
        terminal.note(f"Reused the checksums of {report.resumed} unchanged files from an interrupted run.")
    if report.faults:
        if new_manifest is not None:
            terminal.note(f"{new_manifest} was not written, because errors were found.")
        if report.hollow:
            raise CheckpointError(f"{report.directory} is hollow and contains no weights: download the weights")
        raise CheckpointError(
            faults_sentence(report.directory, report.faults, report.files, has_config=report.stated, max_listed=0)
        )


def _as_text(report: Report) -> str:
    lines = [f"{fault}: {fault.advice}" for fault in report.faults]
    lines += [f"warning: {warning}: {warning.advice}" for warning in report.warnings]
    if report.fetch_command is not None:
        lines.append(f"to download again: {report.fetch_command}")
    elif report.to_fetch:
        lines.append(f"files to download again: {' '.join(report.to_fetch)}")
    if not report.faults:
        lines.append(f"{report.files} files, {report.structure.total_bytes:,} bytes: ok")
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
