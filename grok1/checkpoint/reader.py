"""Finding and opening a checkpoint, and reading its arrays: by mapping, or slice by slice."""

from __future__ import annotations

import math
import mmap
import os
import re
import threading
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grok1.checkpoint.byte_ranges import Check, RangeReader, became_shorter, read_columns
from grok1.checkpoint.pickled.scan import StoredArray, StoredTensor
from grok1.checkpoint.structure import FileFault, find_faults
from grok1.config import PRESETS, ModelConfig
from grok1.errors import CheckpointError
from grok1.params.table import CHECKPOINT_DIR, TensorFile

_FILE_NAME = re.compile(r"tensor\d+_\d+")

_Ranges = tuple[tuple[int, int], ...]
_Read = tuple[_Ranges, np.ndarray]  # a slice, and where it goes


def find_checkpoint(path: Path) -> Path:
    """Return the directory of tensor files: `path/ckpt-0`, or `path` itself if it holds tensor files.

    Raises:
        CheckpointError: if there is neither.
    """
    try:
        inner = path / CHECKPOINT_DIR
        if inner.is_dir():
            return inner
        if path.is_dir() and holds_tensor_files(path):
            return path
        found = f"{path} has no {CHECKPOINT_DIR} directory" if path.exists() else f"{path} does not exist"
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    raise CheckpointError(
        f"no checkpoint found: {found}; pass its directory with -c DIR, download the release (see "
        "checkpoints/README.md), or create a small model with `grok1 init bard --preset bard` and pass -c bard"
    )


def holds_tensor_files(directory: Path) -> bool:
    """Whether a directory contains files named like tensor files.

    Raises:
        OSError: if it cannot be listed.
    """
    return any(_FILE_NAME.fullmatch(name) for name in os.listdir(directory))


def parent_folder(directory: Path) -> Path:
    """Return the parent of a directory, relative if its own path is, for messages."""
    return directory.parent if directory.name not in ("", "..") else directory.absolute().parent


def stated_or_release(directory: Path) -> tuple[ModelConfig, bool]:
    """Return the config of a directory of tensor files, and whether it comes from a `config.json` in or next to it.

    Without such a file the checkpoint must be the release.

    Raises:
        ConfigError: if the file is invalid.
        CheckpointError: if it is not a regular file.
    """
    for path in (directory / "config.json", parent_folder(directory) / "config.json"):
        if path.is_file():
            return ModelConfig.read(path), True
        if path.exists():
            raise CheckpointError(f"{path} is not a regular file, expected a model config; move or delete it")
    return PRESETS["grok-1"], False


@dataclass(eq=False)
class Checkpoint:
    """A checkpoint whose files have been scanned and match its config. It keeps no file open, and is thread-safe.

    Attributes:
        config: from `config.json`, or else the release's.
        directory: the directory of tensor files.
        table: what each file holds.
        tensors: where its arrays are, in the same order.
        bytes_read: bytes read from the files, except through views.
    """

    config: ModelConfig
    directory: Path
    table: tuple[TensorFile, ...]
    tensors: tuple[StoredTensor, ...]
    bytes_read: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _mappings: weakref.WeakValueDictionary[int, mmap.mmap] = field(
        default_factory=weakref.WeakValueDictionary, init=False, repr=False
    )

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Find a checkpoint and checks every file of it; reads no array.

        Args:
            path: a directory that holds `ckpt-0`, or the directory of tensor files itself.

        Raises:
            CheckpointError: if there is none, or files are missing, unexpected, damaged or do not match the config;
                the message counts all faults and lists the first three.
            ConfigError: if `config.json` is invalid.
        """
        directory = find_checkpoint(path)
        config, stated = stated_or_release(directory)
        structure = find_faults(directory, config)
        if structure.faults:
            raise CheckpointError(faults_sentence(directory, structure.faults, len(structure.table), has_config=stated))
        tensors = tuple(structure.tensors[spec.index] for spec in structure.table)
        return cls(config, directory, structure.table, tensors)

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(tensor.file_bytes for tensor in self.tensors)

    def weight_view(self, index: int) -> np.ndarray:
        """Return the array of file `index` (float32, or a quantized weight's int8), mapped read-only, maybe unaligned.

        All views of a file share one file descriptor, which is closed with the last of them.

        Raises:
            CheckpointError: if the file changed since it was opened.
        """
        return self._view(index, self.tensors[index].array)

    def scales_view(self, index: int) -> np.ndarray | None:
        """Return the bfloat16 scales of file `index`, mapped like `weight_view`; None if it is not quantized."""
        stored = self.tensors[index].scales
        return None if stored is None else self._view(index, stored)

    def read_into(self, index: int, out: np.ndarray, key: tuple[slice, ...] = (), *, scales: bool = False) -> None:
        """Fill `out` with one slice of an array, like `read_slices`."""
        self.read_slices(index, [(key, out)], scales=scales)

    def read_slices(
        self,
        index: int,
        slices: Sequence[tuple[tuple[slice, ...], np.ndarray]],
        *,
        scales: bool = False,
        check: Check = lambda: None,
    ) -> None:
        """Fill arrays with slices of one array of a file, using at most `STAGING_BYTES` of further memory.

        Slices that differ in one axis only, such as columns, are read together.

        Args:
            index: number of the file.
            slices: keys, and the C-contiguous arrays to fill, of the slice's shape and the file's dtype. A key has a
                slice of step 1 for each leading axis; further axes are read whole.
            scales: reads the file's scales instead of its weight.
            check: called every few megabytes; may raise to stop reading.

        Raises:
            CheckpointError: if the file cannot be read or changed since it was opened.
            ValueError: if a key does not match the array, or an array to fill its key.
        """
        stored = self.tensors[index].scales if scales else self.tensors[index].array
        if stored is None:
            raise ValueError(f"{self.table[index].file_name} has no scales")
        reads = [(_ranges(stored.shape, key), out) for key, out in slices]
        for ranges, out in reads:
            shape = tuple(stop - start for start, stop in ranges)
            if out.shape != shape or out.dtype != stored.dtype or not out.flags.c_contiguous or not out.flags.writeable:
                raise ValueError(
                    f"out is {out.dtype} {out.shape}, expected {stored.dtype} {shape}, C-contiguous and writeable"
                )
        with RangeReader(self._path(index), check) as file:
            for together in _side_by_side(stored.shape, [read for read in reads if read[1].size]):
                _read_side_by_side(file, stored, together)
        with self._lock:
            self.bytes_read += file.bytes_read

    def forget(self, index: int) -> None:
        """Drop a file from the page cache, where the system supports it."""
        with RangeReader(self._path(index)) as file:
            file.forget()

    def _path(self, index: int) -> Path:
        return self.directory / self.table[index].file_name

    def _view(self, index: int, stored: StoredArray) -> np.ndarray:
        mapping = self._mapping(index)
        if stored.offset + stored.nbytes > len(mapping):
            raise became_shorter(self._path(index))
        return np.ndarray(stored.shape, stored.dtype, buffer=mapping, offset=stored.offset)

    def _mapping(self, index: int) -> mmap.mmap:
        with self._lock:
            mapping = self._mappings.get(index)
            if mapping is None:
                path = self._path(index)
                try:
                    with path.open("rb") as file:
                        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:  # ValueError: an empty file
                    raise CheckpointError(f"cannot map {path}: {error}; check the file and its disk") from None
                self._mappings[index] = mapping
            return mapping


def faults_sentence(
    directory: Path, faults: Sequence[FileFault], expected: int, *, has_config: bool, max_listed: int = 3
) -> str:
    """Return an error message that counts the faults of a checkpoint and lists the first `max_listed` of them.

    Args:
        directory: the directory of tensor files.
        faults: one or more.
        expected: number of files that there should be.
        has_config: whether the checkpoint has a `config.json`.
        max_listed: number of faults to list.
    """
    sentence = "; ".join(str(fault) for fault in faults[:max_listed])
    if max_listed and len(faults) > max_listed:
        sentence += f"; and {len(faults) - max_listed} more"
    advice = "download or restore them"
    if not has_config:
        advice += ", or add a config.json if this is not the release"
    count = len({fault.file for fault in faults})
    verb = "is" if count == 1 else "are"
    found = f": {sentence}" if max_listed else ""
    return f"{directory}: {count} of {expected} files {verb} missing or damaged{found}; {advice}"


def _ranges(shape: tuple[int, ...], key: tuple[slice, ...]) -> _Ranges:
    if len(key) > len(shape):
        raise ValueError(f"{len(key)} slices for an array of {len(shape)} dimensions")
    ranges = []
    for size, part in zip(shape, key + (slice(None),) * (len(shape) - len(key)), strict=True):
        start, stop, step = part.indices(size)
        if step != 1:
            raise ValueError(f"a slice has step {step}, expected 1")
        ranges.append((start, max(start, stop)))
    return tuple(ranges)


def _last_cut(shape: tuple[int, ...], ranges: _Ranges) -> int:
    """Return the last axis that is not read whole; 0 if all are."""
    return max((i for i, part in enumerate(ranges) if part != (0, shape[i])), default=0)


def _side_by_side(shape: tuple[int, ...], reads: list[_Read]) -> list[list[_Read]]:
    """Group slices that differ in the last axis that is cut and in no other."""
    groups: dict[tuple[int, _Ranges], list[_Read]] = defaultdict(list)
    for ranges, out in reads:
        axis = _last_cut(shape, ranges)
        groups[axis, ranges[:axis]].append((ranges, out))
    return list(groups.values())


def _read_side_by_side(file: RangeReader, stored: StoredArray, reads: list[_Read]) -> None:
    """Read slices that lie side by side, as columns of matrices: one matrix where no axis before the last is cut."""
    shape, ranges = stored.shape, reads[0][0]
    axis = _last_cut(shape, ranges)
    strides = [math.prod(shape[i + 1 :]) * stored.dtype.itemsize for i in range(len(shape))]
    outer = _last_cut(shape, ranges[:axis])  # from here to `axis` the rows follow each other
    first, last = ranges[outer] if outer < axis else (0, 1)
    rows = (last - first) * math.prod(shape[outer + 1 : axis])
    starts = [start for start, _ in ranges[:axis]]
    base = stored.offset + sum(start * stride for start, stride in zip(starts, strides, strict=False))
    lengths = [stop - start for start, stop in ranges[:outer]]
    flat = [
        (own[axis][0] * strides[axis], out.reshape(-1).view(np.uint8).reshape(math.prod(lengths), rows, -1))
        for own, out in reads
    ]
    for number, indices in enumerate(np.ndindex(*lengths)):
        offset = base + sum(index * stride for index, stride in zip(indices, strides, strict=False))
        row_bytes = strides[axis] * shape[axis]
        read_columns(file, offset, row_bytes, [(start, out[number]) for start, out in flat])
