"""Verdicts on whether a model fits."""

import jax
import pytest

from grok1.config import PRESETS
from grok1.errors import TooSmallError
from grok1.host import memory
from grok1.model import load
from grok1.plan.devices import DeviceKind, Devices, present_devices
from grok1.plan.estimate import Estimate
from grok1.plan.verdict import room, verdict

RELEASE = PRESETS["grok-1"]
TINY = PRESETS["tiny"]
GPU = DeviceKind("gpu", "gpu", None, 1e12, 1e15)
CPU = DeviceKind("cpu", "cpu", None, 1e11, 1e12)
GB = 10**9


def verdict_for(mesh, usable, kind=GPU, dtype="bfloat16", count=None):
    return verdict(Estimate(RELEASE, Devices(kind, count or mesh[0] * mesh[1], usable), mesh, dtype))


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (verdict_for((1, 8), 60 * GB), "fits: the weights and 70 sequences of 8192 tokens at a time"),
        (
            verdict_for((1, 4), 60 * GB),
            "does not fit: the model needs 81.5 GB per device (79.2 GB for weights, the rest for one sequence), but "
            "60.0 GB is available per device; it fits with 8 such devices and --mesh 1,8",
        ),
        (
            verdict_for((4, 2), 60 * GB),
            "does not fit: the model needs 161 GB per device (158 GB for weights, the rest for one sequence), but "
            "60.0 GB is available per device; it fits with --mesh 1,8",
        ),
        (
            verdict_for((1, 16), 15 * GB),
            "does not fit: the model needs 21.7 GB per device (19.9 GB for weights, the rest for one sequence), but "
            "15.0 GB is available per device; it fits with 32 such devices and --mesh 1,32",
        ),
        (
            verdict_for((1, 16), 2 * GB),
            "does not fit: the model needs 21.7 GB per device (19.9 GB for weights, the rest for one sequence), but "
            "2.00 GB is available per device; use devices with more memory: the model can be split across at most "
            "256 devices and then needs 3.39 GB on each",
        ),
        (
            verdict_for((1, 1), 64 * GB, CPU, "float32"),
            "does not fit: the model needs 323 GB of memory (318 GB for weights, the rest for one sequence), but "
            "64.0 GB is available on this machine; use a machine with 323 GB of free memory",
        ),
        (
            verdict_for((1, 1), 321 * GB, CPU, "float32"),
            "does not fit: the model needs 323 GB of memory (318 GB for weights, the rest for one sequence), but 321 "
            "GB is available on this machine; it fits with --dtype bfloat16",
        ),
        (
            verdict_for((1, 8), None),
            "unknown: the model needs 41.5 GB per device (39.6 GB for weights, the rest for one sequence); the "
            "available memory could not be determined",
        ),
    ],
)
def test_verdict(sentence, expected):
    assert sentence == expected


def test_load_checks_memory_first(make_checkpoint, monkeypatch):
    folder = make_checkpoint(TINY)
    planned = Estimate(TINY, Devices(CPU, 16, 0), (1, 2), "float32")

    monkeypatch.setattr(memory, "available_bytes", lambda: planned.needed_bytes(5))
    assert load(folder, mesh=(1, 2)).max_sequences == 5

    monkeypatch.setattr(memory, "available_bytes", lambda: planned.needed_bytes(1) - 1)
    stages = set()
    with pytest.raises(TooSmallError, match="is available on this machine"):
        load(folder, mesh=(1, 2), progress=lambda progress: stages.add(progress.stage))
    assert stages == {"checking"}


def test_unknown_memory_does_not_prevent_loading(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    assert room(Estimate(RELEASE, present_devices(jax.devices()), (1, 8), "float32")) is None
