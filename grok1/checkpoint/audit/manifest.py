"""Manifests: the SHA-256 and size of each file of a checkpoint, in lines that `sha256sum -c` understands.

    # 24727 bytes
    <64 hexadecimal digits>  ckpt-0/tensor00001_000

Names are relative to the folder that holds `ckpt-0`. Hashing hundreds of gigabytes takes a while, so what is done is
kept in a journal beside the manifest until the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from grok1.checkpoint.parallel import Advance, Progress, in_parallel
from grok1.checkpoint.pickled.source import ScanError, open_regular
from grok1.errors import CheckpointError
from grok1.host.atomic_write import whole_file
from grok1.params.table import CHECKPOINT_DIR

_BLOCK = 4 << 20  # bytes hashed at a time
_MAX_MANIFEST = 16 << 20  # bytes: a hundred times the release's
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_SIZE = re.compile(r"# (\d{1,19}) bytes")
_JOURNAL_LINE = re.compile(r"([0-9a-f]{64})  (\d{1,19}) (-?\d{1,20})  (.+)\n")
_HEADER = "# grok1 manifest; `grok1 verify --manifest` checks it, and `sha256sum -c` in the folder that holds {}\n"


@dataclass(frozen=True)
class Entry:
    """What a manifest says of a file.

    Attributes:
        sha256: 64 hexadecimal digits, small letters.
        size: bytes, or None where the manifest does not say.
    """

    sha256: str
    size: int | None


@dataclass(frozen=True)
class Target:
    """A file to hash, and its name in a manifest."""

    name: str
    path: Path


class Unhashed(Exception):
    """A file that could not be hashed; the text is a clause to be read after its name."""


def write_manifest(manifest: Path, entries: Mapping[str, Entry], folder: str) -> None:
    """Writes a manifest: as a whole, or not at all.

    Args:
        manifest: replaced if it exists.
        entries: by name, in the order of the lines.
        folder: name of the folder of tensor files.

    Raises:
        CheckpointError: if it cannot be written.
    """
    try:
        with whole_file(manifest) as file:
            file.write(_HEADER.format(folder))
            for name, entry in entries.items():
                file.write(f"# {entry.size} bytes\n{entry.sha256}  {name}\n")
    except OSError as error:
        raise cannot_write(manifest, error) from None


def cannot_write(path: Path, error: OSError) -> CheckpointError:
    """The error that a manifest or its journal cannot be written."""
    return CheckpointError(f"cannot write {path} ({error.strerror}): make room, or choose another place")


def read_manifest(manifest: Path) -> dict[str, Entry]:
    """Reads a manifest, of `write_manifest` or of `sha256sum`; believes nothing of it.

    Raises:
        CheckpointError: if it cannot be read or a line is no hash and relative name; it says which line.
    """
    try:
        with open_regular(manifest) as file:
            data = file.read(_MAX_MANIFEST + 1)
    except ScanError as error:
        raise CheckpointError(f"{manifest}: {error.fault}; name a manifest") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {manifest} ({error.strerror}): name a manifest that you may read") from None
    if len(data) > _MAX_MANIFEST:
        raise CheckpointError(f"{manifest} has more than {_MAX_MANIFEST:,} bytes, expected a manifest: name another")
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
                raise _BadLine(f"{name} comes twice, with different hashes or sizes")
            size = None
        except UnicodeDecodeError:
            raise _refused(manifest, number, "it is not UTF-8") from None
        except _BadLine as error:
            raise _refused(manifest, number, str(error)) from None
    if not entries:
        raise CheckpointError(f"{manifest} lists no file, expected lines of a SHA-256 and a name: name another")
    return entries


class _BadLine(Exception):
    """Why a line of a manifest is refused."""


def _refused(manifest: Path, number: int, why: str) -> CheckpointError:
    return CheckpointError(f"{manifest}, line {number}: {why}; correct the line or get the manifest again")


def _parse(line: str) -> tuple[str, str]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise _BadLine(f"{line[:80]!a} is not a SHA-256 of 64 hexadecimal digits, two spaces and a name")
    name = match[2]
    if name.startswith(("/", "~")) or re.match(r"[A-Za-z]:", name):
        raise _BadLine(f"{name[:80]!a} is an absolute path, expected one within the checkpoint")
    if any(part in ("", ".", "..") for part in name.removeprefix("./").split("/")):
        raise _BadLine(f"{name[:80]!a} has a part that is empty, '.' or '..', expected a path within the checkpoint")
    if "\\" in name or not name.isprintable():
        raise _BadLine(f"{name[:80]!a} has characters that no file of a checkpoint has")
    return name.removeprefix("./"), match[1].lower()


def locate(name: str, directory: Path) -> Path:
    """The file that a name of a manifest stands for.

    Args:
        name: as `ckpt-0/tensor00001_000`, also if the folder has another name now, or as `tensor00001_000`.
        directory: the folder of tensor files.
    """
    folder, _, file = name.rpartition("/")
    if folder in (directory.name, CHECKPOINT_DIR) or (not folder and file.startswith("tensor")):
        return directory / file
    return directory.parent / name


class Journal:
    """Hashes of files that are done, beside a manifest: a line each, with the file's size and time of change.

    A hash counts only as long as the file has that size and time. A line that is not whole, the last one before a
    kill, counts for nothing.
    """

    def __init__(self, manifest: Path, directory: Path) -> None:
        self.path = manifest.with_name(manifest.name + ".partial")
        self._header = f"# {os.fsencode(directory)!a}\n"  # another copy of the checkpoint has another journal
        self._file: TextIO | None = None
        self._known: dict[str, tuple[str, int, int]] = {}

    def open(self) -> None:
        """Reads what is there and makes ready to add to it.

        Raises:
            OSError: if it cannot be written.
        """
        ours = False
        if os.path.lexists(self.path):
            with contextlib.suppress(OSError, ScanError), open_regular(self.path) as file:
                lines = file.read(_MAX_MANIFEST).decode("utf-8", "replace").splitlines(keepends=True)
                ours = lines[:1] == [self._header]
                for line in lines if ours else []:
                    if match := _JOURNAL_LINE.fullmatch(line):
                        self._known[match[4]] = (match[1], int(match[2]), int(match[3]))
        # Written anew, so that nothing follows on a line that is not whole.
        self._file = self.path.open("w", encoding="utf-8", newline="\n")
        self._file.write(self._header)
        for name, (sha256, size, mtime) in self._known.items():
            self._file.write(f"{sha256}  {size} {mtime}  {name}\n")
        self._file.flush()

    def known(self, target: Target) -> Entry | None:
        """The hash of a file that has not changed since it was hashed."""
        found = self._known.get(target.name)
        if found is None:
            return None
        try:
            status = target.path.stat()
        except OSError:
            return None
        sha256, size, mtime = found
        return Entry(sha256, size) if (size, mtime) == (status.st_size, status.st_mtime_ns) else None

    def add(self, target: Target, entry: Entry, mtime_ns: int) -> None:
        """Notes a file that was hashed."""
        if self._file is not None:
            self._file.write(f"{entry.sha256}  {entry.size} {mtime_ns}  {target.name}\n")
            self._file.flush()  # a kill loses nothing

    def close(self, *, remove: bool) -> None:
        """Closes the journal; removes it when all is done."""
        if self._file is not None:
            self._file.close()
            self._file = None
            if remove:
                self.path.unlink(missing_ok=True)


def hash_files(
    targets: Iterable[Target], journal: Journal, progress: Progress | None = None
) -> Generator[tuple[Target, Entry | Unhashed], None, None]:
    """Hashes files in parallel, those of the journal excepted.

    Args:
        targets: the files.
        journal: open; gets each hash as it is there.
        progress: called with the bytes read and the bytes to read.

    Yields:
        each file with its hash, or with why there is none.
    """
    rest = []
    for target in targets:
        known = journal.known(target)
        if known is None:
            rest.append(target)
        else:
            yield target, known
    total = sum(_size(target.path) for target in rest)
    with contextlib.closing(in_parallel(rest, _hash_or_why_not, total, progress)) as hashed:
        for target, result in hashed:
            if isinstance(result, Unhashed):
                yield target, result
            else:
                entry, mtime_ns = result
                journal.add(target, entry, mtime_ns)
                yield target, entry


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _hash_or_why_not(target: Target, advance: Advance) -> tuple[Entry, int] | Unhashed:
    try:
        return hash_file(target.path, advance)
    except FileNotFoundError:
        return Unhashed("is missing")
    except ScanError as error:
        return Unhashed(f"cannot be read: {error.fault}")
    except OSError as error:
        return Unhashed(f"cannot be read: {error.strerror or error}")


def hash_file(path: Path, advance: Advance) -> tuple[Entry, int]:
    """The SHA-256 and size of a file, and its time of change in nanoseconds.

    Args:
        path: the file.
        advance: called with the bytes of each block.

    Raises:
        ScanError: if it is no regular file.
        OSError: if it cannot be read, or changes while it is read.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    size = 0
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        while count := file.readinto(block):  # type: ignore[attr-defined]
            digest.update(block[:count])  # without Python's lock, so that threads add up
            size += count
            advance(count)
        after = os.fstat(file.fileno())
    if (size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise OSError("it changes while it is read")
    return Entry(digest.hexdigest(), size), after.st_mtime_ns
