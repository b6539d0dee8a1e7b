"""Fingerprints of checkpoints, from samples of their files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from grok1.checkpoint.reader import Checkpoint

MANIFEST = "grok1.sha256"
"""Name of the manifest in or beside the directory of tensor files."""

_SAMPLE_BYTES = 4096


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a SHA-256, hexadecimal, of the config, and of the size and samples of each file.

    The samples are 4096 bytes at the beginning, in the middle and at the end. A damaged byte between them is
    not detected; `verify` detects it.

    Raises:
        OSError: if a file cannot be read.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(checkpoint.config), sort_keys=True).encode())
    for spec in checkpoint.table:
        size, samples = _samples(checkpoint.directory / spec.file_name)
        digest.update(f"{spec.file_name} {size}\n".encode())
        digest.update(samples)
    return digest.hexdigest()


def _samples(path: Path) -> tuple[int, bytes]:
    """Return the size of a file, and samples of it."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        samples = []
        for start in sorted({0, size // 2, max(0, size - _SAMPLE_BYTES)}):
            file.seek(start)
            samples.append(file.read(_SAMPLE_BYTES))
        return size, b"".join(samples)


def fingerprint_parts(checkpoint: Checkpoint) -> dict[str, str]:
    """Return descriptions of the config, the size and samples of each file, and the manifest if there is one, by name.

    Raises:
        OSError: if a file cannot be read.
    """
    parts = {"its config": json.dumps(dataclasses.asdict(checkpoint.config), sort_keys=True)}
    for spec in checkpoint.table:
        size, samples = _samples(checkpoint.directory / spec.file_name)
        parts[spec.file_name] = f"{size} bytes, {hashlib.sha256(samples).hexdigest()[:16]}"
    for folder in (checkpoint.directory, checkpoint.directory.absolute().parent):
        if (folder / MANIFEST).is_file():
            parts[MANIFEST] = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16]
            break
    return parts


def compare(one: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """Return the first name by which two results of `fingerprint_parts` differ; None for the same checkpoint.

    A manifest that only one of them has makes no difference.
    """
    names = [name for name in {**one, **other} if name != MANIFEST or (name in one and name in other)]
    return next((name for name in names if one.get(name) != other.get(name)), None)
