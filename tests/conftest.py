# ruff: noqa: E402 - the environment is set before JAX is imported
import importlib.metadata
import os
from pathlib import Path

_ROOT = Path(__file__).parents[1]

# Before JAX is imported: 16 devices on any machine, and compiled programs kept from one run to the next. Most of the
# time goes to compiling, which takes half as long without optimization; the programs compute the same.
_FLAGS = ["--xla_force_host_platform_device_count=16", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later versions have no such flag
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
_given = os.environ.get("XLA_FLAGS", "").split()  # test processes inherit the flags of the process that starts them
os.environ["XLA_FLAGS"] = " ".join([*_given, *(flag for flag in _FLAGS if flag not in _given)])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import dataclasses
import functools
import io
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import reference
from built import require_kernels
from configs import SMALL

from grok1 import cli
from grok1.checkpoint.load import load_parameters
from grok1.checkpoint.reader import Checkpoint
from grok1.checkpoint.writer import write_checkpoint
from grok1.cli.terminal import Terminal
from grok1.config import PRESETS
from grok1.engine.engine import Engine
from grok1.model import Model
from grok1.ops.cpu import library as cpu
from grok1.ops.gpu.kernels import KERNELS as GPU
from grok1.ops.kernels import choose_kernels
from grok1.ops.tpu.kernels import KERNELS as TPU
from grok1.ops.xla.kernels import CPU_LIMITS
from grok1.params.sharding import make_mesh


def pytest_collection_modifyitems(items):
    """Start with the files that take longest, which start processes, so that both test processes end together."""
    items.sort(key=lambda item: item.path.parent.name not in ("cli", "multihost"))


@pytest.fixture(scope="session", autouse=True)
def _compile_once():
    """Share compiled programs among the engines of equal models on equal meshes, as each command makes its own."""
    programs = {}
    compile_program = Engine.compile

    def compile_once(engine, key):
        leaves, structure = jax.tree.flatten(engine.params)
        params = tuple((type(leaf), leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
        place = (engine.config, engine.dtype, engine.kernels, engine.mesh, structure, params, key)
        if place not in programs:
            programs[place] = compile_program(engine, key)
        return programs[place]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "compile", compile_once)
        yield


@pytest.fixture(scope="session")
def golden():
    """The folder of a sample checkpoint in the release's format, with logits of the release's own code."""
    folder = _ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("the golden checkpoint is not here")
    return folder


@pytest.fixture(scope="session")
def golden_sequences(golden):
    """The sample's five sequences."""
    with np.load(golden / "logits.npz") as stored:
        return [
            SimpleNamespace(
                tokens=stored[f"tokens_{i}"],
                upstream=stored[f"upstream_logits_{i}"].astype(np.float64),
                float64=stored[f"float64_logits_{i}"].astype(np.float64),
            )
            for i in range(5)
        ]


@pytest.fixture(scope="session")
def hollow_release(tmp_path_factory):
    """A folder with the release's files without their data; tests must not change it."""
    folder = tmp_path_factory.mktemp("hollow") / "model"
    with (folder.parent / "probe").open("wb") as file:
        file.truncate(1 << 24)
        if os.fstat(file.fileno()).st_blocks * 512 > 1 << 20:
            pytest.skip("this filesystem keeps no holes in files, and the release's 318 GB are too much for a test")
    write_checkpoint(folder, PRESETS["grok-1"], hollow=True)
    return folder


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """The folder of a random checkpoint of a config; tests must not change it."""

    @functools.cache
    def make_checkpoint(config, seed=0):
        folder = tmp_path_factory.mktemp("checkpoint") / "model"
        write_checkpoint(folder, config, seed=seed)
        return folder

    return make_checkpoint


@pytest.fixture(scope="session", params=["xla", "native"])
def kernels(request):
    """Both that a model on processors can run on."""
    if request.param == "native":
        require_kernels()
    return request.param


@pytest.fixture(scope="session")
def make_engine():
    """The engine of a checkpoint folder on a mesh; all tests share it and what it has compiled."""
    accelerators = {"gpu": GPU, "tpu": TPU}

    @functools.cache
    def make(folder, mesh, dtype, backend):
        checkpoint = Checkpoint.open(folder)
        device_mesh = make_mesh(checkpoint.config, mesh)
        if backend in accelerators:  # interpreted
            used = dataclasses.replace(accelerators[backend], **CPU_LIMITS)
        else:
            used = choose_kernels(checkpoint.config, device_mesh, backend).kernels
        params = load_parameters(checkpoint, device_mesh, np.dtype(dtype), pack=used.pack_box)
        return Engine(checkpoint.config, params, device_mesh, np.dtype(dtype), kernels=used)

    def make_engine(folder, mesh=(1, 1), dtype="float32", kernels="auto"):
        if kernels == "auto":
            kernels = "xla" if cpu.why_not() else "native"
        return make(folder, mesh, dtype, kernels)

    return make_engine


@pytest.fixture(scope="session")
def make_reference():
    """The float64 model of a checkpoint folder: tokens to logits `[T, vocab]` and margins `[T]`."""

    @functools.cache
    def make_reference(folder):
        config, arrays = reference.read_config(folder), reference.read_arrays(folder)
        logits = functools.cache(lambda tokens: reference.logits(config, arrays, np.asarray(tokens)))
        return lambda tokens: logits(tuple(int(token) for token in tokens))

    return make_reference


@pytest.fixture(scope="session")
def clear_sequences(make_reference):
    """Sequences whose selected experts no rounding changes, `[count, length]`, and their logits."""

    @functools.cache
    def clear_sequences(folder, count, length, seed=0):
        rng = np.random.default_rng(seed)
        vocabulary = reference.read_config(folder)["vocab_size"]
        tokens, expected = [], []
        for _ in range(50 * count):
            candidate = rng.integers(0, vocabulary, length)
            logits, margins = make_reference(folder)(candidate)
            if margins.min() > 1e-5:
                tokens.append(candidate)
                expected.append(logits)
            if len(tokens) == count:
                return np.asarray(tokens), np.asarray(expected)
        raise AssertionError("hardly a sequence has clear margins")

    return clear_sequences


@dataclasses.dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def lines(self):
        """The JSON objects on stdout."""
        return [json.loads(line) for line in self.out.splitlines()]


class Stream(io.TextIOWrapper):
    """A standard stream in memory."""

    def __init__(self, content=b""):
        super().__init__(io.BytesIO(content), encoding="utf-8", errors="surrogateescape", newline="\n")

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode()


@pytest.fixture
def grok1(monkeypatch):
    """Runs a command in this process."""
    for name in ("GROK1_CHECKPOINT", "GROK1_TOKENIZER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NPROC", "1")  # so that what a command sets is taken back
    monkeypatch.delenv("NPROC")

    def run(*arguments, stdin=b""):
        with monkeypatch.context() as patch:
            streams = {"stdin": Stream(stdin), "stdout": Stream(), "stderr": Stream()}
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            code = cli.execute([str(argument) for argument in arguments], Terminal())
            return Result(code, streams["stdout"].text(), streams["stderr"].text())

    return run


@pytest.fixture(scope="session")
def small_config():
    """Two layers and a short context."""
    return SMALL


@pytest.fixture(scope="session")
def small_model(make_checkpoint, make_engine, small_config):
    """A model of `small_config` without a tokenizer, on the mesh given."""

    @functools.cache
    def small_model(mesh=(1, 1)):
        return Model(make_engine(make_checkpoint(small_config), mesh), None)

    return small_model


def relative_error(found, expected):
    """Norm of the difference over the norm of what is expected."""
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.fixture(name="relative_error", scope="session")
def _relative_error():
    return relative_error
