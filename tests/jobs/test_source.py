import gzip
import hashlib
import os
import threading

import pytest

from grok1.errors import JobError
from grok1.jobs import source as source_module
from grok1.jobs.source import Source

CONTENT = "eins\nzwei ñ\r\n\n drei ".encode()
LINES = [b"eins", "zwei ñ".encode(), b"", b" drei "]


def lines(source):
    return list(source.lines())


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_lines_of_a_file(name, write):
    source = Source.open(write(name, CONTENT))
    assert source.format == name.split(".")[1]
    for _ in range(2):  # it can be read again
        assert lines(source) == LINES
        assert source.sha256 == hashlib.sha256(CONTENT).hexdigest()


def test_the_last_newline_begins_no_line(write):
    assert lines(Source.open(write("a.txt", b"a\nb\n"))) == [b"a", b"b"]
    assert lines(Source.open(write("b.txt", b""))) == []


def test_a_byte_order_mark_is_no_part_of_the_first_line(write):
    mark = b"\xef\xbb\xbf"
    assert lines(Source.open(write("a.txt", mark + b"a\n" + mark + b"b"))) == [b"a", mark + b"b"]


def test_a_given_format_goes_before_the_ending(write):
    assert Source.open(write("a.txt", b"{}"), "jsonl").format == "jsonl"
    assert Source.open(write("a.csv.gz", b"{}"), "txt").format == "txt"


def test_lines_that_are_too_long(write, monkeypatch):
    monkeypatch.setattr(source_module, "MAX_LINE_BYTES", 8)
    content = b"1234567\n12345678\n" + b"9" * 30 + b"\nshort\n" + b"9" * 16
    source = Source.open(write("a.txt", content))
    assert lines(source) == [b"1234567", None, None, b"short", None]
    assert source.sha256 == hashlib.sha256(content).hexdigest()


def test_a_pipe_is_read_once_and_kept(tmp_path):
    pipe = tmp_path / "rows.jsonl.gz"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(gzip.compress(CONTENT),))
    writer.start()
    source = Source.open(pipe)
    writer.join()
    assert lines(source) == lines(source) == LINES


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"a", r"unknown file type of .*a.csv, expected .txt or .jsonl, .* --format"),
        ("a.gz", b"a", r"unknown file type of .*a.gz"),
    ],
)
def test_endings_that_say_nothing(name, content, words, write):
    with pytest.raises(JobError, match=words):
        Source.open(write(name, content))


def test_files_that_are_none(tmp_path):
    with pytest.raises(JobError, match="is a directory"):
        Source.open(tmp_path)
    with pytest.raises(JobError, match=r"none.txt does not exist"):
        Source.open(tmp_path / "none.txt")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"junk" + data, lambda data: data[:-5] + b"x" * 5]
)
def test_damaged_gzip_files(damage, tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(damage(gzip.compress(CONTENT)))
    with pytest.raises(JobError, match=r"a.txt.gz is not a valid gzip file: .*; compress it again"):
        lines(Source.open(path))


def test_a_file_that_is_gone_when_it_is_read_again(write):
    path = write("a.txt", CONTENT)
    source = Source.open(path)
    path.unlink()
    with pytest.raises(JobError, match=r"cannot read .*a.txt: No such file or directory"):
        lines(source)
