"""Tests of scripts/gpu_check.py, with GPU kernels interpreted on the CPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from grok1.ops.gpu.kernels import KERNELS as GPU

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def test_every_operation_is_compared_with_its_reference(gpu_check, small_config):
    report = gpu_check.Report({"device": "interpreter"})
    gpu_check.check_operations(report, small_config, GPU, [20], gpu_check.Limits(1e9, 1e9))
    assert report.data["failures"] == []
    done = {(row["operation"], row["kernels"]) for row in report.data["operations"]}
    names = {"matrix product", "experts", "attention of 1", "attention of 48"}
    assert done == {(name, kernels) for name in names for kernels in ("gpu", "xla")}
    assert "| matrix product | 20 | gpu |" in report.markdown()


def test_wrong_results_and_exceptions_are_reported(gpu_check):
    import jax.numpy as jnp

    report = gpu_check.Report({})
    limits = gpu_check.Limits(1e9, 1e9)

    def fail():
        raise RuntimeError("out of registers\nand more")

    gpu_check.compare(report, "product", 1, GPU, 1, 1, limits, jnp.ones(3), lambda: jnp.full(3, 1.5))
    gpu_check.compare(report, "product", 1, GPU, 1, 1, limits, jnp.ones(3), lambda: jnp.full(3, jnp.nan))
    gpu_check.compare(report, "product", 1, GPU, 1, 1, limits, jnp.ones(3), fail)
    assert [failure.split(" by gpu")[1] for failure in report.data["failures"]] == [
        " has a relative error of 0.5, expected at most 0.02",
        " has a relative error of nan, expected at most 0.02",
        ": out of registers",
    ]


@pytest.mark.slow
def test_report_files_are_written(tmp_path):
    what = ["--preset", "tiny", "--layers", "2", "--rows", "1", "--batch", "1,2"]
    where = ["--context", "64", "--prefill", "32", "--steps", "2", "--out", str(tmp_path)]
    ran = subprocess.run([sys.executable, str(SCRIPT), *what, *where], check=False)
    assert ran.returncode == 0
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {(row["batch"], row["context"]) for row in found["decode"]} == {(1, 64), (2, 64)}
    assert {row["tokens"] for row in found["prefill"]} == {32}
    assert (tmp_path / "gpu-check.md").read_text().startswith("# Accelerator check")
