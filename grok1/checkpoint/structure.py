"""Checks that the files of a checkpoint are those of its table: all there, each with the right arrays."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grok1.checkpoint.pickled.framing import tensor_file_size
from grok1.checkpoint.pickled.scan import StoredTensor, scan
from grok1.checkpoint.pickled.source import ScanError
from grok1.config import ModelConfig
from grok1.errors import CheckpointError
from grok1.params.table import TensorFile, tensor_table

_FILE_PREFIX = "tensor"  # only such files belong to a checkpoint; others in its directory are not looked at

_Signature = tuple[str, str]
"""An array and its scales, described; files with equal signatures can be confused."""


@dataclass(frozen=True)
class FileFault:
    """A faulty file.

    Attributes:
        file: its name.
        fault: a clause that follows the name, such as `is missing`.
        advice: what to do.
        fetch: whether downloading the file helps.
        separator: text between the name and the fault.
    """

    file: str
    fault: str
    advice: str
    fetch: bool = True
    separator: str = " "

    def __str__(self) -> str:
        return f"{self.file}{self.separator}{self.fault}"


@dataclass(frozen=True)
class Structure:
    """What the files of a checkpoint hold.

    Attributes:
        table: what each file should hold.
        tensors: where the arrays are, by the index of each correct file.
        faults: of the other files, and of files that do not belong there.
    """

    table: tuple[TensorFile, ...]
    tensors: dict[int, StoredTensor]
    faults: tuple[FileFault, ...]

    @property
    def total_bytes(self) -> int:
        """Size of the correct files."""
        return sum(tensor.file_bytes for tensor in self.tensors.values())


def find_faults(directory: Path, config: ModelConfig) -> Structure:
    """Scan every file of a checkpoint; reads no array.

    Swapped files of the same shape are not detected, because a file does not record its layer.

    Args:
        directory: the directory of tensor files.
        config: determines which files there should be.

    Raises:
        CheckpointError: if the directory cannot be listed.
    """
    table = tensor_table(config)
    names = _tensor_names(directory)
    right: dict[int, StoredTensor] = {}
    wrong: dict[int, StoredTensor] = {}
    faults: dict[int, FileFault] = {}
    for spec in table:
        if spec.file_name not in names:
            faults[spec.index] = FileFault(spec.file_name, "is missing", "download it")
            continue
        path = directory / spec.file_name
        try:
            tensor = scan(path)
        except ScanError as error:
            fault = error.fault + _size_clause(path, spec)
            faults[spec.index] = FileFault(spec.file_name, fault, "download it again", separator=": ")
        else:
            (right if _signature(tensor) == _signature(spec) else wrong)[spec.index] = tensor
    unfilled: dict[_Signature, list[TensorFile]] = defaultdict(list)  # files of the table without their arrays
    for spec in table:
        if spec.index not in right:
            unfilled[_signature(spec)].append(spec)
    for index, tensor in wrong.items():
        faults[index] = _mismatch(table[index], tensor, unfilled)
    unexpected = [
        FileFault(name, "is unexpected", "move it out of the directory", fetch=False)
        for name in sorted(names - {spec.file_name for spec in table})
    ]
    return Structure(table, right, (*(faults[index] for index in sorted(faults)), *unexpected))


def _tensor_names(directory: Path) -> set[str]:
    """Names in the directory that look like tensor files."""
    try:
        with os.scandir(directory) as entries:
            return {entry.name for entry in entries if entry.name.startswith(_FILE_PREFIX)}
    except OSError as error:
        raise CheckpointError(f"cannot list {directory}: {error.strerror}; check its permissions") from None


def _size_clause(path: Path, spec: TensorFile) -> str:
    """Return a clause that compares the size of a file with its expected size; empty if they are equal or unknown."""
    try:
        size = path.stat().st_size
    except OSError:
        return ""
    expected = tensor_file_size(spec)
    if not path.is_file() or size == expected:
        return ""
    difference, word = abs(size - expected), "short" if size < expected else "long"
    return f"; {difference:,} byte{'s' * (difference != 1)} too {word} ({size:,}, expected {expected:,})"


def _signature(arrays: StoredTensor | TensorFile) -> _Signature:
    return str(arrays.array), "none" if arrays.scales is None else str(arrays.scales)


def _mismatch(spec: TensorFile, found: StoredTensor, unfilled: Mapping[_Signature, Sequence[TensorFile]]) -> FileFault:
    """Return the fault of a file with the wrong arrays, which may be those of the nearest other file of `unfilled`."""
    (array, scales), (expected_array, expected_scales) = _signature(found), _signature(spec)
    if array != expected_array:
        fault = f"contains {array}, expected {expected_array}"
    else:
        fault = f"contains scales {scales}, expected {expected_scales}"
    advice = "download it again"
    candidates = unfilled.get((array, scales), ())
    other = min(candidates, key=lambda candidate: abs(candidate.index - spec.index), default=None)
    if other is not None:
        fault += f"; it has the contents of {other.file_name} ({other.parameter})"
        advice = "rename the files, or download both again"
    return FileFault(spec.file_name, f"({spec.parameter}) {fault}", advice)
