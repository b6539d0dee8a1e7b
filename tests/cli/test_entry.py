import importlib.resources
import os
import signal
import subprocess
import sys

import pytest

from grok1.cli import init, loading
from grok1.params.table import num_parameters

HEAVY = ("jax", "numpy", "rich", "prompt_toolkit", "sentencepiece", "haiku")


def imported(code):
    """Return the heavy packages that a program imports."""
    program = f"import sys\n{code}\nprint(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["run", "--help"], ["score", "--help"], ["plan", "--help"], ["inspect", "--help"]],
)
def test_help_imports_no_heavy_packages(arguments):
    assert imported(f"from grok1.cli import Terminal, execute\nassert execute({arguments}, Terminal()) == 0") == set()


def test_tokenize_and_init_do_not_import_jax(checkpoint, tmp_path):
    tokenize = ["tokenize", "-c", str(checkpoint), "word"]
    detokenize = ["detokenize", "-c", str(checkpoint), "400"]
    write = ["init", str(tmp_path / "new"), "--preset", "tiny"]
    code = "from grok1.cli import Terminal, execute\nassert not any(execute(a, Terminal()) for a in {})"
    found = imported(code.format([tokenize, detokenize, write]))
    assert "sentencepiece" in found  # checks that the list is not empty
    assert not found & {"jax", "haiku"}


def complete_in_shell(words, cwd):
    """Return the completions of the last word in bash, as (type, value), and the heavy packages imported."""
    code = "from grok1.__main__ import main\ncode = main()\nassert code == 0"
    program = f"import sys\n{code}\nprint(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    variables = {"_GROK1_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | variables, cwd=cwd, capture_output=True, text=True, check=True
    )
    return {tuple(line.split(",", 1)) for line in done.stdout.splitlines()}, done.stderr.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["grok1", "tok"], {("plain", "tokenize")}),
        (["grok1", "run", "--temp"], {("plain", "--temp"), ("plain", "--temperature")}),
        (["grok1", "run", "--dtype", "bf"], {("plain", "bfloat16")}),
        (["grok1", "init", "x", "--preset", "grok"], {("plain", "grok-1"), ("plain", "grok-1-slice")}),
        (["grok1", "batch", "-o", "out"], {("file", "out")}),
        (["grok1", "run", "-c", "check"], {("dir", "check")}),
        (["grok1", "launch", "-n", "2", "--", "b"], {("plain", "batch"), ("plain", "bench")}),
    ],
)
def test_shell_completion(words, expected, tmp_path):
    assert complete_in_shell(words, tmp_path) == (expected, [])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_script(start, shell):
    process = start(env={"_GROK1_COMPLETE": f"{shell}_source"})
    script, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, b"")
    assert f"_GROK1_COMPLETE={shell}_complete" in script.decode()


def test_version_and_help(grok1):
    assert grok1("--version").out == "grok1 0.1.0\n"
    shown = grok1("--help")
    assert shown.code == 0
    assert all(f"\n  {name} " in shown.out for name in ("run", "score", "init", "tokenize", "smoke"))


@pytest.mark.parametrize("arguments", [["frobnicate"], ["run", "--frobnicate"], ["init"]])
def test_usage_errors_exit_with_2_and_leave_stdout_empty(grok1, arguments):
    result = grok1(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Usage: grok1" in result.err


def test_usage_error_with_closed_stderr_leaves_stdout_empty():
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "grok1", "run", "--frobnicate"]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("arguments", [["--help"], ["tokenize", "word"]])
def test_closed_pipe_is_not_an_error(start, checkpoint, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(*arguments, stdout=writer, env={"GROK1_CHECKPOINT": str(checkpoint)})
    os.close(writer)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, b"")


def test_full_disk_is_a_one_line_error(start, checkpoint):
    with open("/dev/full", "wb") as full:
        process = start("tokenize", "-c", checkpoint, "word", stdout=full)
        error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1
    assert error.startswith("grok1: error: cannot write to standard output: No space left on device")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyError("a\nb"), "internal error: KeyError: 'a\\nb'; run again with --verbose for the traceback"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), "out of memory (RESOURCE_EXHAUSTED: 9 bytes): use more"),
        (MemoryError(), "out of memory: use more devices, a smaller --batch-size"),
    ],
)
def test_unexpected_errors_are_one_line_and_verbose_adds_the_traceback(grok1, monkeypatch, error, sentence):
    def fail(*_):
        raise error

    monkeypatch.setattr(loading, "read_tokenizer", fail)
    plain = grok1("tokenize", "word")
    assert (plain.code, plain.out) == (1, "")
    assert plain.err.startswith(f"grok1: error: {sentence}")
    assert plain.err.count("\n") == 1
    assert "Traceback" in grok1("tokenize", "word", "--verbose").err


def test_interrupt_exits_with_130_silently(grok1, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "read_tokenizer", interrupt)
    result = grok1("tokenize", "word")
    assert (result.code, result.out, result.err) == (130, "", "")


def test_unusable_devices_are_a_one_line_error(start, checkpoint):
    process = start("run", "-c", checkpoint, "word", env={"JAX_PLATFORMS": "abacus"})
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1
    assert error.startswith('grok1: error: JAX found no usable device with JAX_PLATFORMS="abacus"')
    assert error.count("\n") == 1


IMPORTING = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt)
runpy.run_module("grok1", run_name="__main__")
"""


@pytest.mark.parametrize(
    "module", ["grok1.config", "click", "grok1.cli.terminal", "grok1.cli.options", "numpy.linalg", "jaxlib", "haiku"]
)
def test_interrupt_during_imports_exits_with_130_silently(start, checkpoint, module):
    process = start("run", "-c", checkpoint, "word", code=IMPORTING.format(module=module))
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == 130


BUSY = """
import signal, threading
from grok1.cli.interrupt import interrupts_end_within_a_second

signal.signal(signal.SIGINT, lambda *_: None)  # as while XLA compiles, no exception is raised
with interrupts_end_within_a_second(
    patient={patient}, hint=lambda: print("hint", flush=True), leave=lambda: print("left", flush=True)
):
    print("ready", flush=True)
    threading.Event().wait()
"""


def test_interrupt_ends_a_process_blocked_in_a_library(start):
    process = start(code=BUSY.format(patient=False))
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == b"left\n"
    assert process.returncode == 130


def test_patient_process_ends_at_the_second_interrupt(start):
    process = start(code=BUSY.format(patient=True))
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"hint\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == b"left\n"
    assert process.returncode == 130


def test_interrupt_while_streaming(start, long_checkpoint):
    process = start("run", "-c", long_checkpoint, "--mesh", "1,1", "word", "-n", 2000, "--ignore-eos")
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, b"")


@pytest.mark.parametrize("moment", ["starting JAX", "compiling the prefill program"])
def test_interrupt_restores_the_terminal(start, checkpoint, terminal, moment):
    process = start(
        *("run", "-c", checkpoint, "--mesh", "1,1", "word"),
        env={"JAX_ENABLE_COMPILATION_CACHE": "false", "TERM": "xterm"},
        stderr=terminal.there,
    )
    terminal.read_until(moment)
    process.send_signal(signal.SIGINT)
    terminal.read_until("\x1b[?25h")  # the cursor is visible again
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")


def test_init_writes_a_checkpoint_and_reports_it(grok1, tmp_path):
    result = grok1("init", tmp_path / "new", "--preset", "tiny", "--json")
    assert result.code == 0
    (record,) = result.lines
    assert record["directory"] == str(tmp_path / "new")
    assert record["files"] == len([path for path in (tmp_path / "new").rglob("*") if path.is_file()])
    assert record["bytes"] == sum(path.stat().st_size for path in (tmp_path / "new").rglob("*") if path.is_file())
    assert (record["preset"], record["seed"], record["vocab_size"]) == ("tiny", 0, 1024)
    again = grok1("init", tmp_path / "new", "--preset", "tiny")
    assert (again.code, again.out) == (1, "")
    assert "--force" in again.err
    assert grok1("init", tmp_path / "new", "--preset", "tiny", "--force").code == 0


def test_init_uses_the_vocabulary_of_a_given_tokenizer(grok1, tmp_path, checkpoint):
    tokenizer = checkpoint / "tokenizer.model"
    (record,) = grok1("init", tmp_path / "new", "--preset", "tiny", "--tokenizer", tokenizer, "--json").lines
    assert record["vocab_size"] == 512
    assert (tmp_path / "new" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_init_of_the_release_trains_no_tokenizer(grok1, tmp_path):
    folder = tmp_path / "release"
    (told,) = grok1("init", folder, "--preset", "grok-1", "--hollow", "--layers", 1, "--json").lines
    assert told["vocab_size"] == 131072
    assert not (folder / "tokenizer.model").exists()


def test_init_rejects_unknown_presets_and_invalid_tokenizers(grok1, tmp_path):
    assert grok1("init", tmp_path / "new", "--preset", "huge").code == 2
    result = grok1("init", tmp_path / "new", "--preset", "tiny", "--tokenizer", __file__)
    assert result.code == 1
    assert "not a valid SentencePiece model" in result.err
    assert not (tmp_path / "new").exists()


def test_init_unpacks_the_trained_model(grok1, tmp_path):
    folder = tmp_path / "bard"
    (record,) = grok1("init", folder, "--preset", "bard", "--json").lines
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert (record["files"], record["bytes"]) == (len(files), sum(map(len, files.values())))
    assert (record["preset"], record["seed"], record["parameters"]) == (
        "bard",
        None,
        num_parameters(init.PRESETS["bard"]),
    )
    again = grok1("init", folder, "--preset", "bard")
    assert (again.code, again.out) == (1, "")
    assert "--force" in again.err
    (folder / "config.json").write_text("changed")
    assert grok1("init", folder, "--preset", "bard", "--force").code == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    verified = grok1("verify", "--content", folder)
    assert verified.code == 0, verified.err


@pytest.mark.parametrize(
    "options", [("--seed", "0"), ("--layers", "2"), ("--hollow",), ("--tokenizer", "x.model", "--seed", "1")]
)
def test_init_rejects_options_unused_by_a_trained_model(grok1, tmp_path, options):
    result = grok1("init", tmp_path / "bard", "--preset", "bard", *options)
    assert (result.code, result.out) == (2, "")
    assert "--preset bard is a trained model and cannot be used with --" in result.err
    assert not (tmp_path / "bard").exists()


@pytest.mark.parametrize("damage", ["cut", "other", "method", "empty", "absent"])
def test_init_with_a_damaged_archive_writes_nothing(grok1, tmp_path, monkeypatch, damage):
    archive = tmp_path / "damaged.zip"
    package_file = importlib.resources.files("grok1").joinpath(init.TRAINED["bard"])
    content = package_file.read_bytes()
    if damage == "cut":
        archive.write_bytes(content[: len(content) // 2])
    elif damage == "other":
        middle = len(content) // 2
        archive.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    elif damage == "method":  # unknown compression method
        entry = content.index(b"PK\x01\x02")
        archive.write_bytes(content[: entry + 10] + b"\x7f\x00" + content[entry + 12 :])
    elif damage == "empty":
        archive.write_bytes(b"PK\x05\x06" + bytes(18))
    monkeypatch.setitem(init.TRAINED, "bard", str(archive))
    result = grok1("init", tmp_path / "bard", "--preset", "bard")
    assert (result.code, result.out) == (1, "")
    assert "reinstall grok1" in result.err
    assert not (tmp_path / "bard").exists()
