"""The lines of an input, which can be read again: once to validate them, and once to process them."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, cast

from grok1.errors import JobError, RequestError

Format = Literal["txt", "jsonl"]

MAX_LINE_BYTES = 16 << 20
"""Maximum length of a row; a prompt that fills the release's context takes a hundredth of it."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_KEPT_IN_MEMORY = 16 << 20  # bytes of a pipe that are not written to a temporary file


class Source:
    """An input with one row per line.

        source = Source.open(Path("prompts.jsonl.gz"))
        for line in source.lines():
            ...
        source.sha256

    Attributes:
        name: for messages.
        format: of the lines.
        path: of the file; None for standard input.
        sha256: hexadecimal, of the decompressed input, once `lines` or `content` has read it to its end.
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
        """Open a file of rows.

        Args:
            path: a file, compressed if its name ends in ".gz"; "-" is standard input, which is read to its end.
            format: of the lines; None infers it from the name, and assumes JSON lines for standard input.

        Raises:
            JobError: if the file does not exist or its format cannot be inferred.
        """
        if str(path) == "-":
            if sys.stdin is None:
                raise JobError("standard input is closed; name an input file")
            return cls("standard input", format or "jsonl", None, _spooled(sys.stdin.buffer, "standard input"))
        if path.is_dir():
            raise JobError(f"{path} is a directory; name a .txt or .jsonl file")
        if not path.exists():
            raise JobError(f"{path} does not exist; check the path")
        ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        if format is None and ending not in (".txt", ".jsonl"):
            raise JobError(
                f"unknown file type of {path}, expected .txt or .jsonl, optionally with .gz; set the format with "
                "--format"
            )
        spooled = None
        if not path.is_file():  # a pipe, which can be read only once
            try:
                with path.open("rb") as file:
                    spooled = _spooled(file, str(path))
            except OSError as error:
                raise _cannot_read(str(path), error) from None
        return cls(str(path), format or cast(Format, ending[1:]), path, spooled)

    def lines(self) -> Iterator[bytes | None]:
        """Read all lines from the beginning, without their line ends.

        Yields:
            each line; None for a line longer than `MAX_LINE_BYTES`.

        Raises:
            JobError: if they cannot be read.
        """
        digest = hashlib.sha256()
        with self._opened() as file:
            mark = _BYTE_ORDER_MARK  # to be removed from the first line
            while line := file.readline(MAX_LINE_BYTES):
                digest.update(line)
                too_long = False
                while not line.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
                    digest.update(rest)
                    too_long, line = True, rest
                yield None if too_long else line.removeprefix(mark).removesuffix(b"\n").removesuffix(b"\r")
                mark = b""
        self.sha256 = digest.hexdigest()

    def content(self) -> bytes:
        """Read the whole input.

        Raises:
            JobError: if it cannot be read.
        """
        with self._opened() as file:
            data = file.read()
        self.sha256 = hashlib.sha256(data).hexdigest()
        return data.removeprefix(_BYTE_ORDER_MARK)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        try:
            with contextlib.ExitStack() as stack:
                file = self._spooled
                if file is None:
                    assert self.path is not None
                    file = stack.enter_context(self.path.open("rb"))
                file.seek(0)
                if self.path is not None and self.path.suffix == ".gz":
                    file = cast(IO[bytes], stack.enter_context(gzip.open(file)))
                yield file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise JobError(f"{self.name} is not a valid gzip file: {error}; compress it again") from None
        except OSError as error:
            raise _cannot_read(self.name, error) from None


def _spooled(file: IO[bytes], name: str) -> IO[bytes]:
    """Read a pipe to its end into a temporary file, so that it can be read twice."""
    spooled = tempfile.SpooledTemporaryFile(_KEPT_IN_MEMORY)  # noqa: SIM115 - it lives as long as its source
    try:
        while block := file.read(1 << 20):
            spooled.write(block)
    except OSError as error:
        raise JobError(
            f"cannot buffer {name} in {tempfile.gettempdir()}: {error.strerror}; free disk space there"
        ) from None
    return cast(IO[bytes], spooled)


def _cannot_read(name: str, error: OSError) -> JobError:
    return JobError(f"cannot read {name}: {error.strerror}; check the path and its permissions")


def decode_utf8(data: bytes, source: str) -> str:
    """Decode UTF-8 text.

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
            f"{source} is not valid UTF-8: byte {data[error.start]:#04x} at offset {error.start}; convert it to UTF-8"
        ) from None
