"""A journal through kills, power cuts, full disks and other people's hands."""

import errno
import fcntl
import json
import os
import shutil
import threading
import time

import pytest

from grok1.errors import JobError
from grok1.jobs.journal import Journal

LINES = [json.dumps({"index": index, "text": "ä\n" * index}, ensure_ascii=False) + "\n" for index in range(5)]
ORDER = [3, 0, 4, 1]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "folder" / "out.jsonl"


@pytest.fixture
def path(output):
    """The journal of a job that has done four of five rows."""
    output.parent.mkdir()
    with Journal.open(output, restart=False) as journal:
        assert journal.job is None
        journal.begin({"input": "abc", "n": [1, 2]})
        for index in ORDER:
            journal.add(index, LINES[index])
        path = journal.path
    assert path.exists()
    assert not output.exists()
    return path


def test_a_job_goes_on(path, output):
    with Journal.open(output, restart=False) as journal:
        assert journal.job == {"input": "abc", "n": [1, 2]}
        assert journal.rows == 4
        assert [index in journal for index in range(6)] == [True, True, False, True, True, False]
        assert list(journal.lines()) == [LINES[0], LINES[1], LINES[3], LINES[4]]
        journal.begin({"ignored": True})
        journal.add(2, LINES[2])
        journal.write_output(5, "the end\n")
        assert output.read_text() == "".join(LINES) + "the end\n"
    assert [file.name for file in output.parent.iterdir()] == ["out.jsonl"]


def test_a_last_line_that_is_torn_anywhere_is_dropped(path, output):
    whole = path.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        with Journal.open(output, restart=False) as journal:
            assert journal.rows == 3
            assert journal.dropped_bytes == end - last
            journal.begin({})
            journal.add(1, LINES[1])
        assert path.read_bytes() == whole


def test_a_first_line_that_is_torn_begins_anew(path, output):
    whole = path.read_bytes()
    for end in range(whole.index(b"\n") + 1):
        path.write_bytes(whole[:end])
        with Journal.open(output, restart=False) as journal:
            assert (journal.job, journal.rows) == (None, 0)
            journal.begin({"new": 1})
        with Journal.open(output, restart=False) as journal:
            assert journal.job == {"new": 1}


def test_zeros_that_a_power_cut_leaves_are_dropped(path, output):
    whole = path.read_bytes()
    for start, rows in ((len(whole), 4), (len(whole) - 5, 3), (0, 0)):
        path.write_bytes(whole[:start] + bytes(1000))
        with Journal.open(output, restart=False) as journal:
            assert journal.rows == rows
            assert (journal.job is None) == (start == 0)


def test_nothing_after_a_changed_byte_counts(path, output):
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for place in range(ends[0], len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with Journal.open(output, restart=False) as journal:
            assert journal.rows == sum(end <= place for end in ends) - 1


def test_what_is_no_journal_stays_as_it_is(output):
    output.parent.mkdir()
    path = output.with_name("out.jsonl.journal")
    for content in (b"my diary\n", b'{"grok1_journal": 1}\n', b"00000000 {}\n", b"0123456Z"):
        path.write_bytes(content)
        for restart in (False, True):
            with pytest.raises(JobError, match="not a grok1 journal"):
                Journal.open(output, restart=restart)
        assert path.read_bytes() == content


def test_a_journal_of_another_version_is_left_alone(path, output, monkeypatch):
    monkeypatch.setattr("grok1.jobs.journal._VERSION", 2)
    with pytest.raises(JobError, match="another version of grok1"):
        Journal.open(output, restart=False)
    with Journal.open(output, restart=True) as journal:
        assert journal.job is None


def test_a_restart_forgets_when_it_begins_and_not_before(path, output):
    whole = path.read_bytes()
    output.write_text("old results")
    with Journal.open(output, restart=True) as journal:
        assert (journal.job, journal.rows, 0 in journal) == (None, 0, False)
    assert path.read_bytes() == whole
    with Journal.open(output, restart=True) as journal:
        journal.begin({"new": 1})
        journal.add(0, LINES[0])
        assert output.read_text() == "old results"
        journal.write_output(1)
    assert output.read_text() == LINES[0]


def test_results_are_not_overwritten(output):
    output.parent.mkdir()
    output.write_text("results")
    with pytest.raises(JobError, match="already exists"):
        Journal.open(output, restart=False)
    assert output.read_text() == "results"
    assert not output.with_name("out.jsonl.journal").exists()
    with pytest.raises(JobError, match="is a directory"):
        Journal.open(output.parent, restart=True)


def test_a_journal_that_was_never_begun_leaves_nothing(output):
    output.parent.mkdir()
    with Journal.open(output, restart=False):
        pass
    assert list(output.parent.iterdir()) == []
    with pytest.raises(JobError, match="in an existing, writable directory"):
        Journal.open(output.parent / "missing" / "out", restart=False)


def test_two_runs_on_one_output(path, output):
    with Journal.open(output, restart=False), pytest.raises(JobError, match="another grok1 process"):
        Journal.open(output, restart=True)
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(JobError, match="another grok1 process"):
            Journal.open(output, restart=False)
    Journal.open(output, restart=False).close()


@pytest.mark.parametrize("written", [0, 1, 8, 20])
def test_a_full_disk_keeps_what_is_done(path, output, written, monkeypatch):
    whole = path.read_bytes()
    real = os.pwrite

    def full(descriptor, data, offset):
        if offset > len(whole):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[:written], offset)

    with Journal.open(output, restart=False) as journal:
        journal.begin({})
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(JobError, match=r"No space left on device.*4 rows that were saved"):
                journal.add(2, LINES[2])
        assert path.read_bytes() == whole
        journal.add(2, LINES[2])
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
            with pytest.raises(JobError, match="all 5 rows are saved"):
                journal.write_output(5)
        assert [file.name for file in output.parent.iterdir()] == [path.name]
        journal.write_output(5)
    assert output.read_text() == "".join(LINES)


def test_a_disk_error_is_reported_with_the_next_row(path, output, monkeypatch):
    def failing(descriptor):
        failed.set()
        raise OSError(errno.EIO, "Input/output error")

    def add_often(journal):
        for _ in range(100):
            time.sleep(0.01)
            journal.add(2, LINES[2])

    failed = threading.Event()
    with Journal.open(output, restart=False) as journal:
        journal.begin({})
        monkeypatch.setattr(os, "fsync", failing)
        journal.add(2, LINES[2])
        assert failed.wait(timeout=20)
        with pytest.raises(JobError, match=r"Input/output error.*rows that were saved"):
            add_often(journal)


def test_a_removed_folder_is_written_again(path, output):
    with Journal.open(output, restart=False) as journal:
        journal.begin({})
        shutil.rmtree(output.parent)
        journal.add(2, LINES[2])
        with pytest.raises(JobError, match="restored with all finished rows"):
            journal.write_output(5)
    with Journal.open(output, restart=False) as journal:
        assert journal.rows == 5
        journal.begin({})
        journal.write_output(5)
    assert output.read_text() == "".join(LINES)
