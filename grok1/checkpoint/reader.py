"""Finding and opening a checkpoint, and reading its arrays: by mapping, or slice by slice."""

from __future__ import annotations

import math
import mmap
import os
import re
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grok1.checkpoint.layout import CHECKPOINT_DIR, TensorSpec
from grok1.checkpoint.pickle_scan import StoredArray, StoredTensor
from grok1.checkpoint.structure import FileFault, find_faults
from grok1.config import PRESETS, ModelConfig
from grok1.errors import CheckpointError

_FILE_NAME = re.compile(r"tensor\d+_\d+")

_FAULTS_TOLD = 3
_MAPPED_RUN = 64 * 1024
"""Contiguous runs of fewer bytes are copied from a mapping: a system call for each would cost more."""


def find_checkpoint(path: Path) -> Path:
    """The folder of tensor files: `path/ckpt-0`, or `path` itself if it holds tensor files.

    Raises:
        CheckpointError: if it is neither, with how to get a checkpoint.
    """
    try:
        inner = path / CHECKPOINT_DIR
        if inner.is_dir():
            return inner
        if path.is_dir() and holds_tensor_files(path):
            return path
        found = f"{path} holds no {CHECKPOINT_DIR}" if path.exists() else f"{path} does not exist"
    except OSError as error:
        raise CheckpointError(f"cannot look into {path} ({error.strerror}): check its permissions") from None
    raise CheckpointError(
        f"no checkpoint: {found}, expected a folder with {CHECKPOINT_DIR} or its tensor files; "
        "get the release as checkpoints/README.md says, or make random weights with "
        "`grok1 init DIR --preset tiny`"
    )


def holds_tensor_files(directory: Path) -> bool:
    """Whether a folder has files named like a checkpoint's.

    Raises:
        OSError: if it cannot be listed.
    """
    return any(_FILE_NAME.fullmatch(name) for name in os.listdir(directory))


def read_config(directory: Path) -> ModelConfig | None:
    """The config of a folder of tensor files: the `config.json` in it or beside it, or None.

    Raises:
        ConfigError: if the file is no config.
        CheckpointError: if it is no regular file.
    """
    for path in (directory / "config.json", directory.absolute().parent / "config.json"):
        if path.is_file():
            return ModelConfig.read(path)
        if path.exists():
            raise CheckpointError(f"{path} is no regular file, expected a model config: move it away")
    return None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint, whose every file was scanned and is of the config's shape and dtype.

    It holds no file open. Its methods may be called from several threads at once.

        checkpoint = Checkpoint.open(Path("checkpoints"))
        embeddings = checkpoint.weight_view(0)[:8]

    Attributes:
        config: from `config.json`, or else the release's.
        directory: the folder of tensor files.
        table: what each file is.
        tensors: where its arrays lie, in the same order.
        total_bytes: size of all files.
    """

    config: ModelConfig
    directory: Path
    table: tuple[TensorSpec, ...]
    tensors: tuple[StoredTensor, ...]
    total_bytes: int
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _mappings: weakref.WeakValueDictionary[int, mmap.mmap] = field(
        default_factory=weakref.WeakValueDictionary, init=False, repr=False
    )

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Finds a checkpoint and checks every file of it; reads no array.

        Args:
            path: a folder that holds `ckpt-0`, or the folder of tensor files itself.

        Raises:
            CheckpointError: if there is none, or files are missing, unexpected, damaged or of another shape or
                dtype than the config asks for. It counts all faults and tells the first three.
            ConfigError: if there is a `config.json` that is no config.
        """
        directory = find_checkpoint(path)
        stated = read_config(directory)
        config = stated or PRESETS["grok-1"]
        structure = find_faults(directory, config)
        if structure.faults:
            raise CheckpointError(
                faults_sentence(directory, structure.faults, len(structure.table), has_config=stated is not None)
            )
        tensors = tuple(structure.tensors[spec.index] for spec in structure.table)
        return cls(config, directory, structure.table, tensors, structure.total_bytes)

    def weight_view(self, index: int) -> np.ndarray:
        """The array of file `index` (float32, or a quantised weight's int8), mapped read-only.

        The view reads the file when it is used, need not be aligned, and holds one file descriptor while it
        lives, shared with the file's other views.

        Raises:
            CheckpointError: if the file changed since it was opened.
        """
        return self._view(index, self.tensors[index].array)

    def scales_view(self, index: int) -> np.ndarray | None:
        """The bfloat16 scales of file `index`, mapped like `weight_view`; None if it is not quantised.

        Raises:
            CheckpointError: if the file changed since it was opened.
        """
        stored = self.tensors[index].scales
        return None if stored is None else self._view(index, stored)

    def read_into(self, index: int, out: np.ndarray, key: tuple[slice, ...] = (), *, scales: bool = False) -> None:
        """Fills `out` with a slice of an array, straight from the file.

        Args:
            index: number of the file.
            out: C-contiguous, of the slice's shape and the array's dtype.
            key: a slice, of step 1, for each of the first dimensions; dimensions without one are read whole.
            scales: reads the file's scales instead of its weight.

        Raises:
            CheckpointError: if the file cannot be read or changed since it was opened.
            ValueError: if `out` or `key` does not fit the array.
        """
        stored = self.tensors[index].scales if scales else self.tensors[index].array
        if stored is None:
            raise ValueError(f"{self.table[index].file_name} has no scales")
        ranges = _ranges(stored.shape, key)
        shape = tuple(stop - start for start, stop in ranges)
        if out.shape != shape or out.dtype != stored.dtype or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(
                f"out is {out.dtype} {out.shape}, expected {stored.dtype} {shape}, C-contiguous and writeable"
            )
        if out.size == 0:
            return
        run_dimensions = _run_dimensions(stored.shape, shape)
        run_bytes = math.prod(shape[len(shape) - run_dimensions :]) * stored.dtype.itemsize
        if run_bytes < _MAPPED_RUN and run_bytes < out.nbytes:
            selected = self._view(index, stored)[tuple(slice(start, stop) for start, stop in ranges)]
            unsigned = np.dtype(f"u{stored.dtype.itemsize}")  # plain bits: NumPy copies them without the GIL
            np.copyto(out.view(unsigned), selected.view(unsigned))
        else:
            self._read_runs(index, stored, out, ranges, run_dimensions)

    def _path(self, index: int) -> Path:
        return self.directory / self.table[index].file_name

    def _view(self, index: int, stored: StoredArray) -> np.ndarray:
        mapping = self._mapping(index)
        if stored.offset + stored.nbytes > len(mapping):
            raise _changed(self._path(index))
        # An offset that is no multiple of the item size gives an unaligned array, which NumPy handles.
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
                    raise CheckpointError(f"cannot map {path} ({error}): check the file and its disk") from None
                self._mappings[index] = mapping
            return mapping

    def _read_runs(
        self,
        index: int,
        stored: StoredArray,
        out: np.ndarray,
        ranges: list[tuple[int, int]],
        run_dimensions: int,
    ) -> None:
        """Reads one contiguous run of the file after the other, each straight to its place in `out`."""
        path = self._path(index)
        outer = len(ranges) - run_dimensions
        starts = [start for start, _ in ranges]
        strides = [math.prod(stored.shape[axis + 1 :]) * stored.dtype.itemsize for axis in range(len(ranges))]
        first = stored.offset + sum(start * stride for start, stride in zip(starts, strides, strict=True))
        target = memoryview(out.reshape(-1).view(np.uint8).data)
        run_bytes = out.nbytes // math.prod(out.shape[:outer])
        try:
            with path.open("rb", buffering=0) as file:
                for run, place in enumerate(np.ndindex(out.shape[:outer])):
                    offset = first + sum(step * stride for step, stride in zip(place, strides, strict=False))
                    file.seek(offset)
                    rest = target[run * run_bytes : (run + 1) * run_bytes]
                    while rest:
                        count = file.readinto(rest)
                        if not count:
                            raise _changed(path)
                        rest = rest[count:]
        except OSError as error:
            raise CheckpointError(f"cannot read {path} ({error.strerror}): check the file and its disk") from None


def faults_sentence(
    directory: Path, faults: Sequence[FileFault], expected: int, *, has_config: bool, told: int = _FAULTS_TOLD
) -> str:
    """The sentence that counts the faults of a checkpoint and tells the first of them.

    Args:
        directory: the folder of tensor files.
        faults: one or more.
        expected: how many files there should be.
        has_config: whether a `config.json` says what the checkpoint is.
        told: how many faults to tell.
    """
    sentence = "; ".join(str(fault) for fault in faults[:told])
    if told and len(faults) > told:
        sentence += f"; and {len(faults) - told} more"
    advice = "download or restore these files"
    if not has_config:
        advice += ", or put a config.json beside the folder if it is not the release"
    count = len({fault.file for fault in faults})
    verb = "is" if count == 1 else "are"
    return f"{directory}: {count} of {expected} files {verb} not right: " + (f"{sentence}; " if told else "") + advice


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} became shorter since it was opened: leave the files alone and start again")


def _ranges(shape: tuple[int, ...], key: tuple[slice, ...]) -> list[tuple[int, int]]:
    if len(key) > len(shape):
        raise ValueError(f"{len(key)} slices for an array of {len(shape)} dimensions")
    ranges = []
    for size, part in zip(shape, key + (slice(None),) * (len(shape) - len(key)), strict=True):
        start, stop, step = part.indices(size)
        if step != 1:
            raise ValueError(f"a slice has step {step}, expected 1")
        ranges.append((start, max(start, stop)))
    return ranges


def _run_dimensions(shape: tuple[int, ...], part: tuple[int, ...]) -> int:
    """How many of the last dimensions of a slice lie in the file without a gap."""
    count = 0
    for whole, size in zip(reversed(shape), reversed(part), strict=True):
        count += 1
        if whole != size:
            break
    return count
