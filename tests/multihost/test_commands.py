"""Commands as several processes on this machine, compared with the same command as one process."""

import json
import os
import signal
import socket
import time

import pytest

from grok1.checkpoint.writer import write_checkpoint
from grok1.config import PRESETS
from grok1.text.train_tokenizer import train_small_tokenizer

PROMPTS = [f"Prompt number {i} is" for i in range(8)]
TIMEOUT = 120
POLL_SECONDS = 0.05  # polling without a pause would occupy a core


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of the preset `tiny` with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_checkpoint(folder, PRESETS["tiny"], seed=1)
    (folder / "tokenizer.model").write_bytes(train_small_tokenizer(PRESETS["tiny"].vocab_size))
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return path


@pytest.fixture
def launch(spawn):
    """Function that starts a command with `grok1 launch`."""

    def launch(count, *arguments, devices=None, **options):
        return spawn("-m", "grok1", "launch", "-n", count, "--", *arguments, devices=devices or count, **options)

    return launch


@pytest.fixture
def alone(grok1):
    """Function that returns the output of a command in one process, by default on one device."""

    def alone(name, *arguments):
        result = grok1(name, "--mesh", "1,1", *arguments)
        assert (result.code, result.err) == (0, "")
        return result.out

    return alone


def output(process, code=0):
    """Return the standard output of a process, and check that stderr is empty."""
    out, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, errors) == (code, "")
    return out


def error(process, code=1):
    """Return the one-line error message of a process."""
    errors = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == code, errors
    assert errors.startswith("grok1: error: ")
    assert errors.count("\n") == 1, errors
    return errors


def wait_until(happened, *processes):
    """Wait until `happened()` is true while processes run."""
    end = time.monotonic() + TIMEOUT
    while not happened():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(POLL_SECONDS)


def wait_until_ended(process):
    """Send SIGTERM until the process has ended, because two signals in quick succession may be merged."""
    end = time.monotonic() + TIMEOUT
    while process.poll() is None:
        assert time.monotonic() < end
        process.terminate()
        time.sleep(POLL_SECONDS)


def all_have_ended(port):
    """Wait until no process, including the coordinator, has this port on its command line; return False on timeout."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        left = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
            except OSError:
                continue
            if any(word in words for word in (str(port).encode(), f":{port}".encode())):
                left.append(pid)
        if not left:
            return True
        time.sleep(POLL_SECONDS)
    return False


def test_completions_match_one_process(tiny, alone, launch):
    words = ("run", "-c", tiny, "The answer", "--greedy", "-n", 12)
    assert output(launch(4, *words, "--mesh", "2,2")) == alone(*words)


def test_only_process_0_reads_and_prints(tiny, alone, together, port):
    words = ("run", "-c", tiny, "--greedy", "-n", 12, "--num-samples", 3, "--seed", 5, "-t", 0)
    first, second = together(2, *words, stdin=-1)
    for process in (second, first):
        process.stdin.write("The answer" if process is first else "another question")
        process.stdin.close()
        process.stdin = None
    expected = alone(*words[:3], "The answer", *words[3:])
    assert (output(first), output(second)) == (expected, "")
    assert all_have_ended(port)


@pytest.mark.slow  # and unreliable on two cores while programs compile
def test_jobs_match_one_process_and_resume_after_a_worker_was_killed(tiny, prompts, tmp_path, alone, together, port):
    words = ("batch", "-c", tiny, prompts, "-n", 40, "--seed", 3, "--ignore-eos", "--batch-size", 2, "--mesh", "1,2")
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    first, second = together(2, *words, "-o", out)
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 2, first, second)  # some rows are done
    second.kill()
    assert error(first).startswith("grok1: error: process 1 (")
    assert not out.exists()
    assert all_have_ended(port)
    for process in together(2, *words, "-o", out):
        output(process)
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == PROMPTS
    assert out.read_text() == alone(*words)


def test_scores_match_one_process(tiny, prompts, alone, launch):
    words = ("score", "-c", tiny, prompts, "--format", "txt", "--per-token")
    found = [json.loads(line) for line in output(launch(2, *words, "--mesh", "2,1")).splitlines()]
    expected = [json.loads(line) for line in alone(*words).splitlines()]
    assert len(found) == len(expected) == len(PROMPTS) + 1
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for key, value in other.items():
            if isinstance(value, float | dict):
                assert row[key] == pytest.approx(value, rel=1e-3)
            elif not isinstance(value, list):
                assert row[key] == value


@pytest.mark.parametrize(("count", "mesh"), [(2, [1, 2]), pytest.param(4, [2, 2], marks=pytest.mark.slow)])
def test_speed_is_measured_over_all_processes(count, mesh, launch):
    words = ("bench", "--preset", "tiny", "--prompt", 16, "--decode", 2, "--batch", 4, "--mesh", f"{mesh[0]},{mesh[1]}")
    [line] = [json.loads(line) for line in output(launch(count, *words, "--json")).splitlines()]
    assert (line["batch"], line["devices"], line["mesh"]) == (4, count, mesh)
    assert line["decode_tokens_per_second"] > 0


def test_devices_of_all_processes_are_listed(launch):
    devices = [json.loads(line) for line in output(launch(2, "bench", "--devices", "--json")).splitlines()]
    assert [line["process"] for line in devices] == [0, 1]
    table = output(launch(2, "bench", "--devices"))
    assert f"1        {socket.gethostname()}" in table


def test_jobs_on_the_golden_checkpoint_match_one_process(golden, golden_sequences, tmp_path, alone, launch):
    rows = tmp_path / "rows.jsonl"
    ids = [sequence.tokens.tolist()[:20] for sequence in golden_sequences]
    rows.write_text("".join(json.dumps({"prompt_token_ids": row}) + "\n" for row in ids))
    words = ("batch", "-c", golden, rows, "--greedy", "-n", 8, "--seed", 1, "--batch-size", 4)
    assert output(launch(2, *words, "--mesh", "2,2", devices=4)) == alone(*words)


def test_processes_outside_the_mesh_load_nothing(tiny, launch):
    result = json.loads(output(launch(2, "run", "-c", tiny, "x", "-n", 2, "--mesh", "1,1", "--json")))
    assert [load["bytes_read"] > 0 for load in result["processes"]] == [True, False]


@pytest.mark.parametrize(("who", "count"), [(0, 2), (1, 3)])
def test_a_process_that_dies_while_decoding_ends_the_others(who, count, tiny, together, port):
    processes = together(count, "run", "-c", tiny, "The answer", "--greedy", "--ignore-eos", "-n", 500)
    assert processes[0].stdout.read(1)
    processes[who].kill()
    reporter = processes[0 if who else 1]
    assert error(reporter).startswith(f"grok1: error: process {who} (")
    for process in processes:
        if process not in (processes[who], reporter):
            assert output(process, 1) == ""
    assert all_have_ended(port)


@pytest.mark.slow  # and unreliable on two cores while programs compile
def test_terminating_a_worker_twice_ends_all_processes(tiny, together, port):
    first, second = together(2, "run", "-c", tiny, "The answer", "--greedy", "--ignore-eos", "-n", 500)
    assert first.stdout.read(20)  # decoding: all programs are compiled, for which a terminated worker does not wait
    second.terminate()
    assert first.stdout.read(1)  # the first signal lets process 0 continue
    wait_until_ended(second)
    assert error(first).startswith("grok1: error: process 1 (")
    assert output(second, 128 + signal.SIGTERM) == ""
    assert all_have_ended(port)


SLOW_COMPILER = """
import sys, time
from grok1 import cli
from grok1.engine.engine import Engine

compile_step = Engine.compile

def compile_slowly(engine, key):
    if key.kind == "prefill":
        time.sleep(35)
    return compile_step(engine, key)

Engine.compile = compile_slowly
sys.exit(cli.main())
"""


@pytest.mark.slow  # sleeps for 35 seconds; Gloo waits for only 30 seconds
def test_a_process_may_compile_longer_than_another(tiny, alone, spawn, port):
    cluster = ("--coordinator", f":{port}", "--num-processes", 2, "--mesh", "1,2", "--process-id")
    words = ("-c", tiny, "The answer", "--greedy", "-n", 4)
    first = spawn("-m", "grok1", "run", *cluster, 0, *words)
    second = spawn("-c", SLOW_COMPILER, "run", *cluster, 1, *words)
    assert output(first) == alone("run", *words)
    assert output(second) == ""


def test_a_process_that_dies_before_the_start_is_reported_after_the_timeout(tiny, together, port):
    first, second, third = together(3, "run", "-c", tiny, "x", "--start-timeout", 4)
    third.kill()
    assert error(first).startswith("grok1: error: process 2 of 3 did not connect within 4 seconds")
    assert output(second, 1) == ""
    assert all_have_ended(port)


STUCK_READER = """
import sys, threading
from pathlib import Path
from grok1 import cli
from grok1.checkpoint.reader import Checkpoint

marker = sys.argv.pop()
Checkpoint.read_slices = lambda *_, **__: (Path(marker).touch(), threading.Event().wait())
sys.exit(cli.main())
"""


def test_a_process_that_dies_while_loading_ends_the_others(tiny, spawn, tmp_path, port):
    cluster = ("--coordinator", f":{port}", "--num-processes", 2, "--process-id")
    loading = tmp_path / "loading"
    first = spawn("-m", "grok1", "run", *cluster, 0, "-c", tiny, "x")
    second = spawn("-c", STUCK_READER, "run", *cluster, 1, "-c", tiny, "x", loading)
    wait_until(loading.exists, first, second)
    second.kill()
    assert error(first).startswith("grok1: error: process 1 (")
    assert all_have_ended(port)


def test_a_different_checkpoint_is_reported_with_its_host(tiny, together, tmp_path, port):
    other = tmp_path / "other"
    write_checkpoint(other, PRESETS["tiny"], seed=1)
    changed = sorted((other / "ckpt-0").iterdir())[3]
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    first, second = together(2, "run", "x", own=lambda process: ("-c", other if process else tiny))
    found = error(first)
    assert f"the checkpoint of process 1 ({socket.gethostname()}) differs from that of process 0" in found
    assert f"in {changed.name} " in found
    assert output(second, 1) == ""
    assert all_have_ended(port)


def test_process_0_reports_the_error_of_another(tiny, together, tmp_path, port):
    first, second = together(2, "run", "x", own=lambda process: ("-c", tmp_path / "nowhere" if process else tiny))
    found = error(first)
    assert "process 1 (" in found
    assert "nowhere does not exist" in found
    assert output(second, 1) == ""
    assert all_have_ended(port)


def test_different_options_are_rejected(tiny, together, port):
    first, second = together(2, "run", "-c", tiny, "x", own=lambda process: ("--top-k", 3) if process else ())
    assert "--top-k differs: '3' in process 1 (" in error(first)
    assert output(second, 1) == ""
    assert all_have_ended(port)


def test_a_port_in_use_is_reported(tiny, spawn, port):
    cluster = ("--coordinator", f":{port}", "--num-processes", 2, "--process-id", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        found = error(spawn("-m", "grok1", "run", *cluster, "-c", tiny, "x"))
    assert f"the coordinator cannot listen at 127.0.0.1, port {port}" in found


def test_a_missing_process_0_is_reported(tiny, spawn, port):
    cluster = ("--coordinator", f":{port}", "--num-processes", 2, "--process-id", 1, "--start-timeout", 1)
    found = error(spawn("-m", "grok1", "run", *cluster, "-c", tiny, "x"))
    assert f"cannot connect to process 0 at 127.0.0.1:{port}" in found


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--start-timeout", 3), "--start-timeout requires --distributed or --coordinator"),
        (("--coordinator-bind", "::"), "--coordinator-bind requires --distributed or --coordinator"),
    ],
)
def test_options_for_several_processes_need_a_cluster(tiny, spawn, words, sentence):
    process = spawn("-m", "grok1", "run", "-c", tiny, "x", *words)
    assert sentence in process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("-n", 2, "--", "init", "x"), 2, '"init" cannot be launched'),
        (("-n", 3, "--", "run", "x"), 1, "found 2 virtual devices, expected at least one for each of 3 processes"),
        (("-n", 2, "--", "run", "--nonsense"), 2, "No such option"),
    ],
)
def test_invalid_launches_are_rejected(spawn, words, code, sentence):
    process = spawn("-m", "grok1", "launch", *words, devices=2)
    assert sentence in process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == code


def test_an_interrupt_ends_all_processes(tiny, launch):
    process = launch(2, "run", "-c", tiny, "The answer", "--greedy", "--ignore-eos", "-n", 500)
    assert process.stdout.read(1)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130


def test_killing_launch_ends_its_processes(tiny, spawn, port):
    words = ("--", "run", "-c", tiny, "The answer", "--greedy", "--ignore-eos", "-n", 500)
    process = spawn("-m", "grok1", "launch", "-n", 2, "--port", port, *words, devices=2)
    assert process.stdout.read(1)
    process.kill()
    assert all_have_ended(port)
