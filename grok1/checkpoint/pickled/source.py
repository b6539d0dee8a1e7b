"""Bounded reads of a tensor file for the pickle scanner, within the limits of pickle's frames."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, NoReturn

from grok1.errors import CheckpointError

_WINDOW = 1024  # bytes a read: the opcodes before or after an array's data take a third of that
_MAX_STRUCTURE = 16 * 1024  # bytes of a file that are not array data: 650 in the release's
MAX_STRING = 256
"""Bytes of the longest string or name that the scanner reads."""


class ScanError(CheckpointError):
    """The error for an invalid tensor file; `fault` is the message without the file's name and the advice."""

    def __init__(self, path: Path, fault: str) -> None:
        self.fault = fault
        super().__init__(f"{path}: {fault}; download or restore the file")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for unbuffered reading.

    Raises:
        ScanError: if the path is not a regular file.
        OSError: if it cannot be opened.
    """
    # Other files are not even opened: opening a pipe or a device may block or do harm.
    _check_regular(path, os.stat(path))
    file: BinaryIO = open(path, "rb", buffering=0, opener=_open_nonblocking)  # noqa: SIM115
    try:
        _check_regular(path, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, device or socket"
        raise ScanError(path, f"is {kind}, expected a regular file")


def _opcode_name(code: int) -> str:
    import pickletools  # only for error messages

    return next((opcode.name for opcode in pickletools.opcodes if opcode.code == chr(code)), f"0x{code:02x}")


class PickleSource:
    """A position in an open file that only moves forward.

    Attributes:
        position: of the next byte.
        size: of the file.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.position = 0
        self.size = os.fstat(file.fileno()).st_size
        self._path = path
        self._file = file
        self._window = b""
        self._window_start = 0
        self._structure = 0
        self._frame_end: int | None = None
        self._opcode_at = 0
        self._opcode = -1

    def reject(self, fault: str) -> NoReturn:
        """Raise a `ScanError` that names the current opcode and its position."""
        name = "" if self._opcode < 0 else f", opcode {_opcode_name(self._opcode)}"
        raise ScanError(self._path, f"at byte {self._opcode_at}{name}: {fault}")

    def next_opcode(self) -> int:
        """Return the opcode at the position."""
        if self.position == self._frame_end:
            self._frame_end = None
        self._opcode_at, self._opcode = self.position, -1
        self._opcode = self.take(1)[0]
        return self._opcode

    def begin_frame(self, size: int) -> None:
        """Start a frame of `size` bytes; no opcode or array may cross its end."""
        if self._frame_end is not None:
            self.reject("nested frame")
        if size > self.size - self.position:
            self.reject(f"a frame of {size} bytes extends past the end of the file at byte {self.size}")
        self._frame_end = self.position + size

    def take(self, size: int) -> bytes:
        """Return the next bytes, at most `MAX_STRING`; the total is bounded, too."""
        self._check_room(size)
        self._structure += size
        if self._structure > _MAX_STRUCTURE:
            self.reject(f"more than {_MAX_STRUCTURE} bytes in addition to array data")
        data = self._at(self.position, size)
        self.position += size
        return data

    def skip(self, size: int) -> None:
        """Skip the next bytes without reading them."""
        self._check_room(size)
        self.position += size

    def peek_behind(self, offset: int, size: int) -> bytes:
        """Return skipped bytes, at most `MAX_STRING`."""
        return self._at(offset, size)

    def unsigned(self, size: int) -> int:
        """Return the next bytes as an unsigned little-endian number."""
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        """Return the next bytes up to a line's end."""
        line = bytearray()
        while (byte := self.take(1)) != b"\n":
            line += byte
            if len(line) > MAX_STRING:
                self.reject(f"name longer than {MAX_STRING} bytes")
        return line.decode("utf-8", "replace")

    def _check_room(self, size: int) -> None:
        if self.position + size > self.size:
            self.reject(f"unexpected end of file at byte {self.size}")
        if self._frame_end is not None and self.position + size > self._frame_end:
            self.reject(f"extends past the end of its frame at byte {self._frame_end}")

    def _at(self, offset: int, size: int) -> bytes:
        start = offset - self._window_start
        if not 0 <= start <= len(self._window) - size:
            self._file.seek(offset)
            self._window = self._file.read(_WINDOW) or b""
            self._window_start, start = offset, 0
            if len(self._window) < size:
                self.reject("the file was truncated while it was being read")
        return self._window[start : start + size]
