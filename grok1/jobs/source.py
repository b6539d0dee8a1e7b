"""The lines of an input file, which are read twice: first to validate them, then to process them."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from grok1.errors import JobError, RequestError

Format = Literal["txt", "jsonl"]

MAX_LINE_BYTES = 16 << 20
"""Maximum length of a row; a prompt that fills the release's context takes a hundredth of it."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_KEPT_IN_MEMORY = 16 << 20  # bytes of a pipe that are not written to a temporary file


@dataclass(frozen=True)
class Line:
    """A line of an input.

    Attributes:
        number: from 1.
        content: without the line end; None if it is longer than `MAX_LINE_BYTES`.
    """

    number: int
    content: bytes | None


class Source:
    """An input with one row per line.

        source = Source.open(Path("prompts.jsonl.gz"))
        for line in source.lines():
            ...
        source.sha256

    Attributes:
        name: for messages.
        format: of the lines.
        sha256: hexadecimal, of the decompressed bytes that the last call of `lines` has read.
    """

    def __init__(self, name: str, format: Format, path: Path | None, spooled: IO[bytes] | None):
        """Use `open`."""
        self.name = name
        self.format = format
        self.path = path
        self.sha256 = ""
        self._spooled = spooled

    @classmethod
    def open(cls, path: Path, format: Format | None = None) -> Source:
        """Opens a file of rows.

        Args:
            path: a file, compressed if its name ends in ".gz"; "-" is standard input, which is read to its end.
            format: of the lines; None infers it from the name, and assumes JSON lines for standard input.

        Raises:
            JobError: if the file does not exist or its format cannot be inferred.
        """
        if str(path) == "-":
            if sys.stdin is None:
                raise JobError("standard input is closed: name a file of rows")
            return cls("standard input", format or "jsonl", None, _spooled(sys.stdin.buffer, "standard input"))
        if path.is_dir():
            raise JobError(f"{path} is a folder, expected a file of rows")
        if not path.exists():
            raise JobError(f"{path} does not exist: check its name")
        ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        if format is None and ending not in (".txt", ".jsonl"):
            raise JobError(
                f"{path.name} ends neither in .txt nor in .jsonl, with or without .gz: give the format "
                "of its lines with --format"
            )
        spooled = None
        if not path.is_file():  # a pipe, which can be read only once
            try:
                with path.open("rb") as file:
                    spooled = _spooled(file, str(path))
            except OSError as error:
                raise _cannot_read(str(path), error) from None
        return cls(str(path), format or cast(Format, ending[1:]), path, spooled)

    def lines(self) -> Iterator[Line]:
        """Reads all lines from the beginning.

        Raises:
            JobError: if they cannot be read.
        """
        digest = hashlib.sha256()
        self.sha256 = ""
        with self._errors(), self._opened() as file:
            number = 0
            while data := file.readline(MAX_LINE_BYTES):
                number += 1
                digest.update(data)
                whole = True
                while not data.endswith(b"\n") and (more := file.readline(MAX_LINE_BYTES)):
                    digest.update(more)
                    whole, data = False, more
                if number == 1:
                    data = data.removeprefix(_BYTE_ORDER_MARK)
                yield Line(number, data.removesuffix(b"\n").removesuffix(b"\r") if whole else None)
        self.sha256 = digest.hexdigest()

    def content(self) -> bytes:
        """The whole input as one text.

        Raises:
            JobError: if it cannot be read.
        """
        with self._errors(), self._opened() as file:
            data = file.read()
        self.sha256 = hashlib.sha256(data).hexdigest()
        return data.removeprefix(_BYTE_ORDER_MARK)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise JobError(f"{self.name} is not a complete gzip file ({error}): compress it again") from None
        except OSError as error:
            raise _cannot_read(self.name, error) from None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        with contextlib.ExitStack() as stack:
            if self._spooled is not None:
                self._spooled.seek(0)
                file = self._spooled
            else:
                assert self.path is not None
                file = stack.enter_context(self.path.open("rb"))
            if self.path is not None and self.path.suffix == ".gz":
                unpacked = stack.enter_context(gzip.open(file))
                file = cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, unpacked), 1 << 16))
            yield file


def _spooled(file: IO[bytes], name: str) -> IO[bytes]:
    """Reads a pipe to its end into a temporary file, so that it can be read twice."""
    spooled = tempfile.SpooledTemporaryFile(_KEPT_IN_MEMORY)  # noqa: SIM115 - it lives as long as its source
    try:
        while block := file.read(1 << 20):
            spooled.write(block)
    except OSError as error:
        raise JobError(f"cannot buffer {name} ({error.strerror}): free some space in {tempfile.gettempdir()}") from None
    return cast(IO[bytes], spooled)


def _cannot_read(name: str, error: OSError) -> JobError:
    return JobError(f"cannot read {name} ({error.strerror}): check its name and permissions")


def decode_utf8(data: bytes, source: str) -> str:
    """Decodes UTF-8 text.

    Args:
        data: the text.
        source: where it comes from, for the message.

    Raises:
        RequestError: if it is not UTF-8; the message gives the offset of the first invalid byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{source} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start} is invalid; "
            "convert it to UTF-8"
        ) from None
