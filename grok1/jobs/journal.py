"""The journal of a job: its finished rows, in the order in which they finished, until the output can be written.

Each line of the file consists of the CRC-32 of a text in 8 hexadecimal digits, a space, and that text. The first text
is the job's fingerprint in JSON; each of the others is the index of a row, a space, and the row's line of the output.
The first line that is incomplete, after a kill or power failure, and everything after it are ignored.

When `add` returns, the operating system has the row; within a second, the disk has it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grok1.errors import JobError
from grok1.host.atomic_write import atomic_write

_VERSION = 1
_SYNC_SECONDS = 0.5
_COPY_BYTES = 1 << 20
_BEGINNING = b'00000000 {"grok1_journal": '  # a journal's, but for the digits


class Journal(contextlib.AbstractContextManager["Journal"]):
    """An open journal, locked against other processes.

        with Journal.open(Path("completions.jsonl"), restart=False) as journal:
            journal.begin({"input": ...})
            journal.add(0, '{"index": 0, ...}\\n')
            journal.write_output(1)

    Attributes:
        output: the file that the job writes in the end.
        path: of the journal, next to the output.
        job: the fingerprint of the job, as it was passed to `begin`; None in a new journal.
        rows: number of rows in it.
        dropped_bytes: size of the incomplete end that was ignored.
    """

    def __init__(self, output: Path, path: Path, descriptor: int):
        """Use `open`."""
        self.output = output
        self.path = path
        self.job: dict[str, Any] | None = None
        self.rows = 0
        self.dropped_bytes = 0
        self._descriptor = descriptor
        self._end = 0  # of the last complete line
        self._starts = array("q")  # offset of each row's line of the output, by index; -1 for none
        self._dirty = False
        self._failure: JobError | None = None
        self._closing = threading.Event()
        self._syncing: threading.Thread | None = None

    @classmethod
    def open(cls, output: Path, *, restart: bool) -> Journal:
        """Open the journal of an output, or creates one.

        Args:
            output: the file that the job writes.
            restart: whether to discard an existing journal and to replace an existing output.

        Raises:
            JobError: if another process has it open, the output exists, or the journal cannot be created.
        """
        if output.is_symlink() or (output.exists() and not output.is_file()):
            kind = (
                "a symbolic link" if output.is_symlink() else "a directory" if output.is_dir() else "not a regular file"
            )
            raise JobError(f"{output} is {kind}; name a regular file")
        path = output.with_name(output.name + ".journal")
        descriptor = _open_locked(output, path)
        journal = cls(output, path, descriptor)
        try:
            journal._read(restart)
        except BaseException:
            journal.close()
            raise
        return journal

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Reading

    def _read(self, restart: bool) -> None:
        beginning = os.pread(self._descriptor, len(_BEGINNING), 0)
        if not _could_begin(beginning):
            raise JobError(f"{self.path} exists but is not a grok1 journal; move it or choose another output")
        if restart:
            return
        size = os.fstat(self._descriptor).st_size
        if size == 0 and self.output.exists():
            raise JobError(f"{self.output} already exists; choose another output or overwrite it with --restart")
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            line = file.readline()
            header = _checked(line)
            if header is not None:
                self._read_header(header)
                self._end = len(line)
                self._read_rows(file)
            elif len(line) < size:
                raise JobError(f"the first line of {self.path} is damaged; start over with --restart")
        self.dropped_bytes = size - self._end

    def _read_header(self, text: bytes) -> None:
        job = json.loads(text)
        if job.pop("grok1_journal") != _VERSION:
            raise JobError(
                f"{self.path} was written by another version of grok1; finish the job with that version or start "
                "over with --restart"
            )
        self.job = job

    def _read_rows(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            index = (_checked(line) or b"").partition(b" ")[0]
            if not index.isdigit():
                break
            self._note(int(index), self._end + 9 + len(index) + 1)
            self._end += len(line)

    def _note(self, index: int, start: int) -> None:
        if index >= len(self._starts):
            self._starts.extend([-1] * (index + 1 - len(self._starts)))
        self.rows += self._starts[index] < 0
        self._starts[index] = start

    def __contains__(self, index: int) -> bool:
        return index < len(self._starts) and self._starts[index] >= 0

    def lines(self) -> Iterator[str]:
        """Yield the output lines of its rows, in the order of their indices."""
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            for start in self._starts:
                if start >= 0:
                    file.seek(start)
                    yield file.readline().decode()

    # Adding

    def begin(self, job: Mapping[str, Any]) -> None:
        """Prepare for writing: at the beginning of a new journal, after the last complete line of an old one.

        Args:
            job: the job's fingerprint.

        Raises:
            JobError: if it cannot be written.
        """
        try:
            os.ftruncate(self._descriptor, self._end)
        except OSError as error:
            raise self._cannot_write(error) from None
        if self.job is None:
            self._append(json.dumps({"grok1_journal": _VERSION, **job}).encode() + b"\n")
            self.job = dict(job)
        self._sync()
        self._syncing = threading.Thread(target=self._sync_often, name="grok1-journal", daemon=True)
        self._syncing.start()

    def add(self, index: int, line: str) -> None:
        """Add a finished row.

        Args:
            index: of the row.
            line: its line of the output, with the newline.

        Raises:
            JobError: if it cannot be written; all preceding rows are kept.
        """
        self._check_failure()
        prefix = f"{index} ".encode()
        start = self._append(prefix + line.encode())
        self._note(index, start + 9 + len(prefix))

    def _append(self, text: bytes) -> int:
        """Write a line and returns its offset; a line that cannot be written completely is removed."""
        start, line = self._end, b"%08x " % zlib.crc32(text) + text
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._descriptor, line[written:], start + written)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, start)
            raise self._cannot_write(error) from None
        self._end = start + len(line)
        self._dirty = True
        return start

    def _sync_often(self) -> None:
        while not self._closing.wait(_SYNC_SECONDS):
            try:
                self._sync()
            except JobError as error:
                self._failure = error
                return

    def _stop_syncing(self) -> None:
        self._closing.set()
        if self._syncing is not None:
            self._syncing.join()
            self._syncing = None

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _sync(self) -> None:
        """Flush the journal to the disk, and writes it again if it was removed.

        Raises:
            JobError: if it cannot be flushed, or was removed.
        """
        try:
            if self._dirty:
                self._dirty = False
                os.fsync(self._descriptor)
            if os.path.samestat(os.stat(self.path), os.fstat(self._descriptor)):
                return
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._cannot_write(error) from None
        raise self._write_again()

    def _write_again(self) -> JobError:
        """Copy the unlinked journal back to its path, and returns the error to raise."""
        removed, end = f"{self.path} was deleted during the run", self._end
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("xb") as copy:
                for start in range(0, end, _COPY_BYTES):
                    copy.write(os.pread(self._descriptor, min(_COPY_BYTES, end - start), start))
                copy.flush()
                os.fsync(copy.fileno())
        except OSError as error:
            return JobError(f"{removed} and cannot be restored: {error.strerror}; its rows are lost, start again")
        return JobError(f"{removed} and has been restored with all finished rows; run the same command to resume")

    def _cannot_write(self, error: OSError) -> JobError:
        return JobError(
            f"cannot write {self.path}: {error.strerror}; free disk space and run the same command to resume "
            f"after the {self.rows} rows that were saved"
        )

    # Ending

    def write_output(self, rows: int, tail: str = "") -> None:
        """Write the output atomically and removes the journal.

        Args:
            rows: number of rows that the journal must have.
            tail: text to write after the last row's line.

        Raises:
            JobError: if it cannot be written; the journal is kept.
        """
        if self.rows != rows:
            raise ValueError(f"{self.rows} of {rows} rows are done")
        self._stop_syncing()
        self._check_failure()
        try:
            self._sync()
            with atomic_write(self.output) as file:
                file.writelines(self.lines())
                file.write(tail)
            _sync_folder(self.output.parent)
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise JobError(
                f"cannot write {self.output}: {error.strerror}; free disk space and run the same command to write it "
                f"(all {rows} rows are saved in {self.path})"
            ) from None

    def close(self) -> None:
        """Close the journal and keeps it with all its rows; an empty one is removed."""
        self._stop_syncing()
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                if os.fstat(self._descriptor).st_size == 0:
                    self.path.unlink(missing_ok=True)
                os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


def _could_begin(found: bytes) -> bool:
    """Whether a file with this beginning may be a journal, possibly truncated or zeroed by a power failure."""
    digits = found[:8]
    return not found.strip(b"\0") or (
        all(byte in b"0123456789abcdef" for byte in digits) and found[8:] == _BEGINNING[8 : len(found)]
    )


def _checked(line: bytes) -> bytes | None:
    """Return the text of a line; None if the line is incomplete."""
    if line[8:9] != b" " or not line.endswith(b"\n"):
        return None
    text = line[9:]
    return text if line[:8] == b"%08x" % zlib.crc32(text) else None


def _open_locked(output: Path, path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise JobError(
                f"cannot write {path}: {error.strerror}; choose an output in an existing, writable directory"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass  # another process has just removed it
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise JobError(
                    f"{output} is being written by another grok1 process; wait for it or choose another output"
                ) from None
            raise JobError(f"cannot lock {path}: {error.strerror}; choose an output on another filesystem") from None
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Flush the names in a directory to the disk, where the system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
