"""`grok1 batch` as a user runs it: where rows come from and go to, and every way in which a run may end."""

import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grok1.jobs.journal import Journal

WORDS = [
    "the answer",
    "Ein Füßchen",
    "東京",
    "once upon a time",
    "0 1 2",
    "[EOS] \\n",
    "a",
    "many more words than that",
]
PROMPTS = [f"{WORDS[i % len(WORDS)]} {i}" for i in range(24)]
OPTIONS = ["--mesh", "1,1", "-n", 8, "--seed", 3, "--ignore-eos", "--batch-size", 4]


def text_of(prompts):
    return "".join(prompt + "\n" for prompt in prompts).encode()


def objects_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def batch(grok1, checkpoint):
    """Runs `grok1 batch` in this process, on the small model and one device."""

    def batch(*arguments, stdin=b"", folder=checkpoint):
        return grok1("batch", "-c", folder, *OPTIONS, *arguments, stdin=stdin)

    return batch


@pytest.fixture
def prompts(tmp_path):
    """A file of 24 prompts."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(text_of(PROMPTS))
    return path


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def journal(output):
    return output.with_name("out.jsonl.journal")


@pytest.fixture(scope="session")
def whole(checkpoint):
    """What an uninterrupted run over the 24 prompts writes."""
    return output_of(text_of(PROMPTS), "batch", "-c", checkpoint, *OPTIONS, "-", "--format", "txt")


def output_of(stdin, *arguments):
    command = [sys.executable, "-m", "grok1", *map(str, arguments)]
    return subprocess.run(command, input=stdin, stdout=subprocess.PIPE, check=True).stdout.decode()


@pytest.fixture
def interrupted(batch, monkeypatch):
    """Runs the command until so many rows are done, and then it ends as at a second Ctrl-C."""

    def interrupted(rows, *arguments, **options):
        add = Journal.add

        def adding(self, index, line):
            if self.rows == rows:
                raise KeyboardInterrupt
            add(self, index, line)

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "add", adding)
            result = batch(*arguments, **options)
        assert (result.code, result.out, result.err) == (130, "", "")

    return interrupted


def assert_fails(result, *words):
    assert (result.code, result.out) == (1, "")
    last = result.err.splitlines()[-1]
    assert last.startswith("grok1: error: ")
    for word in words:
        assert word in last


def rows_in(journal):
    """The indices of the rows in a journal, also of one that a process is writing."""
    try:
        lines = journal.read_bytes().split(b"\n")[1:-1]
    except FileNotFoundError:
        return []
    return [int(line.split(b" ")[1]) for line in lines]


def await_rows(process, journal, count):
    """Waits until a process has written so many rows."""
    while len(rows_in(journal)) < count:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.002)
            raise AssertionError(f"it ended early: {process.communicate()}")


# Where rows come from, and go to


def test_a_file_of_text(whole):
    results = [json.loads(line) for line in whole.splitlines()]
    assert [result["prompt"] for result in results] == PROMPTS
    assert [result["index"] for result in results] == list(range(24))
    for result in results:
        [completion] = result["completions"]
        assert len(completion["token_ids"]) == result["completion_tokens"] == 8
        assert completion["finish_reason"] == "max_tokens"


def test_a_row_repeats_in_run(whole, complete):
    """The seed of a completion gives it again."""
    for line in whole.splitlines()[:3]:
        told = json.loads(line)
        seed = told["completions"][0]["seed"]
        [alone] = complete(told["prompt"], "-n", 8, "--seed", seed, "--ignore-eos", "--json").lines
        assert (alone["text"], alone["token_ids"]) == tuple(
            told["completions"][0][key] for key in ("text", "token_ids")
        )


@pytest.mark.parametrize("form", ["txt", "csv.gz", "jsonl.gz", "openai", "stdin"])
def test_all_forms_of_an_input_give_the_same(form, batch, whole, tmp_path):
    objects = objects_of({"prompt": prompt} for prompt in PROMPTS)
    openai = objects_of(
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"model": "grok-1", "prompt": prompt}}
        for i, prompt in enumerate(PROMPTS)
    )
    text = text_of(PROMPTS)
    if form == "stdin":
        result = batch("-", stdin=objects)
    else:
        path = tmp_path / f"rows.{'jsonl' if form == 'openai' else form}"
        content = {"txt": text, "csv.gz": text, "jsonl.gz": objects, "openai": openai}[form]
        path.write_bytes(gzip.compress(content) if form.endswith("gz") else content)
        result = batch(path, *(["--format", "txt"] if form == "csv.gz" else []))
    assert (result.code, result.err) == (0, "")
    if form == "openai":
        for i in range(24):
            result.out = result.out.replace(f'"index": {i}, "id": "{i}"', f'"index": {i}, "id": null')
    assert result.out == whole


def test_a_process_writes_the_same_to_a_file_and_to_a_pipe(start, checkpoint, prompts, output, whole):
    piped = start("batch", "-c", checkpoint, *OPTIONS, prompts)
    filed = start("batch", "-c", checkpoint, *OPTIONS, prompts, "-o", output)
    out, error = piped.communicate(timeout=120)
    assert (piped.returncode, out.decode(), error) == (0, whole, b"")
    assert (*filed.communicate(timeout=120), filed.returncode) == (b"", b"", 0)
    assert output.read_bytes() == out
    assert sorted(os.listdir(output.parent)) == [output.name, prompts.name]


def test_a_reader_that_leaves_early_is_no_error(start, checkpoint, prompts):
    process = start("batch", "-c", checkpoint, *OPTIONS, prompts)
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, b"")


def test_the_batch_size_does_not_show(batch, prompts, whole):
    assert batch(prompts, "--batch-size", 7).out == whole


def test_options_of_the_command_and_of_rows(batch, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a b", "id": "x", "n": 2}, {"prompt": [5, 6], "max_tokens": 2, "temperature": 0, "echo": False}]
    path.write_bytes(objects_of(rows))
    first, second = batch(path, "--echo", "--no-prompt", "--logprobs", 1).lines
    assert list(first) == ["index", "id", "completions", "prompt_tokens", "completion_tokens"]
    assert (first["id"], second["id"]) == ("x", None)
    one, two = first["completions"]
    assert two["seed"] == one["seed"] + 1
    assert one["text"].startswith("a b")
    assert [len(entry["top"]) for entry in one["logprobs"]] == [1] * 8
    assert [entry["token_id"] for entry in one["logprobs"]] == one["token_ids"]
    assert [len(each["token_ids"]) for each in second["completions"]] == [2]


def test_escapes_are_read_when_asked(batch, tmp_path):
    path = tmp_path / "rows.txt"
    path.write_bytes(b"a\\nb\n")
    assert batch(path, "--unescape").lines[0]["prompt"] == "a\nb"


def test_a_summary_in_json(batch, prompts, output):
    [told] = batch(prompts, "-o", output, "--json").lines
    assert told.pop("seconds") > 0
    assert 0.5 < told.pop("mean_slot_use") <= 1
    tokens = sum(json.loads(line)["prompt_tokens"] for line in output.read_text().splitlines())
    assert told == {
        "rows": 24,
        "resumed_rows": 0,
        "failed": 0,
        "seed": 3,
        "prompt_tokens": tokens,
        "completion_tokens": 192,
        "read_prompt_tokens": tokens,
        "batch_size": 4,
    }


def test_without_a_seed_one_is_drawn_and_kept(grok1, checkpoint, prompts, output, interrupted, monkeypatch):
    arguments = ["batch", "-c", checkpoint, "--mesh", "1,1", "-n", 4, prompts, "-o", output]
    add = Journal.add
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", lambda self, *row: _interrupt() if self.rows == 9 else add(self, *row))
        assert grok1(*arguments).code == 130
    [told] = grok1(*arguments, "--json").lines
    assert output.read_text() == grok1(*arguments[:-2], "--seed", told["seed"]).out


def _interrupt():
    raise KeyboardInterrupt


def test_a_person_sees_progress_and_a_summary(start, checkpoint, prompts, output, terminal):
    process = start(
        *("batch", "-c", checkpoint, *OPTIONS, prompts, "-o", output), env={"TERM": "xterm"}, stderr=terminal.there
    )
    terminal.read_until(" of 24 rows")
    terminal.read_until("tokens/s in")
    terminal.read_until("of 4 slots")
    shown = terminal.read_until("seed 3]")
    assert "[24 rows · " in shown
    assert "tokens in (" in shown
    assert process.wait(timeout=60) == 0


# What is refused


def test_bad_rows_are_all_told_and_nothing_begins(batch, tmp_path, output, monkeypatch):
    monkeypatch.setattr("grok1.cli.loading.load_model", lambda *_: pytest.fail("it loads the model"))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": 3}\n\n{"prompt": "a", "n": 0}\n')
    for arguments in ([], ["-o", output]):
        result = batch(path, *arguments)
        assert_fails(result, f"2 of 3 rows of {path} are bad, and nothing was begun", "--skip-bad")
        assert result.err.splitlines()[:-1] == [
            f"{path}, line 2: prompt is 3: expected one text, or one list of token ids",
            f"{path}, line 4: n is 0, expected 1 to 1024",
        ]
    assert os.listdir(tmp_path) == [path.name]
    path.write_bytes(b"\n")
    assert_fails(batch(path), "has no rows: give one a line")


def test_bad_rows_may_be_skipped(batch, tmp_path, output):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": 3, "id": "x"}\n{"prompt": "b"}\n')
    result = batch(path, "-o", output, "--skip-bad", "--json")
    assert result.code == 1
    assert result.err.splitlines() == [
        f"{path}, line 2: prompt is 3: expected one text, or one list of token ids",
        f'grok1: error: 1 of 3 rows failed: their lines in {output} have an "error"',
    ]
    assert (result.lines[0]["rows"], result.lines[0]["failed"]) == (3, 1)
    first, second, third = map(json.loads, output.read_text().splitlines())
    assert len(first["completions"]) == len(third["completions"]) == 1
    assert (second["id"], second["line"]) == ("x", 2)
    assert second["error"].startswith("prompt is 3")
    streamed = batch(path, "--skip-bad")
    assert (streamed.code, streamed.out) == (1, output.read_text())
    path.write_bytes(b"x\n")
    assert batch(path, "--skip-bad").lines[0]["error"].startswith("it is no JSON")


def test_outputs_that_are_refused(batch, prompts, output):
    output.write_text("precious")
    assert_fails(batch(prompts, "-o", output), f"{output} is there already: name another file, or replace it with")
    assert_fails(batch(prompts, "-o", prompts), "is the input: name another file to write")
    assert_fails(batch(prompts, "-o", output.parent), "is a folder")
    assert_fails(
        batch(prompts, "-o", output.parent / "none" / "out"), "No such file or directory", "folder that exists"
    )
    assert output.read_text() == "precious"
    assert prompts.read_bytes() == text_of(PROMPTS)


def test_inputs_that_are_refused(batch, tmp_path):
    assert_fails(batch(tmp_path / "none.txt"), "there is no file")
    assert_fails(batch(tmp_path), "is a folder")
    (tmp_path / "rows.csv").write_text("a")
    assert_fails(batch(tmp_path / "rows.csv"), "rows.csv ends neither in .txt nor in .jsonl", "--format")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "INPUT"),
        (["-", "--json"], "--json needs -o"),
        (["-", "--restart"], "--restart needs -o"),
        (["-", "--batch-size", 0], "--batch-size"),
        (["-", "--format", "csv"], "csv"),
    ],
)
def test_wrong_usage_of_batch(arguments, words, batch):
    result = batch(*arguments)
    assert (result.code, result.out) == (2, "")
    assert words in result.err


# Interrupted, and resumed


@pytest.mark.parametrize("rows", [0, 13])
def test_an_interrupted_job_goes_on_to_the_same_file(rows, batch, interrupted, prompts, output, journal, whole):
    interrupted(rows, prompts, "-o", output)
    assert (len(rows_in(journal)), output.exists()) == (rows, False)
    interrupted(min(23, rows + 2), prompts, "-o", output)
    result = batch(prompts, "-o", output)
    assert (result.code, result.out, result.err) == (0, "", "")
    assert output.read_text() == whole
    assert not journal.exists()


def test_a_resumed_job_does_not_do_rows_again(batch, interrupted, prompts, output):
    interrupted(20, prompts, "-o", output)
    [told] = batch(prompts, "-o", output, "--json").lines
    assert (told["rows"], told["resumed_rows"], told["completion_tokens"]) == (24, 20, 32)


def test_log_probabilities_are_the_same_to_the_bit_after_an_interrupt(batch, interrupted, tmp_path, output):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": prompt, "max_tokens": 1 + i % 9, "n": 1 + i % 2} for i, prompt in enumerate(PROMPTS)]
    path.write_bytes(objects_of([*rows[:11], rows[11] | {"logprobs": 5}, *rows[12:]]))
    options = [path, "--logprobs", 2]
    unbroken = batch(*options).out
    for done in (3, 20):
        interrupted(done, *options, "-o", output)
    assert batch(*options, "-o", output).code == 0
    assert output.read_text() == unbroken


def test_a_finished_journal_needs_no_model(batch, prompts, output, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write_output", lambda *_: _interrupt())
        assert batch(prompts, "-o", output).code == 130
        patch.setattr("grok1.cli.loading.load_model", lambda *_: pytest.fail("it loads the model"))
    assert batch(prompts, "-o", output).code == 0
    assert output.read_text() == whole


def test_a_torn_line_is_dropped(batch, interrupted, prompts, output, journal, whole):
    interrupted(9, prompts, "-o", output)
    with journal.open("r+b") as file:
        file.truncate(journal.stat().st_size - 20)
    assert len(rows_in(journal)) == 8
    assert batch(prompts, "-o", output).code == 0
    assert output.read_text() == whole


def test_what_is_another_job_is_refused_and_says_why(
    batch, interrupted, prompts, output, journal, make_checkpoint, checkpoint, tmp_path
):
    from grok1.checkpoint.reader import Checkpoint

    interrupted(5, prompts, "-o", output)
    before = journal.read_bytes()
    other = tmp_path / "other"
    shutil.copytree(make_checkpoint(Checkpoint.open(checkpoint).config, 1), other)
    shutil.copy(checkpoint / "tokenizer.model", other)
    changed = tmp_path / "changed.txt"
    changed.write_bytes(text_of([*PROMPTS[:-1], "another"]))
    for arguments, options, words in [
        ([prompts, "-n", 9], {}, ["(--max-tokens was 8, now it is 9)"]),
        ([prompts, "--seed", 4], {}, ["(--seed was 3, now it is 4)"]),
        ([prompts, "--greedy"], {}, ["(--temperature was 0.7, now it is 0.0)"]),
        ([prompts, "--stop", "x"], {}, ["(--stop was not given, now it is x)"]),
        ([prompts, "--batch-size", 5], {}, ["(--batch-size was 4, now it is 5)"]),
        ([prompts, "--mesh", "1,2"], {}, ["(--mesh was 1,1, now it is 1,2)"]),
        ([prompts, "--dtype", "bfloat16"], {}, ["(--dtype was float32, now it is bfloat16)"]),
        ([prompts, "--echo", "--no-prompt"], {}, ["--echo was not given, now it is given; --no-prompt was not given"]),
        ([changed], {}, ["(the content of the input has changed)"]),
        ([prompts], {"folder": other}, ["(the checkpoint has changed)"]),
    ]:
        result = batch(*arguments, "-o", output, **options)
        assert_fails(result, f"{journal} belongs to another job", *words, "--restart")
        assert journal.read_bytes() == before
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert batch(shutil.copy(prompts, tmp_path / "copy.txt"), "-o", output, folder=moved).code == 0


def test_a_restart_begins_anew(batch, interrupted, prompts, output, journal, whole):
    interrupted(5, prompts, "-o", output, "-n", 9)
    assert batch(prompts, "-o", output, "--restart").code == 0
    assert output.read_text() == whole
    output.write_text("old")
    interrupted(5, prompts, "-o", output, "--restart")
    assert output.read_text() == "old"
    assert batch(prompts, "-o", output).code == 0
    assert output.read_text() == whole


def test_another_file_where_the_journal_would_be(batch, prompts, output, journal):
    journal.write_text("my diary\n")
    assert_fails(batch(prompts, "-o", output), f"{journal} is there already, and no journal of grok1: move it")
    assert_fails(batch(prompts, "-o", output, "--restart"), "no journal of grok1")
    assert journal.read_text() == "my diary\n"


# Signals, kills and disks

LONG = ["--mesh", "1,1", "--seed", 3, "--ignore-eos", "--batch-size", 4]
LONG_ROWS = objects_of({"prompt": f"row {i}", "max_tokens": 1 + 7 * i % 50} for i in range(150))


@pytest.fixture
def long_rows(tmp_path):
    """150 rows of all lengths, which take a second or two."""
    path = tmp_path / "long.jsonl"
    path.write_bytes(LONG_ROWS)
    return path


@pytest.fixture(scope="session")
def long_whole(checkpoint):
    """What an uninterrupted run over them writes."""
    return output_of(LONG_ROWS, "batch", "-c", checkpoint, *LONG, "-")


@pytest.fixture
def start_long(start, checkpoint, long_rows, output):
    """Starts a process that completes `long_rows`."""

    def start_long(**options):
        return start("batch", "-c", checkpoint, *LONG, long_rows, "-o", output, **options)

    return start_long


@pytest.fixture
def finish_long(grok1, checkpoint, long_rows, output, long_whole):
    """Ends the job in this process, and checks that the file is what an uninterrupted run writes."""

    def finish_long():
        done = grok1("batch", "-c", checkpoint, *LONG, long_rows, "-o", output)
        assert (done.code, done.out, done.err) == (0, "", "")
        assert output.read_text() == long_whole

    return finish_long


def test_a_killed_job_goes_on(start_long, finish_long, journal):
    for count in (2, 70):
        process = start_long()
        await_rows(process, journal, count)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        assert len(rows_in(journal)) < 150
    finish_long()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_rows_finish(number, start_long, finish_long, journal, output):
    process = start_long()
    await_rows(process, journal, 5)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (130, b"", b"")
    rows = rows_in(journal)
    assert 5 <= len(rows) < 150
    assert rows != sorted(rows)  # they end in another order than they begin,
    assert sorted(rows) == list(range(len(rows)))  # and none that had begun was dropped
    assert not output.exists()
    finish_long()


def test_a_second_interrupt_stops_at_once(start, grok1, long_checkpoint, terminal, tmp_path, output, journal):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(objects_of({"prompt": "word", "max_tokens": 1 if i == 0 else 1900} for i in range(4)))
    process = start(
        *("batch", "-c", long_checkpoint, *LONG, path, "-o", output), env={"TERM": "xterm"}, stderr=terminal.there
    )
    await_rows(process, journal, 1)
    process.send_signal(signal.SIGINT)
    terminal.read_until("1 of 4 rows · finishing what has begun; Ctrl-C stops at once")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert rows_in(journal) == [0]
    assert not output.exists()


def test_an_interrupt_tells_a_person_how_far_it_came(start_long, journal, terminal):
    process = start_long(env={"TERM": "xterm"}, stderr=terminal.there)
    await_rows(process, journal, 5)
    process.send_signal(signal.SIGINT)
    terminal.read_until(" of 150 rows are done; the same command goes on from there")
    assert process.wait(60) == 130


def test_an_interrupt_of_rows_that_go_to_standard_output(start, checkpoint, long_rows, long_whole):
    process = start("batch", "-c", checkpoint, *LONG, long_rows)
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, b"")
    out = first + rest
    assert out.endswith(b"}\n")
    assert 1 <= out.count(b"\n") < 150
    assert long_whole.startswith(out.decode())


def test_a_second_run_on_one_output_is_refused(start_long, grok1, checkpoint, long_rows, output, journal):
    process = start_long()
    await_rows(process, journal, 2)
    for more in ([], ["--restart"]):
        result = grok1("batch", "-c", checkpoint, *LONG, long_rows, "-o", output, *more)
        assert_fails(result, f"{output} is being written by another run of grok1: wait for that one, or name another")
    assert process.poll() is None
    process.kill()


def test_a_folder_that_is_removed_during_the_run(start, checkpoint, long_rows, long_whole, tmp_path, grok1):
    folder = tmp_path / "results"
    folder.mkdir()
    output = folder / "out.jsonl"
    process = start("batch", "-c", checkpoint, *LONG, long_rows, "-o", output)
    await_rows(process, Path(f"{output}.journal"), 5)
    shutil.rmtree(folder)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, b"")
    assert error.decode().startswith(f"grok1: error: {output}.journal was removed while rows were added to it: it has")
    assert error.count(b"\n") == 1
    assert grok1("batch", "-c", checkpoint, *LONG, long_rows, "-o", output).code == 0
    assert output.read_text() == long_whole


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of a size that can be changed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount")
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return folder

    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_and_more_room(small_disk, batch, prompts, whole):
    output = small_disk("4k") / "out.jsonl"
    journal = Path(f"{output}.journal")
    result = batch(prompts, "-o", output)
    kept = len(rows_in(journal))
    assert 0 < kept < 24
    assert_fails(result, f"cannot write {journal} (No space left on device): make room; {kept} rows are kept")
    small_disk("12k", "remount")
    result = batch(prompts, "-o", output)
    assert_fails(
        result, f"cannot write {output} (No space left on device): make room; all 24 rows are kept in {journal}"
    )
    assert [path.name for path in output.parent.iterdir()] == [journal.name]
    small_disk("1m", "remount")
    assert batch(prompts, "-o", output).code == 0
    assert output.read_text() == whole
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_full_standard_output(start, checkpoint, prompts):
    with open("/dev/full", "wb") as full:
        process = start("batch", "-c", checkpoint, *OPTIONS, prompts, stdout=full)
        error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1
    assert error.startswith("grok1: error: cannot write to standard output (No space left on device)")
    assert error.count("\n") == 1


# Memory

PEAK = """
import re, sys
from grok1.cli import Terminal, execute

assert execute(sys.argv[1:], Terminal()) == 1
[peak] = re.findall(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print(peak, file=sys.stderr)
"""

has_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="the system does not tell memory in /proc"
)


def check_lines(start, checkpoint, path, count):
    """Checks a file of many rows, the last of which is bad; the bytes of memory that it took at most."""
    with path.open("w") as file:
        file.writelines(f'{{"prompt": "Some words of row {i}", "id": {i}, "max_tokens": 9}}\n' for i in range(count))
        file.write("bad\n")
    process = start("batch", "-c", checkpoint, *OPTIONS, path, code=PEAK)
    out, error = process.communicate(timeout=300)
    bad, refused, peak = error.decode().splitlines()
    assert bad.startswith(f"{path}, line {count + 1}: it is no JSON")
    assert f"1 of {count + 1} rows of" in refused
    assert out == b""
    return int(peak) * 1024


@has_proc
@pytest.mark.parametrize("count", [200_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_many_rows_are_checked_in_little_memory(count, start, checkpoint, tmp_path):
    path = tmp_path / "rows.jsonl"
    few = check_lines(start, checkpoint, path, 1000)
    many = check_lines(start, checkpoint, path, count)
    assert path.stat().st_size > 60 * count
    assert many - few < 16 * count + (8 << 20)  # 8 bytes a row, and what a growing array needs beside itself


@pytest.mark.slow
@has_proc
def test_memory_stays_the_same_over_many_rows(start, checkpoint, tmp_path, output, journal):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(objects_of({"prompt": f"row {i}", "max_tokens": 1 + i % 4} for i in range(5000)))
    process = start("batch", "-c", checkpoint, *LONG, path, "-o", output)
    used = []
    for count in (1000, 4800):
        await_rows(process, journal, count)
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        used.append(pages * os.sysconf("SC_PAGE_SIZE"))
    assert process.wait(120) == 0
    assert used[1] - used[0] < 4 << 20


@pytest.mark.slow
def test_twenty_kills_at_random_moments(start, grok1, tmp_path, output, journal):
    folder = tmp_path / "tiny"
    assert grok1("init", folder, "--preset", "tiny").code == 0
    path = tmp_path / "rows.jsonl"
    rng = random.Random(5)
    rows = [
        {
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 30))),
            "max_tokens": rng.randint(1, 64),
            "n": rng.choice([1, 1, 2]),
        }
        for _ in range(200)
    ]
    path.write_bytes(objects_of(rows))
    command = ["batch", "-c", folder, "--mesh", "1,1", "--seed", 8, "--logprobs", 2, path]
    whole = grok1(*command)
    assert whole.code == 0
    moments = sorted(rng.sample(range(1, len(whole.out) * 9 // 10), 20))  # bytes of the journal
    for moment in moments:
        process = start(*command, "-o", output)
        while not journal.exists() or journal.stat().st_size < moment:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.001)
                raise AssertionError(f"it ended early: {process.communicate()}")
        process.kill()
        process.wait(60)
        assert not output.exists()
    assert grok1(*command, "-o", output).code == 0
    assert output.read_text() == whole.out
    assert not journal.exists()
