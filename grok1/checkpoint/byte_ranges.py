"""Reads byte ranges of files. Mapped files would count as resident memory, and raise SIGBUS when truncated."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from grok1.errors import CheckpointError

STAGING_BYTES = 1 << 20
"""Size of the buffer of `read_columns`."""

_STEP_BYTES = 4 << 20  # read between two calls of the check
_RUNS_AHEAD = 64

Check = Callable[[], None]
"""Called every few megabytes; may raise to stop reading."""


class RangeReader:
    """An open file that can be read at any offset; a context manager.

    Args:
        path: the file.
        check: called every few megabytes.

    Attributes:
        bytes_read: bytes read so far.

    Raises:
        CheckpointError: if the file cannot be opened.
    """

    def __init__(self, path: Path, check: Check = lambda: None):
        self._path = path
        self.check = check
        self.bytes_read = 0
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(path, error) from None

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, target: memoryview, offset: int) -> None:
        """Fill `target`, of bytes, starting at `offset`.

        Raises:
            CheckpointError: if the file ends too early or cannot be read.
        """
        done = 0
        while done < len(target):
            if done:
                self.check()
            step = target[done : done + _STEP_BYTES]
            try:
                count = os.preadv(self._descriptor, [step], offset + done)
            except OSError as error:
                raise _unreadable(self._path, error) from None
            if not count:
                raise became_shorter(self._path)
            self.bytes_read += count
            done += count

    def read_runs(self, target: memoryview, offset: int, width: int, stride: int) -> None:
        """Fill `target` with runs of `width` bytes that start at `offset` and every `stride` bytes after it."""
        for begin in range(0, len(target), width):
            run = target[begin : begin + width]
            try:
                count = os.preadv(self._descriptor, [run], offset)
            except OSError as error:
                raise _unreadable(self._path, error) from None
            if count < width:
                self.read(run, offset)  # reads it again, or raises
            else:
                self.bytes_read += count
            offset += stride

    def expect(self, offset: int, length: int) -> None:
        """Start readahead of these bytes, where the system supports it."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def forget(self) -> None:
        """Drop the file from the page cache, where the system supports it."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def read_columns(file: RangeReader, offset: int, row_bytes: int, columns: Sequence[tuple[int, np.ndarray]]) -> None:
    """Read columns of a row-major matrix of bytes without reading the others.

    Adjacent columns are read together and copied from a small buffer. A contiguous column is read in place.

    Args:
        file: the file.
        offset: start of the matrix in the file.
        row_bytes: length of a row.
        columns: for each its first byte in the row, and the array to fill: uint8 [rows, width], C-contiguous.

    Raises:
        CheckpointError: if the file cannot be read or has become shorter.
    """
    for together in _adjacent(columns):
        start, out = together[0]
        width = sum(column.shape[1] for _, column in together)
        if len(together) == 1 and (len(out) == 1 or width == row_bytes):
            file.read(out.reshape(-1).data, offset + start)
        elif len(together) == 1 or width > STAGING_BYTES:
            for alone in together:
                _read_runs(file, offset, row_bytes, *alone)
        else:
            _read_rows(file, offset, row_bytes, width, together)


def _adjacent(columns: Sequence[tuple[int, np.ndarray]]) -> list[list[tuple[int, np.ndarray]]]:
    """Group columns without a gap between them."""
    groups: list[list[tuple[int, np.ndarray]]] = []
    end = -1
    for start, out in sorted(columns, key=lambda column: column[0]):
        if start == end:
            groups[-1].append((start, out))
        else:
            groups.append([(start, out)])
        end = start + out.shape[1]
    return groups


def _read_rows(
    file: RangeReader, offset: int, row_bytes: int, width: int, columns: Sequence[tuple[int, np.ndarray]]
) -> None:
    """Read adjacent columns through a buffer."""
    begin, rows = columns[0][0], len(columns[0][1])
    block = min(rows, STAGING_BYTES // width)
    staging = np.empty((block, width), np.uint8)
    for first in range(0, rows, block):
        count = min(block, rows - first)
        _read_runs(file, offset + first * row_bytes, row_bytes, begin, staging[:count])
        if width == row_bytes and first + count < rows:
            file.expect(offset + (first + count) * row_bytes, min(block, rows - first - count) * row_bytes)
        for start, out in columns:
            out[first : first + count] = staging[:count, start - begin : start - begin + out.shape[1]]


def _read_runs(file: RangeReader, offset: int, row_bytes: int, start: int, out: np.ndarray) -> None:
    """Read a column run by run, announcing some runs ahead to keep the disk busy."""
    target, width = out.reshape(-1).data, out.shape[1]
    if width == row_bytes:
        file.check()
        file.read(target, offset + start)
        return
    for first in range(0, len(out), _RUNS_AHEAD):
        file.check()
        rows = range(first, min(first + _RUNS_AHEAD, len(out)))
        for row in rows:
            file.expect(offset + row * row_bytes + start, width)
        file.read_runs(target[first * width : rows.stop * width], offset + first * row_bytes + start, width, row_bytes)


def became_shorter(path: Path) -> CheckpointError:
    """Return the error for a file that was truncated while in use."""
    return CheckpointError(f"{path} was truncated while it was being read; restore the file and run the command again")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot read {path}: {error.strerror}; check the file and its disk")
