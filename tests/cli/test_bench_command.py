import builtins
import errno
import importlib
import os
import re

import jax
import pytest

from grok1.cli import bench as command
from grok1.config import ModelConfig
from grok1.diagnose import bench
from grok1.host.sizes import format_bytes
from grok1.ops.cpu import library as cpu
from grok1.plan.devices import named_devices
from grok1.plan.estimate import Estimate

SHORT = ("--prompt", "6,20", "--batch", "1,2", "--decode", "3", "--mesh", "1,1")
KEYS = {
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "decode_gigabytes_per_second",
    "decode_bytes_per_token",
    "read_gigabytes_per_second",
    "decode_share_of_read_bandwidth",
    "time_to_first_token_seconds",
    "peak_memory_bytes",
    "grok1_version",
    "device_kind",
}


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch):
    monkeypatch.setattr(bench, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "MATRIX_SIZE", 64)


def test_one_json_line_per_measurement(grok1, checkpoint):
    result = grok1("bench", "-c", checkpoint, *SHORT, "--threads", "1", "--json")
    assert (result.code, result.err) == (0, "")
    assert [(line["prompt_tokens"], line["batch"]) for line in result.lines] == [(6, 1), (6, 2), (20, 1), (20, 2)]
    for line in result.lines:
        assert line.keys() >= KEYS
        assert line["threads"] == 1
        assert (line["platform"], line["devices"]) == ("cpu", 1)
        assert line["jax_version"] == jax.__version__
        read = line["decode_bytes_per_step"] / line["decode_step_seconds"] / 1e9
        assert line["decode_gigabytes_per_second"] == pytest.approx(read)
        assert line["decode_share_of_read_bandwidth"] == pytest.approx(read / line["read_gigabytes_per_second"])
        assert line["decode_bytes_per_token"] == pytest.approx(line["decode_bytes_per_step"] / line["batch"])


def test_measurements_as_a_table(grok1, checkpoint):
    short = ("--batch", "2", "--decode", "3", "--mesh", "1,1")
    result = grok1("bench", "-c", checkpoint, *short, "--kernels", "xla")
    assert (result.code, result.err) == (0, "")
    facts, table = result.out.split("\n\n")
    assert "kernels" in facts
    assert "xla" in facts
    [row] = table.splitlines()[2:]
    assert row.split()[:2] == ["59", "2"]  # of 64
    model = ModelConfig.read(checkpoint / "config.json")
    per_token = Estimate(model, named_devices("cpu", 1, 10**10), (1, 1), "float32").decode_read_bytes
    assert f"  {format_bytes(round(per_token(2, 59 + 2 + 1) / 2))}  " in row


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot(ending, begins, grok1, checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"roofline.{ending}"
    path.write_text("replaced")
    assert grok1("bench", "-c", checkpoint, "--mesh", "1,1", "--prompt", "6", "--plot", path).code == 0
    assert path.read_bytes().startswith(begins)
    assert os.listdir(tmp_path) == [path.name]


def test_devices(grok1):
    result = grok1("bench", "--devices", "--threads", "3")
    assert result.code == 0
    assert "cpu" in result.out
    assert (cpu.kernel_name() or "no kernels for this processor were built") in result.out
    assert re.search(r"^host memory +\S+ [GT]B$", result.out, re.MULTILINE)
    lines = grok1("bench", "--devices", "--json", "--kernels", "xla").lines
    assert len(lines) == 16
    assert {line["kernels"] for line in lines} == {"xla"}


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("-c", "checkpoint", "--preset", "tiny"), 2, "--checkpoint and --preset cannot be used together"),
        (("--preset", "tiny", "--prompt", "x"), 2, 'expected one or more positive integers such as 64,512, got "x"'),
        (("--preset", "tiny", "--batch", "1,0"), 2, 'expected one or more positive integers such as 64,512, got "1,0"'),
        (("--preset", "tiny", "--plot", "picture.gif"), 2, "expected a name that ends in .png or .svg"),
        (("--preset", "tiny", "--plot", "nowhere/picture.png"), 2, 'directory "nowhere" does not exist'),
        (("--preset", "tiny", "--mesh", "1,1", "--prompt", "100000"), 1, "lower --prompt or --decode"),
        (("--preset", "tiny", "--mesh", "2,1", "--batch", "3"), 1, "choose a multiple"),
        (("--devices", "--threads", "0"), 2, "0 is not in the range"),
        (("--devices", "--plot", "picture.png"), 2, "--plot cannot be used with --devices"),
        (("--devices", "--preset", "tiny"), 2, "--preset cannot be used with --devices"),
        (("--preset", "tiny", "--load-memory", "1GB"), 2, "--load-memory cannot be used with --preset"),
        (("--preset", "tiny", "--tokenizer", "x.model"), 2, "--tokenizer cannot be used with --preset"),
    ],
)
def test_invalid_bench_options(arguments, code, sentence, grok1, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = grok1("bench", *arguments)
    assert result.code == code
    assert sentence in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    "arguments", [("--prompt", "63"), ("--mesh", "2,1", "--batch", "3"), ("--batch", "1,1000000000")]
)
def test_impossible_measurement_fails_before_loading(arguments, grok1, checkpoint, monkeypatch):
    module = importlib.import_module("grok1.model.load")
    monkeypatch.setattr(module, "load_parameters", lambda *_: pytest.fail("weights were loaded"))
    result = grok1("bench", "-c", checkpoint, *arguments)
    assert result.code == 1
    assert "grok1: error: " in result.err
    assert "internal error" not in result.err


def test_unwritable_plot_fails_before_loading(grok1, checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def refuse(**where):
        assert where == {"dir": tmp_path}
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(command.tempfile, "TemporaryFile", refuse)
    module = importlib.import_module("grok1.model.load")
    monkeypatch.setattr(module, "load_parameters", lambda *_: pytest.fail("weights were loaded"))
    result = grok1("bench", "-c", checkpoint, "--plot", tmp_path / "r.png")
    assert result.code == 1
    assert "r.png: Read-only file system; choose another file with --plot" in result.err


def test_plot_without_matplotlib(grok1, tmp_path, monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    result = grok1("bench", "--preset", "tiny", "--plot", tmp_path / "r.png")
    assert result.code == 1
    assert "pip install 'grok1[plot]'" in result.err


def test_unavailable_native_kernels(grok1, checkpoint, monkeypatch):
    monkeypatch.setattr(cpu, "why_not", lambda: "no kernels were built (install a C++ compiler)")
    result = grok1("run", "-c", checkpoint, "--mesh", "1,1", "--kernels", "native", "x")
    assert result.code == 1
    assert "no kernels were built" in result.err
    result = grok1("bench", "--devices")
    assert "install a C++ compiler" in result.out
    monkeypatch.setenv("GROK1_KERNELS", "abacus")
    result = grok1("run", "-c", checkpoint, "--mesh", "1,1", "x")
    assert result.code == 1
    assert 'invalid value "abacus" of GROK1_KERNELS' in result.err
