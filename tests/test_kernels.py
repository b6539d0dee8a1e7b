"""Selection of kernels, and reasons for fallbacks."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import require_kernels

from grok1.config import PRESETS
from grok1.errors import KernelsError
from grok1.ops.gpu import kernels as gpu
from grok1.ops.kernels import choose_kernels, kernels_in_use

RELEASE = PRESETS["grok-1"]


@dataclasses.dataclass(frozen=True)
class Device:
    platform: str
    device_kind: str
    compute_capability: str = ""


def mesh(platform, shards=8, capability=""):
    device = Device(platform, f"some {platform}", capability)
    return SimpleNamespace(devices=np.full((1, shards), device), shape={"data": 1, "model": shards})


@pytest.fixture
def gpu_runs(monkeypatch):
    monkeypatch.delenv("GROK1_KERNELS", raising=False)
    monkeypatch.setattr(gpu, "why_not", lambda device: None)


@pytest.mark.usefixtures("gpu_runs")
@pytest.mark.parametrize(("platform", "backend", "name"), [("gpu", "gpu", "triton"), ("tpu", "tpu", "mosaic")])
def test_accelerators_have_native_kernels(platform, backend, name):
    for kernels in ("auto", "native"):
        chosen = choose_kernels(RELEASE, mesh(platform), kernels)
        assert (chosen.kernels.backend, chosen.name, chosen.fallback) == (backend, name, None)
    chosen = choose_kernels(RELEASE, mesh(platform), "xla")
    assert (chosen.kernels.backend, chosen.name, chosen.fallback) == ("xla", "xla", None)


@pytest.mark.usefixtures("gpu_runs")
def test_the_environment_variable_overrides_auto(monkeypatch):
    monkeypatch.setenv("GROK1_KERNELS", "xla")
    assert choose_kernels(RELEASE, mesh("gpu")).kernels.backend == "xla"
    assert choose_kernels(RELEASE, mesh("gpu"), "native").kernels.backend == "gpu"


def test_an_unsupported_gpu_falls_back_with_a_reason(monkeypatch):
    monkeypatch.delenv("GROK1_KERNELS", raising=False)
    old = mesh("gpu", capability="7.5")
    chosen = choose_kernels(RELEASE, old)
    assert chosen.kernels.backend == "xla"
    assert chosen.fallback == "some gpu has compute capability 7.5, and 8.0 is needed for bfloat16"
    with pytest.raises(KernelsError, match=r"not available: some gpu has .* 7\.5, .*; use --kernels auto"):
        choose_kernels(RELEASE, old, "native")


@pytest.mark.usefixtures("gpu_runs")
def test_stacks_too_large_for_pallas_fall_back():
    # On one GPU, the experts of 2 layers take 3.2 GB: too much for 31-bit offsets, too little for 64-bit offsets.
    config = dataclasses.replace(RELEASE, num_layers=2)
    chosen = choose_kernels(config, mesh("gpu", 1))
    assert chosen.kernels.backend == "xla"
    assert "a stack of 3,221,225,472 bytes" in chosen.fallback
    assert choose_kernels(dataclasses.replace(RELEASE, num_layers=3), mesh("gpu", 1)).kernels.backend == "gpu"


def test_unknown_platforms_have_no_kernels(monkeypatch):
    monkeypatch.delenv("GROK1_KERNELS", raising=False)
    assert kernels_in_use(mesh("abacus").devices[0, 0]).fallback == "there are none for the platform abacus"


def test_kernels_are_tested_before_use(monkeypatch):
    device = jax.devices()[0]  # interprets the kernels
    assert gpu.why_not.__wrapped__(device) is None
    right = gpu.multiply
    monkeypatch.setattr(gpu, "multiply", lambda *arguments: [1.1 * product for product in right(*arguments)])
    assert gpu.why_not.__wrapped__(device) == "they give wrong results on cpu (relative error 1.0e-01)"

    def fail(*arguments):
        raise RuntimeError("no such instruction.\nand more")

    monkeypatch.setattr(gpu, "multiply", fail)
    assert gpu.why_not.__wrapped__(device) == "they fail on cpu (no such instruction)"
    monkeypatch.setattr(gpu, "multiply", lambda *arguments: [jnp.full_like(right(*arguments)[0], jnp.nan)])
    assert "wrong results" in gpu.why_not.__wrapped__(device)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("library.LIBRARY = 'nowhere'", "no kernels for this processor were built (install a C++ compiler"),
        ("jax.ffi.register_ffi_target = refuse", "the kernels were built for another version of jaxlib than"),
    ],
)
def test_missing_or_incompatible_cpu_kernels_fall_back(change, reason):
    if "refuse" in change:
        require_kernels()
    code = f"""
import jax
from grok1.ops.cpu import library
from grok1.ops.kernels import kernels_in_use

def refuse(*arguments, **options):
    raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: the handler's API version (0.5) is incompatible")

{change}
chosen = kernels_in_use(jax.devices("cpu")[0])
print(chosen.name, chosen.fallback)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"xla {reason}")
