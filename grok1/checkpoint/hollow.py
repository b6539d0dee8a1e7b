"""Hollow tensor files: sparse files whose array data read as zeros and take no disk space."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from grok1.checkpoint.parallel import ByteProgress
from grok1.checkpoint.pickled.framing import Payload, tensor_file_size, tensor_segments
from grok1.errors import CheckpointError
from grok1.params.table import TensorFile

_BLOCK = 4096  # filesystems allocate multiples of this
_LARGE = 1 << 20  # smaller files do not show whether the filesystem supports sparse files


def allocated_bytes(status: os.stat_result) -> int:
    """Return the disk space of a file in bytes; less than its size if it is sparse."""
    return status.st_blocks * 512  # the unit of st_blocks, not the filesystem's


def hollow_disk_bytes(spec: TensorFile) -> int:
    """Return an upper bound of the disk space of the hollow file: its literal bytes, in whole blocks."""
    literals = [segment for segment in tensor_segments(spec) if not isinstance(segment, Payload)]
    # A run may cross a block boundary.
    return min(tensor_file_size(spec), sum(len(segment) + 2 * _BLOCK for segment in literals))


def write_hollow_tensors(folder: Path, table: tuple[TensorFile, ...], progress: ByteProgress | None = None) -> None:
    """Write tensor files of the right size and framing without their arrays' data.

    Args:
        folder: an existing directory.
        table: the files.
        progress: called after each file; counts holes too.

    Raises:
        CheckpointError: if the filesystem does not support sparse files and lacks the space for full ones.
        OSError: if a file cannot be written.
    """
    done, total = 0, sum(tensor_file_size(spec) for spec in table)
    for spec in table:
        status = _write_hollow(folder / spec.file_name, spec)
        done += status.st_size
        if status.st_size >= _LARGE and allocated_bytes(status) > status.st_size // 2:
            _check_room_for_filled(folder, spec, allocated_bytes(status), total - done)
        if progress:
            progress(done, total)


def _write_hollow(path: Path, spec: TensorFile) -> os.stat_result:
    with path.open("wb") as file:
        for segment in tensor_segments(spec):
            if isinstance(segment, Payload):
                file.seek(segment.nbytes, os.SEEK_CUR)
            else:
                file.write(segment)  # the last segment is literal, so the file gets its full size
        file.flush()
        return os.fstat(file.fileno())


def _check_room_for_filled(folder: Path, spec: TensorFile, allocated: int, remaining: int) -> None:
    free = shutil.disk_usage(folder).free
    if remaining > free:
        raise CheckpointError(
            f"the filesystem does not support sparse files: {spec.file_name} uses {allocated / 1e6:,.0f} MB instead of "
            f"less than 1 MB, and the other files need {remaining / 1e9:,.2f} GB with {free / 1e9:,.2f} GB free; "
            "choose a "
            "filesystem that supports them, such as ext4, XFS, btrfs or APFS"
        )
