import errno
import os
import shutil
import subprocess
import sys
import zlib

import pytest

from grok1.errors import JobError
from grok1.jobs import journal as journal_module
from grok1.jobs.identity import check_same
from grok1.jobs.journal import Journal
from grok1.jobs.results import OrderedResults

JOB = {"command": "batch", "input": "abc", "max_tokens": 3}


def line(index):
    return f'{{"index": {index}, "text": "ñ {"x" * index}"}}\n'


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl.journal"


@pytest.fixture
def fill(output):
    """Leaves a journal with some rows, as a run does that is interrupted."""

    def fill(*indices):
        with Journal.open(output, restart=False) as journal:
            journal.begin(JOB)
            for index in indices:
                journal.add(index, line(index))

    return fill


def finish(output, rows, restart=False):
    """Does what rows of a job are left to do, and gives the output."""
    with Journal.open(output, restart=restart) as journal:
        journal.begin(JOB)
        for index in range(rows):
            if index not in journal:
                journal.add(index, line(index))
        journal.write_output(rows)
    return output.read_text(encoding="utf-8")


def expected(rows):
    return "".join(map(line, range(rows)))


def opened(output):
    """The job and the rows of the journal there is."""
    with Journal.open(output, restart=False) as journal:
        return journal.job, list(journal.lines()), journal.dropped_bytes


def test_a_job_from_beginning_to_end(output, path):
    with Journal.open(output, restart=False) as journal:
        assert (journal.job, journal.rows) == (None, 0)
        journal.begin(JOB)
        for count, index in enumerate([3, 0, 2, 1]):
            assert index not in journal
            journal.add(index, line(index))
            assert (index in journal, journal.rows) == (True, count + 1)
        assert not output.exists()
        journal.write_output(4)
    assert output.read_text(encoding="utf-8") == expected(4)
    assert os.listdir(output.parent) == [output.name]


def test_what_was_added_is_there_again(output, fill):
    fill(5, 2)
    assert opened(output) == (JOB, [line(2), line(5)], 0)
    fill(0)
    assert opened(output) == (JOB, [line(0), line(2), line(5)], 0)
    assert finish(output, 6) == expected(6)


def test_an_output_needs_all_rows(output, fill):
    fill(0, 1)
    with Journal.open(output, restart=False) as journal, pytest.raises(ValueError, match="2 of 3 rows"):
        journal.write_output(3)
    assert not output.exists()


def test_a_last_line_that_is_torn_anywhere_is_dropped(output, path, fill):
    fill(0, 1)
    kept = path.stat().st_size
    fill(2)
    whole = path.read_bytes()
    for size in range(kept, len(whole)):
        path.write_bytes(whole[:size])
        assert opened(output) == (JOB, [line(0), line(1)], size - kept)
        fill(2)
        assert path.read_bytes() == whole


def test_a_first_line_that_is_torn_anywhere_begins_a_new_journal(output, path, fill):
    fill()
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert opened(output)[:2] == (None, [])
        fill()
        assert path.read_bytes() == whole


def test_a_flipped_bit_costs_what_follows_and_never_gives_a_wrong_row(output, path, fill):
    fill(0, 1, 2, 3)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    second = sum(map(len, lines[:2]))
    for place in range(second, second + len(lines[2])):
        for bit in (1, 32):
            damaged = bytearray(whole)
            damaged[place] ^= bit
            path.write_bytes(damaged)
            assert opened(output) == (JOB, [line(0)], len(whole) - second)
    assert finish(output, 4) == expected(4)


def test_a_damaged_first_line_does_not_cost_the_rows_unasked(output, path, fill):
    fill(0, 1)
    damaged = path.read_bytes().replace(b"abc", b"abd")
    path.write_bytes(damaged)
    with pytest.raises(JobError, match="is damaged in its first line: begin anew with --restart"):
        opened(output)
    assert path.read_bytes() == damaged
    assert finish(output, 2, restart=True) == expected(2)


@pytest.mark.parametrize("count", [1, 5000])
def test_zeros_at_the_end_after_a_power_cut(count, output, path, fill):
    fill(0, 1)
    with path.open("ab") as file:
        file.write(bytes(count))
    assert opened(output) == (JOB, [line(0), line(1)], count)
    assert finish(output, 3) == expected(3)


def test_zeros_only(output, path):
    path.write_bytes(bytes(4096))
    assert finish(output, 2) == expected(2)


def test_a_line_whose_text_is_no_row_ends_the_journal(output, path, fill):
    fill(0)
    for text in (b"no index\n", b"1\n"):
        whole = path.read_bytes()
        path.write_bytes(whole + b"%08x " % zlib.crc32(text) + text)
        assert opened(output)[1] == [line(0)]
        path.write_bytes(whole)


@pytest.mark.parametrize("content", [b"my diary\n", b"\0\0 data", b'{"grok1_journal": 1}\n', b"00000000 {}\n"])
@pytest.mark.parametrize("restart", [False, True])
def test_another_file_in_its_place_is_left_alone(content, restart, output, path):
    path.write_bytes(content)
    with pytest.raises(JobError, match=r"out.jsonl.journal is there already, and no journal of grok1: move it"):
        Journal.open(output, restart=restart)
    assert path.read_bytes() == content


def test_a_journal_of_another_version(output, path):
    text = b'{"grok1_journal": 99}\n'
    content = b"%08x " % zlib.crc32(text) + text
    path.write_bytes(content)
    with pytest.raises(JobError, match="written by another version of grok1: finish with that, or --restart"):
        opened(output)
    assert path.read_bytes() == content


def test_an_output_that_is_there_is_replaced_only_when_asked(output, path):
    output.write_text("precious")
    with pytest.raises(JobError, match=r"out.jsonl is there already: name another file, or replace it with --restart"):
        Journal.open(output, restart=False)
    assert os.listdir(output.parent) == [output.name]
    path.touch()  # a run that was killed before it began
    with pytest.raises(JobError, match="is there already"):
        Journal.open(output, restart=False)
    with Journal.open(output, restart=True) as journal:
        journal.begin(JOB)
        journal.add(0, line(0))
    assert output.read_text() == "precious"
    assert finish(output, 2) == expected(2)  # goes on with the replacing, unasked


def test_a_restart_forgets_what_was_done(output, path, fill):
    fill(0, 1)
    before = path.read_bytes()
    with Journal.open(output, restart=True) as journal:
        assert (journal.job, journal.rows, 0 in journal) == (None, 0, False)
    assert path.read_bytes() == before  # until it begins
    assert finish(output, 1, restart=True) == expected(1)


def test_outputs_that_cannot_be(tmp_path):
    with pytest.raises(JobError, match="is a folder: name a file to write"):
        Journal.open(tmp_path, restart=False)
    with pytest.raises(
        JobError, match=r"cannot write .*none/out.journal \(No such file or directory\): name an output"
    ):
        Journal.open(tmp_path / "none" / "out", restart=False)
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(JobError, match="link is a symbolic link"):
        Journal.open(tmp_path / "link", restart=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(JobError, match="pipe is no regular file"):
        Journal.open(tmp_path / "pipe", restart=True)


def test_another_process_has_it(output, fill):
    fill(0)
    code = (
        "import sys, pathlib\nfrom grok1.jobs.journal import Journal\n"
        "with Journal.open(pathlib.Path(sys.argv[1]), restart=False):\n    print('open', flush=True)\n    input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"open\n"
        for restart in (False, True):
            with pytest.raises(JobError, match=r"out.jsonl is being written by another run of grok1: wait for that"):
                Journal.open(output, restart=restart)
        other.kill()
        other.wait()
    assert finish(output, 2) == expected(2)


def test_one_that_was_never_begun_leaves_nothing(output):
    with Journal.open(output, restart=False):
        pass
    assert os.listdir(output.parent) == []


# Disks


@pytest.fixture
def full_disk(monkeypatch):
    """Lets so many bytes be written, the last of them in a part of a write, and no more."""
    pwrite = os.pwrite

    def full_disk(room):
        def write(descriptor, data, offset):
            nonlocal room
            if not room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = pwrite(descriptor, data[:room], offset)
            room -= written
            return written

        monkeypatch.setattr(os, "pwrite", write)
        return lambda: monkeypatch.setattr(os, "pwrite", pwrite)

    return full_disk


def test_a_full_disk_keeps_every_row_that_it_had_room_for(output, path, fill, full_disk):
    fill(0, 1, 2)
    sizes = [len(text) for text in path.read_bytes().splitlines(keepends=True)]
    whole = path.read_bytes()
    path.unlink()
    for room in range(len(whole)):
        make_room = full_disk(room)
        with Journal.open(output, restart=True) as journal:
            with pytest.raises(JobError) as caught:
                fill_all(journal)
            told = str(caught.value)
            kept = sum(room >= sum(sizes[: count + 1]) for count in (1, 2, 3))
            assert told.startswith(f"cannot write {path} (No space left on device): make room; {kept} rows are kept")
            assert path.read_bytes() == whole[: sum(sizes[: kept + 1]) if room >= sizes[0] else 0]
        make_room()
        assert finish(output, 4) == expected(4)
        output.unlink()


def fill_all(journal):
    journal.begin(JOB)
    for index in range(3):
        journal.add(index, line(index))


def test_a_disk_that_takes_a_line_in_parts(output, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:3], offset))
    assert finish(output, 5) == expected(5)


def test_no_room_for_the_output(output, path, fill, monkeypatch):
    fill(0, 1)
    before = path.read_bytes()

    def replace(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(JobError, match=r"out.jsonl \(No space left on device\): make room; all 2 rows are kept in"):
            finish(output, 2)
    assert path.read_bytes() == before
    assert os.listdir(output.parent) == [path.name]
    assert finish(output, 2) == expected(2)


def test_a_run_that_ends_between_the_output_and_the_journal(output, path, fill):
    fill(0, 1)
    rows = path.read_bytes()
    finish(output, 2)
    path.write_bytes(rows)
    assert finish(output, 2) == expected(2)
    assert not path.exists()


def test_bytes_that_do_not_reach_the_disk_stop_the_job(output, path, monkeypatch):
    monkeypatch.setattr(journal_module, "_SYNC_SECONDS", 0.0)
    with Journal.open(output, restart=False) as journal:
        journal.begin(JOB)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
            journal.add(0, line(0))
            journal._syncing.join()
        with pytest.raises(JobError, match=r"cannot write .* \(Input/output error\)"):
            journal.add(1, line(1))
    assert finish(output, 2) == expected(2)


@pytest.fixture
def removed_journal(output, monkeypatch):
    """A journal of two rows that is removed, and has found out."""

    def removed_journal(remove):
        monkeypatch.setattr(journal_module, "_SYNC_SECONDS", 0.0)
        journal = Journal.open(output, restart=False)
        journal.begin(JOB)
        journal.add(0, line(0))
        journal.add(1, line(1))
        remove()
        journal._syncing.join()
        return journal

    return removed_journal


def test_a_journal_that_is_removed_is_written_again(output, path, removed_journal):
    with removed_journal(path.unlink) as journal:
        for doing in (lambda: journal.add(2, line(2)), lambda: journal.write_output(2)):
            with pytest.raises(JobError, match=r"out.jsonl.journal was removed .* written again with the rows"):
                doing()
    assert opened(output) == (JOB, [line(0), line(1)], 0)


def test_a_folder_that_is_removed_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "_SYNC_SECONDS", 0.0)
    folder = tmp_path / "results"
    folder.mkdir()
    output = folder / "out.jsonl"
    with Journal.open(output, restart=False) as journal:
        journal.begin(JOB)
        journal.add(0, line(0))
        shutil.rmtree(folder)
        journal._syncing.join()
        with pytest.raises(JobError, match="written again"):
            journal.add(1, line(1))
    assert finish(output, 2) == expected(2)


def test_a_journal_that_is_replaced_leaves_the_other_file_alone(output, path, removed_journal):
    def replace():
        path.with_name("mine").write_text("mine")
        os.replace(path.with_name("mine"), path)

    with (
        removed_journal(replace) as journal,
        pytest.raises(JobError, match=r"was removed .* cannot be written again \(File exists\): its rows are lost"),
    ):
        journal.write_output(2)
    assert path.read_text() == "mine"
    assert not output.exists()


def test_a_journal_that_is_removed_at_the_end(output, path):
    with Journal.open(output, restart=False) as journal:
        journal.begin(JOB)
        journal.add(0, line(0))
        path.unlink()
        with pytest.raises(JobError, match="written again with the rows"):
            journal.write_output(1)
    assert finish(output, 1) == expected(1)


# What goes with it


def test_rows_go_out_in_order():
    written = []
    results = OrderedResults(written.append)
    for index, out in [(2, 0), (0, 1), (3, 1), (1, 4), (4, 5)]:
        assert index not in results
        results.add(index, line(index))
        assert index in results
        assert written == [line(i) for i in range(out)]


def test_jobs_that_differ_say_in_what(path):
    before = {"command": "batch", "input": "a", "max_tokens": 4, "stop": [], "mesh": [1, 2], "echo": False, "jax": "1"}
    check_same(path, before, before)
    check_same(path, before, {"input": "a"})
    now = {"input": "b", "max_tokens": 5, "stop": ["x", "y"], "mesh": [1, 1], "echo": True, "jax": "2", "top_k": 3}
    with pytest.raises(JobError) as caught:
        check_same(path, before, now)
    assert str(caught.value) == (
        f"{path} belongs to another job (the content of the input has changed; --max-tokens was 4, now it is 5; "
        "--stop was not given, now it is x,y; --mesh was 1,2, now it is 1,1; --echo was not given, now it is given; "
        "the version of JAX was 1, now it is 2; --top-k was not given, now it is 3): go on with that one, name another "
        "output, or begin anew with --restart"
    )
