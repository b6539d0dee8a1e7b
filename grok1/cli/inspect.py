"""`grok1 inspect`: show the contents of a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grok1.cli.columns import columns
from grok1.cli.options import checkpoint_argument, output_options
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.jobs.result_json import json_line

if TYPE_CHECKING:
    from grok1.checkpoint.audit.inspect import Inspection, KindSummary, TensorEntry
    from grok1.params.table import ArraySpec


@click.command("inspect", short_help="Show the contents of a checkpoint.")
@checkpoint_argument
@click.option(
    "--tensors",
    is_flag=True,
    help="Print one line per tensor, with the offsets in bytes of its data and its scales in the file.",
)
@output_options
@pass_terminal
def command(terminal: Terminal, directory: Path, tensors: bool, as_json: bool) -> None:
    """Show the contents of the checkpoint in DIR: parameters, sizes, shapes, and the config of the model.

    DIR contains ckpt-0, or is the ckpt-0 directory itself. The default is $GROK1_CHECKPOINT, or else "checkpoints".

    The structure of each file is checked, but no weights are read, so this takes about a second for the release. If the
    checkpoint is damaged or does not match its config, the files with errors are listed.

    \b
    Examples:
      grok1 inspect
      grok1 inspect --tensors bard
      grok1 inspect --tensors --json | jq -r 'select(.layer == 10) | .file'
    """
    from grok1.checkpoint.audit.inspect import inspect_checkpoint
    from grok1.checkpoint.reader import Checkpoint

    inspection = inspect_checkpoint(Checkpoint.open(directory))
    if tensors and as_json:
        terminal.write("".join(json_line(_tensor_fields(tensor)) for tensor in inspection.tensors))
    elif tensors:
        terminal.write(_tensor_lines(inspection))
    elif as_json:
        terminal.write(json_line(_fields(inspection)))
    else:
        terminal.write(f"{_facts(inspection)}\n{_kind_lines(inspection)}")


def _fields(inspection: Inspection) -> dict[str, Any]:
    return {
        "directory": str(inspection.directory),
        "files": len(inspection.tensors),
        "bytes": inspection.file_bytes,
        "allocated_bytes": inspection.allocated_bytes,
        "hollow": inspection.hollow,
        "parameters": inspection.parameters,
        "active_parameters": inspection.active_parameters,
        "config": dataclasses.asdict(inspection.config),
        "kinds": [_kind_fields(kind, inspection.file_bytes) for kind in inspection.kinds()],
    }


def _kind_fields(kind: KindSummary, all_bytes: int) -> dict[str, Any]:
    return {
        "kind": kind.kind,
        "files": kind.count,
        "parameters": kind.parameters,
        "bytes": kind.file_bytes,
        "share": kind.file_bytes / all_bytes,
        "forms": [_form_fields(array, scales) | {"count": count} for (array, scales), count in kind.forms.items()],
    }


def _tensor_fields(tensor: TensorEntry) -> dict[str, Any]:
    spec, stored = tensor.spec, tensor.stored
    return {
        "parameter": spec.parameter,
        "kind": spec.kind,
        "layer": spec.layer,
        "file": spec.file_name,
        **_form_fields(spec.array, spec.scales),
        "offset": stored.array.offset,
        "scales_offset": stored.scales.offset if stored.scales else None,
        "file_bytes": tensor.file_bytes,
        "allocated_bytes": tensor.allocated_bytes,
    }


def _form_fields(array: ArraySpec, scales: ArraySpec | None) -> dict[str, Any]:
    return {"shape": array.shape, "dtype": str(array.dtype), "scales_shape": scales.shape if scales else None}


def _facts(inspection: Inspection) -> str:
    """Format the sizes of the checkpoint and the model, one per line."""
    config, size = inspection.config, inspection.file_bytes
    facts = [
        ("checkpoint", str(inspection.directory)),
        ("files", f"{len(inspection.tensors):,}"),
        ("bytes", f"{size:,} ({size / 1e9:,.2f} GB)"),
    ]
    if inspection.hollow:
        facts.append(("on disk", f"{inspection.allocated_bytes:,} bytes (hollow: the files contain no weights)"))
    facts += [
        ("parameters", f"{inspection.parameters:,} ({inspection.active_parameters:,} active per token)"),
        ("layers", f"{config.num_layers} of width {config.emb_size}"),
        (
            "attention",
            f"{config.num_q_heads} query and {config.num_kv_heads} key/value heads of size {config.key_size}",
        ),
        (
            "experts",
            f"{config.num_experts} of width {config.ffn_size} ({config.num_selected_experts} active per token)",
        ),
        ("vocabulary", f"{config.vocab_size} tokens"),
        ("context", f"{config.sequence_len} tokens"),
    ]
    return "".join(f"{name:<12}{value}\n" for name, value in facts)


def _kind_lines(inspection: Inspection) -> str:
    """Format a row for each kind, and one for each further shape of a kind."""
    rows = [("kind", "files", "bytes", "share", "shapes", "dtype", "scales")]
    for kind in inspection.kinds():
        share = f"{100 * kind.file_bytes / inspection.file_bytes:.3f} %"
        head = (str(kind.kind), str(kind.count), f"{kind.file_bytes:,}", share)
        for (array, scales), count in kind.forms.items():
            shape = f"{count} x [{_cell(array.shape)}]"
            rows.append((*head, shape, str(array.dtype), _cell(scales.shape if scales else None)))
            head = ("", "", "", "")
    return columns(rows, right={1, 2, 3})


def _tensor_lines(inspection: Inspection) -> str:
    names = ("parameter", "file", "shape", "dtype", "scales_shape", "offset", "scales_offset", "file_bytes")
    rows: list[tuple[str, ...]] = [
        ("parameter", "file", "shape", "dtype", "scales", "offset", "scales offset", "bytes")
    ]
    for tensor in inspection.tensors:
        fields = _tensor_fields(tensor)
        rows.append(tuple(_cell(fields[name]) for name in names))
    return columns(rows, right={5, 6, 7})


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "-" if value is None else str(value)
