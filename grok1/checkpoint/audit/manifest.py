"""Manifests: the SHA-256 and size of each file of a checkpoint, in the format of `sha256sum -c`.

    # 24727 bytes
    <64 hexadecimal digits>  ckpt-0/tensor00001_000

Names are relative to the directory that contains `ckpt-0`. Hashing hundreds of gigabytes takes a while, so a cache
beside the manifest keeps the hashes until all are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from grok1.checkpoint.parallel import Advance, ByteProgress, in_parallel
from grok1.checkpoint.pickled.source import ScanError, open_regular
from grok1.errors import CheckpointError
from grok1.host.atomic_write import atomic_write
from grok1.params.table import CHECKPOINT_DIR

_BLOCK = 4 << 20  # bytes hashed at a time
_MAX_MANIFEST = 16 << 20  # bytes: a hundred times the release's
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_SIZE = re.compile(r"# (\d{1,19}) bytes")
_CACHE_LINE = re.compile(r"([0-9a-f]{64})  (\d{1,19}) (-?\d{1,20})  (.+)\n")
_HEADER = "# grok1 manifest; `grok1 verify --manifest` checks it, and `sha256sum -c` in the directory that holds {}\n"


@dataclass(frozen=True)
class Entry:
    """What a manifest says of a file.

    Attributes:
        sha256: 64 lower-case hexadecimal digits.
        size: bytes; None if the manifest does not say.
    """

    sha256: str
    size: int | None


def write_manifest(manifest: Path, entries: Mapping[str, Entry], folder: str) -> None:
    """Write a manifest atomically.

    Args:
        manifest: replaced if it exists.
        entries: by name, in the order of the lines.
        folder: name of the directory of tensor files.

    Raises:
        CheckpointError: if it cannot be written.
    """
    try:
        with atomic_write(manifest) as file:
            file.write(_HEADER.format(folder))
            for name, entry in entries.items():
                file.write(f"# {entry.size} bytes\n{entry.sha256}  {name}\n")
    except OSError as error:
        raise cannot_write(manifest, error) from None


def cannot_write(path: Path, error: OSError) -> CheckpointError:
    """Return the error that a manifest or its cache of hashes cannot be written."""
    return CheckpointError(f"cannot write {path}: {error.strerror}; free disk space or choose another path")


def read_manifest(manifest: Path) -> dict[str, Entry]:
    """Read a manifest of `write_manifest` or `sha256sum`, which is not trusted.

    Raises:
        CheckpointError: if it cannot be read, or a line is not a hash and a relative name; the message names the line.
    """
    try:
        with open_regular(manifest) as file:
            data = file.read(_MAX_MANIFEST + 1)
    except ScanError as error:
        raise CheckpointError(f"{manifest}: {error.fault}; pass a manifest file") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {manifest}: {error.strerror}; check the path and its permissions") from None
    if len(data) > _MAX_MANIFEST:
        raise CheckpointError(
            f"{manifest} is larger than {_MAX_MANIFEST:,} bytes and is not a manifest; pass another file"
        )
    entries: dict[str, Entry] = {}
    size: int | None = None
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            text = line.removesuffix(b"\r").decode()
            if text.startswith("#") or not text.strip():
                match = _SIZE.fullmatch(text)
                size = int(match[1]) if match else None
                continue
            name, sha256 = _parse(text)
            entry = Entry(sha256, size)
            if entries.setdefault(name, entry) != entry:
                raise ValueError(f"{name} is listed twice with different hashes or sizes")
            size = None
        except ValueError as error:
            why = "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else error
            raise CheckpointError(
                f"{manifest}, line {number}: {why}; correct the line or get the manifest again"
            ) from None
    if not entries:
        raise CheckpointError(f"{manifest} is empty, expected lines of a SHA-256 and a file name; pass another file")
    return entries


def _quoted(text: str) -> str:
    """Return the beginning of a text as ASCII in double quotes."""
    return json.dumps(text[:80])


def _parse(line: str) -> tuple[str, str]:
    """Return the name and hash of a line; raises ValueError with the reason if it is invalid."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"invalid line {_quoted(line)}, expected a SHA-256 in hexadecimal, two spaces and a file name")
    name = match[2]
    if name.startswith(("/", "~")) or re.match(r"[A-Za-z]:", name):
        raise ValueError(f"absolute path {_quoted(name)}, expected a path within the checkpoint")
    if any(part in ("", ".", "..") for part in name.removeprefix("./").split("/")):
        raise ValueError(
            f"invalid path {_quoted(name)}, expected a path within the checkpoint without empty, . or .. parts"
        )
    if "\\" in name or not name.isprintable():
        raise ValueError(f"invalid characters in the path {_quoted(name)}")
    return name.removeprefix("./"), match[1].lower()


def locate(name: str, directory: Path) -> Path:
    """Return the file that a name in a manifest refers to.

    Args:
        name: such as `ckpt-0/tensor00001_000`, even if the directory has been renamed, or `tensor00001_000`.
        directory: the directory of tensor files.
    """
    folder, _, file = name.rpartition("/")
    if folder in (directory.name, CHECKPOINT_DIR) or (not folder and file.startswith("tensor")):
        return directory / file
    return directory.parent / name


class HashCache:
    """Hashes of files, kept beside a manifest until all are there: a line each, with the file's size and mtime.

    A hash counts only while its file has that size and mtime. An incomplete line, the last one before a kill, is
    ignored. The cache is removed at the end of a `with` block that raises nothing.

    Args:
        manifest: names the cache.
        directory: the directory of tensor files; another copy of the checkpoint has another cache.
        required: whether to raise if the cache cannot be written; otherwise nothing is kept.

    Raises:
        OSError: if it is required and cannot be written.
    """

    def __init__(self, manifest: Path, directory: Path, *, required: bool) -> None:
        self._path = manifest.with_name(manifest.name + ".partial")
        self._header = f"# {os.fsencode(directory)!a}\n"
        self._file: TextIO | None = None
        self._known: dict[str, tuple[Entry, int]] = {}  # with the file's mtime in nanoseconds
        try:
            self._open()
        except OSError:
            if required:
                raise

    def _open(self) -> None:
        if os.path.lexists(self._path):
            with contextlib.suppress(OSError, ScanError), open_regular(self._path) as file:
                lines = file.read(_MAX_MANIFEST).decode("utf-8", "replace").splitlines(keepends=True)
                for line in lines if lines[:1] == [self._header] else []:
                    if match := _CACHE_LINE.fullmatch(line):
                        self._known[match[4]] = (Entry(match[1], int(match[2])), int(match[3]))
        # Rewritten, so that nothing follows an incomplete line.
        self._file = self._path.open("w", encoding="utf-8", newline="\n")
        self._file.write(self._header)
        for name, (entry, mtime_ns) in self._known.items():
            self.add(name, entry, mtime_ns)

    def __enter__(self) -> HashCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            if kind is None:
                self._path.unlink(missing_ok=True)

    def known(self, paths: Mapping[str, Path]) -> dict[str, Entry]:
        """Return the hashes of those of the named files that have not changed since they were hashed."""
        entries = {}
        for name, (entry, mtime_ns) in self._known.items():
            if name in paths:
                with contextlib.suppress(OSError):
                    status = paths[name].stat()
                    if (entry.size, mtime_ns) == (status.st_size, status.st_mtime_ns):
                        entries[name] = entry
        return entries

    def add(self, name: str, entry: Entry, mtime_ns: int) -> None:
        """Keep the hash of a file."""
        if self._file is not None:
            self._file.write(f"{entry.sha256}  {entry.size} {mtime_ns}  {name}\n")
            self._file.flush()  # a kill loses nothing


def hash_files(
    paths: Mapping[str, Path], cache: HashCache, progress: ByteProgress | None = None
) -> Generator[tuple[str, Entry | str], None, None]:
    """Hash files in parallel, except those in the cache.

    Args:
        paths: the files, by their names in the manifest.
        cache: gets each hash when it is known.
        progress: called with the bytes read and the bytes to read.

    Yields:
        each name with its entry, or with a clause that describes the error.
    """
    known = cache.known(paths)
    yield from known.items()
    rest = [(name, path) for name, path in paths.items() if name not in known]
    total = sum(_size(path) for _, path in rest)
    with contextlib.closing(in_parallel(rest, _hash_or_error, total, progress)) as hashed:
        for (name, _), result in hashed:
            if isinstance(result, str):
                yield name, result
            else:
                entry, mtime_ns = result
                cache.add(name, entry, mtime_ns)
                yield name, entry


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _hash_or_error(named: tuple[str, Path], advance: Advance) -> tuple[Entry, int] | str:
    try:
        return hash_file(named[1], advance)
    except FileNotFoundError:
        return "is missing"
    except ScanError as error:
        return f"cannot be read: {error.fault}"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def hash_file(path: Path, advance: Advance) -> tuple[Entry, int]:
    """Return the SHA-256 and size of a file, and its mtime in nanoseconds.

    Args:
        path: the file.
        advance: called with the bytes of each block.

    Raises:
        ScanError: if it is not a regular file.
        OSError: if it cannot be read, or changes while it is read.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    size = 0
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        while count := file.readinto(block):  # type: ignore[attr-defined]
            digest.update(block[:count])  # releases the GIL
            size += count
            advance(count)
        after = os.fstat(file.fileno())
    if (size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise OSError("the file changed while it was being read")
    return Entry(digest.hexdigest(), size), after.st_mtime_ns
