"""What tells one checkpoint from another without reading all of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from grok1.checkpoint.reader import Checkpoint

_SAMPLE_BYTES = 4096


def fingerprint(checkpoint: Checkpoint) -> str:
    """A SHA-256, hexadecimal, of the config, the size of every file, and samples of each.

    The samples are 4096 bytes at the beginning, in the middle and at the end, so that a copy has the same fingerprint
    and other weights have another. It does not find a damaged byte between them: that is `verify`'s work.

    Raises:
        OSError: if a file cannot be read.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(checkpoint.config), sort_keys=True).encode())
    for spec in checkpoint.table:
        with (checkpoint.directory / spec.file_name).open("rb") as file:
            size = file.seek(0, 2)
            digest.update(f"{spec.file_name} {size}\n".encode())
            for start in sorted({0, size // 2, max(0, size - _SAMPLE_BYTES)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
