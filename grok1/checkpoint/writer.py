"""Writes checkpoints in the release's format: random or given weights, an archive's, or none (hollow)."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from grok1.checkpoint.hollow import hollow_disk_bytes, write_hollow_tensors
from grok1.checkpoint.parallel import ByteProgress
from grok1.checkpoint.pickled.framing import tensor_file_size, tensor_segments
from grok1.checkpoint.random_weights import random_chunks
from grok1.checkpoint.reader import holds_tensor_files
from grok1.config import ModelConfig
from grok1.errors import CheckpointError
from grok1.params.table import CHECKPOINT_DIR, TensorFile, tensor_table

_CONFIG = "config.json"
_TOKENIZER = "tokenizer.model"
_BLOCK = 4096  # disk space of the smallest file

Chunks = Callable[[TensorFile, bool], Iterable[np.ndarray]]
"""Yields a tensor's values, or its scales if the second argument is true, as consecutive arrays."""


def write_checkpoint(
    directory: Path,
    config: ModelConfig,
    *,
    seed: int = 0,
    chunks: Chunks | None = None,
    force: bool = False,
    hollow: bool = False,
    tokenizer: bytes | None = None,
    progress: ByteProgress | None = None,
) -> None:
    """Write `config.json`, `tokenizer.model` and `ckpt-0` into a directory, all or nothing.

    If the writer fails or is interrupted, the directory is left unchanged; if it is killed, a hidden directory
    remains. Data is not synced to the disk: after a power failure, write the checkpoint again.

    Args:
        directory: created if it does not exist; other files in it are kept.
        config: the model to write, a few megabytes at a time.
        seed: of random weights, 0 or more; the same seed and config give the same bytes.
        chunks: weights to write instead of random ones.
        force: replaces an existing checkpoint with its config and tokenizer.
        hollow: omits the arrays' data. The files keep their sizes, with holes that read as zeros and take no space.
        tokenizer: content of `tokenizer.model`; None writes none.
        progress: called once a megabyte, or once per hollow file.

    Raises:
        CheckpointError: if a checkpoint exists, disk space is insufficient, a file cannot be written, or the
            filesystem does not support sparse files and lacks the space for full ones.
    """
    if seed < 0:
        raise CheckpointError(f"seed is {seed}, expected 0 or more")
    table = tensor_table(config)
    tensor_bytes = sum(hollow_disk_bytes(spec) if hollow else tensor_file_size(spec) for spec in table)
    with _new_checkpoint(directory, tensor_bytes + len(tokenizer or b""), len(table), force) as new:
        (new / CHECKPOINT_DIR).mkdir()
        (new / _CONFIG).write_text(config.to_json(), encoding="utf-8")
        if tokenizer is not None:
            (new / _TOKENIZER).write_bytes(tokenizer)
        if hollow:
            write_hollow_tensors(new / CHECKPOINT_DIR, table, progress)
        else:
            _write_tensors(new / CHECKPOINT_DIR, table, chunks or functools.partial(random_chunks, seed=seed), progress)


def unpack_checkpoint(
    archive: Path, directory: Path, *, force: bool = False, progress: ByteProgress | None = None
) -> None:
    """Write the checkpoint of a zip file into a directory, all or nothing, as `write_checkpoint` does.

    Args:
        archive: a zip file of `config.json`, `tokenizer.model` and `ckpt-0`.
        directory: as for `write_checkpoint`.
        force: as for `write_checkpoint`.
        progress: called after each file.

    Raises:
        CheckpointError: as `write_checkpoint`; also if the archive is damaged or cannot be read.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            members = packed.infolist()
            if not any(member.filename.startswith(f"{CHECKPOINT_DIR}/") for member in members):
                raise zipfile.BadZipFile(f"no {CHECKPOINT_DIR} in the archive")
            total = sum(member.file_size for member in members)
            with _new_checkpoint(directory, total, len(members), force) as new:
                done = 0
                for member in members:
                    packed.extract(member, new)
                    done += member.file_size
                    if progress is not None:
                        progress(done, total)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot unpack {archive}: {error}; reinstall grok1") from None


@contextlib.contextmanager
def _new_checkpoint(directory: Path, nbytes: int, num_files: int, force: bool) -> Iterator[Path]:
    """A hidden directory in `directory` to write a checkpoint into; its contents move to `directory` at the end.

    `ckpt-0` is moved last, so that an unfinished one, or one of another config, is never visible.
    """
    with _plain_errors(directory):
        _check_target(directory, force)
        _check_space(directory, nbytes + _BLOCK * (num_files + 4))
        with _new_folders(directory), _scratch_folder(directory) as scratch:
            new = scratch / "new"
            new.mkdir()
            yield new
            _check_target(directory, force)  # another writer may have come first
            _swap(directory, scratch)


def _existing(directory: Path) -> list[str]:
    return [name for name in (CHECKPOINT_DIR, _CONFIG, _TOKENIZER) if os.path.lexists(directory / name)]


def _check_target(directory: Path, force: bool) -> None:
    if not directory.is_dir():
        if os.path.lexists(directory):
            raise CheckpointError(f"{directory} is a file, expected a directory; choose another path")
        return
    if holds_tensor_files(directory):
        # A config.json beside them would change what these files mean.
        raise CheckpointError(f"{directory} already contains tensor files; choose another directory")
    existing = _existing(directory)
    if existing and not force:
        raise CheckpointError(
            f"{directory} already contains {', '.join(existing)}; choose another directory or overwrite with --force"
        )


def _check_space(directory: Path, needed: int) -> None:
    present = next(folder for folder in (directory, *directory.parents) if folder.exists())
    free = shutil.disk_usage(present).free
    if needed > free:
        raise CheckpointError(
            f"not enough disk space for {directory}: {needed / 1e9:,.2f} GB needed, {free / 1e9:,.2f} GB free; "
            "free disk space or choose another disk"
        )


def _write_tensors(folder: Path, table: tuple[TensorFile, ...], chunks: Chunks, progress: ByteProgress | None) -> None:
    done, total = 0, sum(tensor_file_size(spec) for spec in table)
    for spec in table:
        with (folder / spec.file_name).open("wb") as file:
            for segment in tensor_segments(spec):
                if isinstance(segment, bytes):
                    done += file.write(segment)
                    continue
                for chunk in chunks(spec, segment.array == 1):
                    done += file.write(chunk.reshape(-1).view("u1").data)
                    if progress:
                        progress(done, total)
    if progress:
        progress(done, total)


def _swap(directory: Path, scratch: Path) -> None:
    """Move the old checkpoint into the scratch directory and the new one out of it, or nothing at all."""
    old, new = scratch / "old", scratch / "new"
    old.mkdir()
    moves = [(directory / name, old / name) for name in _existing(directory)]  # ckpt-0 is the first to go
    moves += [(new / name, directory / name) for name in (_CONFIG, _TOKENIZER) if (new / name).exists()]
    moves.append((new / CHECKPOINT_DIR, directory / CHECKPOINT_DIR))
    try:
        for source, target in moves:
            os.rename(source, target)
    except BaseException:
        _undo(moves, old)
        raise


def _undo(moves: list[tuple[Path, Path]], old: Path) -> None:
    try:
        for source, target in reversed(moves):
            if os.path.lexists(target) and not os.path.lexists(source):
                os.rename(target, source)
    except OSError as error:
        raise CheckpointError(
            f"cannot replace the old checkpoint or restore it: {error.strerror}; it is in {old}, move it back by hand"
        ) from None


@contextlib.contextmanager
def _scratch_folder(directory: Path) -> Iterator[Path]:
    """A hidden directory in `directory`, removed at the end unless it still contains the old checkpoint."""
    scratch = Path(tempfile.mkdtemp(prefix=".grok1-init-", dir=directory))
    try:
        yield scratch
    except BaseException:
        shutil.rmtree(scratch / "new", ignore_errors=True)
        for folder in (scratch / "old", scratch):  # stays if the old checkpoint could not be moved back
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _new_folders(directory: Path) -> Iterator[None]:
    """Create the directory and its parents; if the block fails, removes those that it created."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _plain_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = error.filename or directory
        if error.errno == errno.ENOSPC:
            advice = "No space left on device; free disk space or choose another disk"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = f"{error.strerror}; choose a writable directory"
        else:
            advice = f"{error.strerror or error}; choose another directory"
        raise CheckpointError(f"cannot write {name}: {advice}") from None
