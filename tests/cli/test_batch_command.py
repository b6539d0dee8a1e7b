"""`grok1 batch`: input formats, interruptions and resuming, errors."""

import gzip
import importlib
import json
import random
import shutil
import signal
import subprocess

import jax
import pytest

from grok1.jobs import run
from grok1.ops.kernels import kernels_in_use

PROMPTS = ["The answer is", "Once", "And then he said that nobody", "a b c", "The answer is not", "word"]
ARGUMENTS = ("--mesh", "1,1", "--batch-size", 3, "--seed", 5)

REPORT_PEAK = """
import sys
from grok1.cli import main
from grok1.host.memory import peak_resident_bytes
main()
print(peak_resident_bytes(), file=sys.stderr)
"""


@pytest.fixture
def batch(grok1, checkpoint):
    def run(*arguments, stdin=b"", folder=checkpoint):
        return grok1("batch", "-c", folder, *ARGUMENTS, *arguments, stdin=stdin)

    return run


@pytest.fixture(scope="module")
def undisturbed():
    """The output of each job that ran without a disturbance."""
    return {}


@pytest.fixture
def expected(batch, undisturbed):
    """The output of a job that nothing disturbs."""

    def run(file, *arguments):
        job = (file.read_bytes(), arguments)
        if job not in undisturbed:
            undisturbed[job] = batch(file, *arguments).out
        return undisturbed[job]

    return run


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("".join(prompt + "\n" for prompt in PROMPTS))
    return file


def write_rows(file, count):
    """Rows whose completions have different lengths."""
    rng = random.Random(1)
    rows = [
        {"id": i, "prompt": f"{PROMPTS[i % 6]} {i}", "max_tokens": rng.randint(1, 30), "n": 1 + (i % 9 == 0)}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def many(tmp_path):
    """Input of a job that takes about a second."""
    return write_rows(tmp_path / "many.jsonl", 80)


def journal_rows(output):
    """Return the number of rows in a journal."""
    journal = output.with_name(output.name + ".journal")
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def wait_for_rows(process, output, count):
    """Wait until a journal contains a number of rows; return whether it does."""
    while process.poll() is None:
        if journal_rows(output) >= count:
            return True
    return False


def test_batch_writes_one_line_per_prompt(batch, complete, prompts):
    rows = batch(prompts, "-n", 6, "--logprobs", 2).lines
    assert [row["index"] for row in rows] == list(range(6))
    assert [row["prompt"] for row in rows] == PROMPTS
    for row in rows:
        assert sorted(row) == ["completion_tokens", "completions", "id", "index", "prompt", "prompt_tokens"]
        [found] = row["completions"]
        (alone,) = complete(row["prompt"], "-n", 6, "--logprobs", 2, "--seed", found["seed"], "--json").lines
        assert found["token_ids"] == alone["token_ids"]
        assert found["text"] == alone["text"]
        assert found["finish_reason"] == alone["finish_reason"]
        assert [entry["token_id"] for entry in found["logprobs"]] == found["token_ids"]
        assert row["prompt_tokens"] == len(alone["prompt_token_ids"])


def test_input_formats_give_identical_results(batch, prompts, expected, tmp_path):
    lines = expected(prompts, "-n", 4)
    packed = tmp_path / "packed.txt.gz"
    packed.write_bytes(gzip.compress(prompts.read_bytes()))
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    listed = tmp_path / "listed.jsonl"
    listed.write_text(rows)
    assert batch(packed, "-n", 4).out == lines
    assert batch(listed, "-n", 4).out == lines
    assert batch("-", "-n", 4, stdin=rows.encode()).out == lines
    assert batch("-", "-n", 4, "--format", "txt", stdin=prompts.read_bytes()).out == lines
    escaped = "".join(prompt.replace(" ", " \\n") + "\n" for prompt in PROMPTS)
    [row, *_] = batch("-", "-n", 4, "--format", "txt", "--unescape", stdin=escaped.encode()).lines
    assert row["prompt"] == "The \nanswer \nis"


def test_output_file_appears_when_the_job_is_complete(batch, prompts, expected, tmp_path):
    output = tmp_path / "out.jsonl"
    result = batch(prompts, "-n", 4, "-o", output, "--json")
    assert result.code == 0
    (record,) = result.lines
    assert output.read_text() == expected(prompts, "-n", 4)
    assert [file.name for file in tmp_path.iterdir() if "out" in file.name] == ["out.jsonl"]
    assert (record["rows"], record["failed"], record["seed"], record["batch_size"]) == (6, 0, 5, 3)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert record["tokens_in"] == sum(row["prompt_tokens"] for row in rows)
    assert record["tokens_out"] == sum(row["completion_tokens"] for row in rows)
    assert 0 < record["mean_slot_use"] <= 1
    assert record["seconds"] > 0
    again = batch(prompts, "-n", 4, "-o", output)
    assert (again.code, "already exists" in again.err) == (1, True)
    assert batch(prompts, "-n", 3, "-o", output, "--restart").code == 0
    assert output.read_text() == expected(prompts, "-n", 3)


def test_no_prompt_and_echo(batch, prompts):
    plain = batch(prompts, "-n", 3, "--ignore-eos").lines
    without = batch(prompts, "-n", 3, "--ignore-eos", "--no-prompt").lines
    echoed = batch(prompts, "-n", 3, "--ignore-eos", "--echo", "--num-samples", 2).lines
    for row, bare, echo in zip(plain, without, echoed, strict=True):
        assert bare == {key: value for key, value in row.items() if key != "prompt"}
        assert echo["completions"][0]["text"] == row["prompt"] + row["completions"][0]["text"]
        seeds = [sample["seed"] for sample in echo["completions"]]
        assert seeds == [row["completions"][0]["seed"], row["completions"][0]["seed"] + 1]
    ids = batch("-", "-n", 3, "--echo", stdin=b'{"prompt_token_ids": [5, 300]}').lines[0]
    assert ids["prompt_token_ids"] == [5, 300]


def test_invalid_rows_fail_before_the_model_is_loaded(batch, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("loaded")

    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "id": "x"}\n{"prompt": ""}\n\n{"propmt": "b", "id": "y"}\n{"prompt": "c"}\n')
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("grok1.cli.jobs.load_model", never)
        for arguments in ((), ("-o", output)):
            result = batch(file, *arguments)
            assert (result.code, result.out) == (1, "")
            lines = result.err.splitlines()
            assert lines[0].startswith(f"{file}, line 2: the prompt is empty")
            assert lines[1].startswith(f'{file}, line 4: unknown field "propmt"')
            assert lines[2] == (
                f"grok1: error: 2 of 4 rows of {file} are invalid and nothing was processed; fix them or pass "
                "--skip-bad"
            )
            assert len(lines) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    skipped = batch(file, "-n", 2, "-o", output, "--skip-bad")
    assert skipped.code == 1
    assert f'2 of 4 rows failed: see "error" in their lines of {output}' in skipped.err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [("error" in row, row["index"], row["id"]) for row in rows] == [
        (False, 0, "x"),
        (True, 1, None),
        (True, 2, "y"),
        (False, 3, None),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.txt"], 1, "missing.txt does not exist"),
        (["-"], 1, "standard input is empty"),
        (["-", "--restart"], 2, "--restart requires -o"),
        (["-", "--json"], 2, "--json requires -o"),
        (["-", "--batch-size", 0], 2, "--batch-size"),
        (["-", "-o", "nowhere/out"], 1, "in an existing, writable directory"),
        (["-", "-o", "."], 1, "is a directory"),
        (["-", "--temperature", -1], 2, "expected a finite number, 0 or more, got -1.0"),
    ],
)
def test_invalid_options_and_files(batch, arguments, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = batch(*arguments)
    assert (result.code, result.out) == (code, "")
    assert words in result.err
    assert list(tmp_path.iterdir()) == []


def test_input_cannot_be_the_output(batch, prompts):
    before = prompts.read_bytes()
    result = batch(prompts, "-o", prompts, "--restart")
    assert (result.code, "is both input and output" in result.err) == (1, True)
    assert prompts.read_bytes() == before


def killed(start, checkpoint, file, output, rows, *arguments, sent=signal.SIGKILL):
    """Start a job and send it a signal when its journal contains a number of rows; return the process."""
    process = start("batch", file, "-c", checkpoint, *ARGUMENTS, "-o", output, *arguments)
    assert wait_for_rows(process, output, rows), process.communicate()[1]
    process.send_signal(sent)
    return process


def test_killed_job_resumes_with_identical_output(batch, start, checkpoint, many, expected, tmp_path):
    output = tmp_path / "out.jsonl"
    for rows in (1, 30):
        process = killed(start, checkpoint, many, output, rows)
        process.wait()
        assert not output.exists()
        assert journal_rows(output) >= rows
    kept = journal_rows(output)
    (record,) = batch(many, "-o", output, "--json").lines
    lines = expected(many)
    assert output.read_text() == lines
    assert record["rows"] == 80
    assert record["tokens_out"] < sum(json.loads(line)["completion_tokens"] for line in lines.splitlines()[kept:]) * 3


def test_completed_journal_needs_no_model(batch, many, expected, tmp_path, monkeypatch):
    """The job was killed after the last row, before the output was written."""
    lines = expected(many)
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr("grok1.jobs.journal.Journal.write_output", lambda *_: (_ for _ in ()).throw(OSError(5, "x")))
    assert batch(many, "-o", output).code == 1
    monkeypatch.undo()
    monkeypatch.setattr("grok1.cli.jobs.load_model", lambda *_: (_ for _ in ()).throw(AssertionError("loaded")))
    assert batch(many, "-o", output).code == 0
    assert output.read_text() == lines


@pytest.mark.slow
def test_twenty_kills_lose_and_repeat_no_rows(grok1, start, tmp_path):
    many = write_rows(tmp_path / "many.jsonl", 200)
    folder = tmp_path / "tiny"
    assert grok1("init", folder, "--preset", "tiny").code == 0
    reference = tmp_path / "reference.jsonl"
    assert grok1("batch", many, "-c", folder, *ARGUMENTS, "-o", reference).code == 0
    output = tmp_path / "out.jsonl"
    rng = random.Random(0)
    kills = 0
    for target in sorted(rng.randint(0, 195) for _ in range(20)):
        process = start("batch", many, "-c", folder, *ARGUMENTS, "-o", output)
        for _ in range(rng.randint(1, 2000)):  # so that kills are not always just after a row is written
            if journal_rows(output) > target or process.poll() is not None:
                break
        wait_for_rows(process, output, target)
        process.kill()
        process.wait()
        kills += 1
    assert kills == 20
    assert grok1("batch", many, "-c", folder, *ARGUMENTS, "-o", output).code == 0
    assert output.read_bytes() == reference.read_bytes()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_rows_in_progress(batch, start, checkpoint, many, expected, tmp_path, sent):
    output = tmp_path / "out.jsonl"
    process = killed(start, checkpoint, many, output, 5, sent=sent)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, b"")
    kept = journal_rows(output)
    assert 5 <= kept < 80
    journal = output.with_name("out.jsonl.journal").read_bytes().splitlines()[1:]
    indices = sorted(int(line.split()[1]) for line in journal)
    assert indices == list(range(kept))  # all rows in progress
    assert batch(many, "-o", output).code == 0
    assert output.read_text() == expected(many)


def test_signal_with_stdout_leaves_complete_rows_in_order(batch, start, checkpoint, many, expected):
    process = start("batch", many, "-c", checkpoint, *ARGUMENTS)
    first = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, b"")
    lines = expected(many)
    assert lines.startswith((first + out).decode())
    assert (first + out).endswith(b"\n")
    assert len(first + out) < len(lines)


def test_second_signal_stops_immediately(batch, start, long_checkpoint, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("one\ntwo\nthree\nfour\n")
    output = tmp_path / "out.jsonl"
    process = start(
        *("batch", file, "-c", long_checkpoint, *ARGUMENTS, "-o", output, "-n", 2000, "--ignore-eos"),
        env={"PYTHONFAULTHANDLER": "1"},
    )
    while process.poll() is None and not output.with_name("out.jsonl.journal").exists():
        pass
    while process.poll() is None and not output.with_name("out.jsonl.journal").stat().st_size:
        pass
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # two pending signals of the same kind would be merged
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, b"")
    assert journal_rows(output) == 0
    assert not output.exists()


def test_concurrent_runs_with_the_same_output(batch, start, checkpoint, many, expected, tmp_path):
    output = tmp_path / "out.jsonl"
    process = start("batch", many, "-c", checkpoint, *ARGUMENTS, "-o", output)
    assert wait_for_rows(process, output, 1)
    process.send_signal(signal.SIGSTOP)
    for arguments in ((), ("--restart",)):
        result = batch(many, "-o", output, *arguments)
        assert (result.code, result.out) == (1, "")
        assert f"{output} is being written by another grok1 process" in result.err
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 0
    assert output.read_text() == expected(many)


@pytest.fixture
def stopped(batch, prompts, tmp_path, monkeypatch):
    """The output of an interrupted job, whose journal contains all rows of `prompts` except the last."""
    output = tmp_path / "out.jsonl"
    real = run.process_rows

    def some(*arguments):
        for number, _ in enumerate(real(*arguments)):
            yield
            if number == 4:
                raise OSError(5, "the power failed")

    with monkeypatch.context() as patch:
        patch.setattr(run, "process_rows", some)
        assert batch(prompts, "-n", 4, "-o", output).code == 1
    assert journal_rows(output) == 5
    return output


def test_journal_of_other_options_is_rejected(batch, prompts, stopped, expected):
    before = stopped.with_name("out.jsonl.journal").read_bytes()
    native = kernels_in_use(jax.devices()[0]).name
    other_kernels = [(["-n", 4, "--kernels", "xla"], f"--kernels was {native} and is now xla")] * (native != "xla")
    for arguments, words in [
        (["-n", 5], "--max-tokens was 4 and is now 5"),
        (["-n", 4, "--greedy"], "--temperature was 0.7 and is now 0.0"),
        (["-n", 4, "--seed", 6], "--seed was 5 and is now 6"),
        (["-n", 4, "--stop", "x", "--stop", "y"], "--stop was not given and is now x,y"),
        (["-n", 4, "--no-prompt"], "--no-prompt was not given and is now given"),
        (["-n", 4, "--batch-size", 4], "--batch-size was 3 and is now 4"),
        (["-n", 4, "--dtype", "bfloat16"], "--dtype was float32 and is now bfloat16"),
        (["-n", 4, "--mesh", "1,2"], "--mesh was 1,1 and is now 1,2"),
        (["-n", 4, "--logprobs", 0], "--logprobs was not given and is now 0"),
        *other_kernels,
    ]:
        result = batch(prompts, "-o", stopped, *arguments)
        assert (result.code, result.out) == (1, "")
        assert f"belongs to another job: {words}" in result.err
        assert "--restart" in result.err
        assert stopped.with_name("out.jsonl.journal").read_bytes() == before
    assert batch(prompts, "-o", stopped, "-n", 4).code == 0
    assert stopped.read_text() == expected(prompts, "-n", 4)


def test_journal_of_another_input_or_checkpoint_is_rejected(batch, prompts, stopped, checkpoint, expected, tmp_path):
    content = prompts.read_text()
    prompts.write_text(content.replace("word", "wort"))
    result = batch(prompts, "-o", stopped, "-n", 4)
    assert (result.code, ": the content of the input has changed;" in result.err) == (1, True)
    prompts.write_text(content)
    other = shutil.copytree(checkpoint, tmp_path / "other")
    tensor = sorted((other / "ckpt-0").glob("tensor*"))[5]
    data = bytearray(tensor.read_bytes())
    data[len(data) // 2] ^= 1
    tensor.write_bytes(data)
    result = batch(prompts, "-o", stopped, "-n", 4, folder=other)
    assert (result.code, ": the checkpoint has changed;" in result.err) == (1, True)
    shutil.rmtree(other)
    shutil.copytree(checkpoint, other)  # a copy of the checkpoint is equivalent
    assert batch(prompts, "-o", stopped, "-n", 4, folder=other).code == 0
    assert stopped.read_text() == expected(prompts, "-n", 4)


def test_restart_discards_the_journal(batch, prompts, stopped, expected):
    assert batch(prompts, "-o", stopped, "-n", 3, "--restart").code == 0
    assert stopped.read_text() == expected(prompts, "-n", 3)


def test_random_seed_is_kept_when_resuming(grok1, checkpoint, prompts, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    arguments = ("batch", prompts, "-c", checkpoint, "--mesh", "1,1", "-n", 4, "-o", output, "--json")
    real = run.process_rows

    def some(*arguments):
        yield next(real(*arguments))
        raise OSError(5, "the power failed")

    with monkeypatch.context() as patch:
        patch.setattr(run, "process_rows", some)
        assert grok1(*arguments).code == 1
    header = json.loads(output.with_name("out.jsonl.journal").read_bytes().splitlines()[0][9:])
    (record,) = grok1(*arguments).lines
    assert record["seed"] == header["seed"]
    again = grok1("batch", prompts, "-c", checkpoint, "--mesh", "1,1", "-n", 4, "--seed", record["seed"])
    assert again.out == output.read_text()


def test_input_that_changes_during_the_job(batch, prompts, expected, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    content = prompts.read_text()
    real = run.process_rows

    def process(*arguments):
        prompts.write_text(content.replace("word", "wort"))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "process_rows", process)
        result = batch(prompts, "-n", 2, "-o", output)
    assert (result.code, "line 6 of the input changed" in result.err) == (1, True)
    assert not output.exists()
    prompts.write_text(content)
    assert batch(prompts, "-n", 2, "-o", output).code == 0
    assert output.read_text() == expected(prompts, "-n", 2)


def test_job_resumes_after_a_full_disk(batch, many, expected, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=16k", "grok1-test", str(place)], capture_output=True, check=False
    )
    if not made or made.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        output = place / "out.jsonl"
        result = batch(many, "-o", output)
        assert (result.code, result.out) == (1, "")
        assert "No space left on device" in result.err
        kept = journal_rows(output)
        assert 0 < kept < 80
        assert f"{kept} rows that were saved" in result.err
        assert batch(many, "-o", output).code == 1  # still full
        assert journal_rows(output) >= kept
        subprocess.run([mount, "-o", "remount,size=16m", str(place)], check=True)
        assert batch(many, "-o", output).code == 0
        assert output.read_text() == expected(many)
        assert [path.name for path in place.iterdir()] == ["out.jsonl"]
    finally:
        subprocess.run([shutil.which("umount"), str(place)], check=True)


def test_removed_output_folder_loses_no_rows(batch, start, checkpoint, many, expected, tmp_path):
    output = tmp_path / "folder" / "out.jsonl"
    output.parent.mkdir()
    process = killed(start, checkpoint, many, output, 3, sent=signal.SIGSTOP)
    shutil.rmtree(output.parent)
    process.send_signal(signal.SIGCONT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"out.jsonl.journal was deleted during the run" in error
    assert journal_rows(output) >= 3
    assert batch(many, "-o", output).code == 0
    assert output.read_text() == expected(many)


@pytest.mark.slow
def test_large_input_is_not_read_into_memory(start, checkpoint, tmp_path):
    """The last of 300,000 rows (40 MB) is invalid, so that the job ends after validation."""
    file = tmp_path / "rows.jsonl"
    with file.open("w") as rows:
        for index in range(300_000):
            rows.write(json.dumps({"prompt_token_ids": list(range(20)), "id": index, "seed": index}) + "\n")
        rows.write("{}\n")

    small = tmp_path / "few" / "rows.jsonl"
    small.parent.mkdir()
    small.write_text("{}\n")
    sizes = []
    for path in (small, file):
        process = start("batch", path, "-c", checkpoint, "--mesh", "1,1", code=REPORT_PEAK)
        *_, record, size = process.communicate()[1].splitlines()
        assert b"rows.jsonl are invalid" in record
        sizes.append(int(size))
    assert file.stat().st_size > 30e6
    assert sizes[1] - sizes[0] < 12e6  # 8 bytes per row, and memory that Python does not release


@pytest.mark.slow
def test_memory_is_independent_of_the_number_of_rows(start, checkpoint, tmp_path):
    sizes = []
    for count in (500, 5000):
        file = tmp_path / f"{count}.txt"
        file.write_text("".join(f"row {index}\n" for index in range(count)))
        process = start(
            *("batch", file, "-c", checkpoint, "--mesh", "1,1", "-n", 2, "-o", tmp_path / f"{count}.jsonl"),
            code=REPORT_PEAK,
        )
        sizes.append(int(process.communicate()[1]))
    assert sizes[1] - sizes[0] < 20e6


def test_batch_size_that_does_not_fit_in_memory_is_rejected(batch, prompts, monkeypatch):
    monkeypatch.setattr(importlib.import_module("grok1.model.load"), "room", lambda *_: 2)
    result = batch(prompts, "-n", 2)
    assert (result.code, result.out) == (1, "")
    assert "--batch-size is 3, but only 2 sequences fit in memory; use --batch-size 2" in result.err


def test_progress_on_a_terminal(start, checkpoint, many, terminal, tmp_path):
    output = tmp_path / "out.jsonl"
    process = start(
        *("batch", many, "-c", checkpoint, *ARGUMENTS, "-o", output), stderr=terminal.there, env={"TERM": "xterm"}
    )
    terminal.read_until("of 80 rows")
    terminal.read_until("slots")
    terminal.read_until("left")
    seen = terminal.read_until("seed 5]")
    assert "[80 rows" in seen
    assert "slots used" in seen
    assert process.wait(timeout=60) == 0
    assert process.stdout.read() == b""


def test_closed_pipe_ends_batch_successfully(start, checkpoint, many):
    process = start("batch", many, "-c", checkpoint, *ARGUMENTS)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""


def test_results_on_other_contexts_and_meshes(grok1, tmp_path, checkpoint, prompts):
    rows = {
        mesh: [
            [sample["token_ids"] for sample in row["completions"]]
            for row in grok1(
                *("batch", prompts, "-c", checkpoint, "--mesh", mesh, "-n", 5, "--greedy", "--batch-size", 2)
            ).lines
        ]
        for mesh in ("1,1", "2,2")
    }
    assert rows["1,1"] == rows["2,2"]
