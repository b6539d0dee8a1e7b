"""Checks that the arrays of a checkpoint can be weights: finite values, positive scales, no constant matrix.

What no model has is a fault; what is only unlikely is a warning.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from grok1.checkpoint.hollow import allocated_bytes
from grok1.checkpoint.parallel import Advance
from grok1.checkpoint.pickled.scan import StoredArray, StoredTensor
from grok1.checkpoint.pickled.source import ScanError, open_regular
from grok1.params.table import Kind, TensorFile

_CHUNK = 4 << 20  # bytes that each thread holds
_SAMPLE = 64 << 10  # values of each chunk that go into the histogram
_FEW_VALUES = 16  # of the 255 that int8 weights use
_ENOUGH = 4096  # values, for a histogram that says something
_RARE = 1e-3  # of all values: symmetric quantization does not produce -128
_HOLLOW_MIN = 64 << 10  # bytes of a file, below which a disk's blocks say nothing
_PROBES = 32
_PROBE = 4096


@dataclass
class ContentReport:
    """Faults and warnings about the arrays of one file, each a clause that follows the file's name."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def is_hollow(path: Path, tensor: StoredTensor) -> bool:
    """Whether a file's arrays are holes on the disk, which read as zeros.

    An interrupted download may leave such files, and `write_checkpoint` writes them on request.

    Raises:
        ScanError: if the path is not a regular file.
        OSError: if it cannot be read.
    """
    status = os.stat(path)
    if status.st_size < _HOLLOW_MIN or allocated_bytes(status) * 4 > status.st_size:
        return False
    # A compressing filesystem also stores less than the size, so look at a few samples.
    stored, last = tensor.array, max(0, tensor.array.nbytes - _PROBE)
    with open_regular(path) as file:
        for probe in range(_PROBES):
            file.seek(stored.offset + last * probe // (_PROBES - 1))
            if any(file.read(min(_PROBE, stored.nbytes))):
                return False
    return True


def check_content(path: Path, spec: TensorFile, tensor: StoredTensor, advance: Advance) -> ContentReport:
    """Read the arrays of one file and looks for values that no weight has.

    Args:
        path: the file.
        spec: what it holds.
        tensor: where its arrays are.
        advance: called with the bytes of each chunk read.
    """
    report = ContentReport()
    buffer = bytearray(min(_CHUNK, max(array.nbytes for array in (tensor.array, tensor.scales) if array)))
    try:
        with open_regular(path) as file:
            if tensor.scales is None:
                _check_floats(spec, _ArrayReader(file, tensor.array, buffer, advance), report)
            else:
                _check_scales(_ArrayReader(file, tensor.scales, buffer, advance), report)
                _check_values(spec, _ArrayReader(file, tensor.array, buffer, advance), report)
    except ScanError as error:
        report.faults.append(f"cannot be read: {error.fault}")
    except OSError as error:
        report.faults.append(f"cannot be read: {error.strerror or error}")
    return report


class _ArrayReader:
    """Reads an array in chunks, all into the same buffer."""

    def __init__(self, file: BinaryIO, stored: StoredArray, buffer: bytearray, advance: Advance) -> None:
        self.size = math.prod(stored.shape)
        self._file, self._buffer, self._advance = file, memoryview(buffer), advance
        # bfloat16 as plain bits: NumPy computes with those much faster
        self._dtype = np.dtype("<u2") if stored.dtype.itemsize == 2 else stored.dtype
        file.seek(stored.offset)

    def read(self, size: int) -> Iterator[np.ndarray]:
        """Return the next `size` values."""
        rest = size * self._dtype.itemsize
        whole = len(self._buffer) // self._dtype.itemsize * self._dtype.itemsize
        while rest:
            piece = self._buffer[: min(rest, whole)]
            filled = 0
            while filled < len(piece):
                count = self._file.readinto(piece[filled:])  # type: ignore[attr-defined]
                if not count:
                    raise OSError("the file was truncated while it was being read")
                filled += count
            rest -= len(piece)
            self._advance(len(piece))
            yield np.frombuffer(piece, self._dtype)


def _check_floats(spec: TensorFile, array: _ArrayReader, report: ContentReport) -> None:
    """A norm's scales, a router or the embeddings."""
    not_finite, low, high = 0, np.inf, -np.inf
    for chunk in array.read(array.size):
        finite = np.isfinite(chunk)
        not_finite += chunk.size - int(np.count_nonzero(finite))
        low = min(low, float(np.min(chunk, where=finite, initial=np.inf)))
        high = max(high, float(np.max(chunk, where=finite, initial=-np.inf)))
    if not_finite:
        report.faults.append(f"has {not_finite:,} NaN or infinite values of {array.size:,}")
    if low == high == 0:
        report.faults.append("has only zeros")
    elif low == high and spec.kind is not Kind.NORMS:
        report.faults.append(f"has only the value {low:g}")
    elif spec.kind is Kind.NORMS and low < 0:
        report.warnings.append(f"has norm scales as low as {low:g}, expected 0 or more")


def _check_scales(array: _ArrayReader, report: ContentReport) -> None:
    """A quantized weight's scales, as the bits of bfloat16."""
    not_finite = zero = negative = 0
    for bits in array.read(array.size):
        magnitude = bits & 0x7FFF
        odd = magnitude >= 0x7F80
        not_finite += int(np.count_nonzero(odd))
        zero += int(np.count_nonzero(magnitude == 0))
        negative += int(np.count_nonzero((bits > 0x8000) & ~odd))
    for count, what in ((not_finite, "NaN or infinite"), (zero, "zero"), (negative, "negative")):
        if count:
            report.faults.append(f"has {count:,} {what} scales of {array.size:,}")


def _check_values(spec: TensorFile, array: _ArrayReader, report: ContentReport) -> None:
    """A quantized weight's int8 values, scale group by scale group."""
    assert spec.groups is not None
    groups = math.prod(spec.shape[:-2]) * spec.groups
    histogram = np.zeros(256, np.int64)
    lowest, hollow_bytes = 0, 0
    constants: list[int | None] = []
    for _ in range(groups):
        low, high = 127, -128
        for chunk in array.read(array.size // groups):
            chunk_low, chunk_high = int(chunk.min()), int(chunk.max())
            low, high = min(low, chunk_low), max(high, chunk_high)
            if chunk_low == -128:
                lowest += int(np.count_nonzero(chunk == -128))
            if chunk_low == chunk_high == 0 and chunk.size == _CHUNK:
                hollow_bytes += chunk.size
            histogram += np.bincount(chunk[:_SAMPLE].view(np.uint8), minlength=256)
        constants.append(low if low == high else None)
    _report_constants(constants, spec.groups, array.size // groups, report)
    constant = any(value is not None for value in constants)
    if hollow_bytes and not constant:
        report.faults.append(f"has {hollow_bytes:,} zero bytes in runs of {_CHUNK:,} or more")
    used, sampled = int(np.count_nonzero(histogram)), int(histogram.sum())
    if not constant and used < _FEW_VALUES and sampled >= _ENOUGH:
        report.warnings.append(f"has only {used} different values in {sampled:,}, expected nearly 255")
    if lowest > _RARE * array.size:
        report.warnings.append(f"has the value -128 {lowest:,} times in {array.size:,}, expected only -127 to 127")


def _report_constants(constants: list[int | None], per_matrix: int, size: int, report: ContentReport) -> None:
    """Report scale groups and whole matrices that are constant.

    Args:
        constants: the value of each constant group; None for others.
        per_matrix: groups of a matrix.
        size: values of a group.
        report: gets the faults.
    """
    if size < 2:
        return
    parts = [set(constants[start : start + per_matrix]) for start in range(0, len(constants), per_matrix)]
    matrices = {number: part.pop() for number, part in enumerate(parts) if len(part) == 1 and None not in part}
    for value in sorted(set(matrices.values()), key=str):
        numbers = [number for number, found in matrices.items() if found == value]
        which = "" if len(parts) == 1 else f"matrices {_listed(numbers)} of {len(parts)}"
        values = "only zeros" if value == 0 else f"only the value {value}"
        report.faults.append(f"has {values} in {which}" if which else f"has {values}")
    groups = [
        number for number, value in enumerate(constants) if value is not None and number // per_matrix not in matrices
    ]
    if groups:
        report.faults.append(
            f"has a single value in scale {'group' if len(groups) == 1 else 'groups'} {_listed(groups)} "
            f"of {len(constants)}"
        )


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:4]))
    return shown if len(numbers) <= 4 else f"{shown} and {len(numbers) - 4} more"
