"""End-to-end smoke test on a tiny model: write, read, load, shard and generate.

::

    for check in run_smoke(Path("directory")):
        print(check.result, check.name, check.measured)
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from grok1.checkpoint.reader import Checkpoint
from grok1.checkpoint.writer import write_checkpoint
from grok1.config import PRESETS
from grok1.model import Completion, Model, load
from grok1.params.sharding import default_mesh_shape
from grok1.params.table import num_parameters
from grok1.plan.devices import make_virtual_devices
from grok1.text.tokenizer import Tokenizer
from grok1.text.train_tokenizer import train_small_tokenizer

_VIRTUAL_DEVICES = 8
_PROMPT = "The answer to life, the universe and everything is of course"
_UNICODE = "Füße, naïve café; 東京 and Москва; 👩‍🚀 — tabs\tand\n\nlines, 1234567890"
_NEW_TOKENS = 24
LOGITS_TOLERANCE = 1e-3
"""Maximum difference of two logits, relative to the largest logit; float32 sums depend on the order of addition."""
LOGPROB_TOLERANCE = 1e-3
"""Maximum difference of two log-probabilities."""


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """The result of a check.

    Attributes:
        name: name of the check.
        result: "ok", "FAILED", or "skipped" if the check is not possible on this machine.
        measured: the measured values, or the reason of the failure.
        seconds: duration.
    """

    name: str
    result: Literal["ok", "FAILED", "skipped"]
    measured: str
    seconds: float


class _Failed(Exception):
    """A check has failed."""


class _Skipped(Exception):
    """A check is not possible on this machine."""


def run_smoke(folder: Path, starting: Callable[[str], None] = lambda name: None) -> Iterator[CheckResult]:
    """Run all checks, even if one fails, and yield their results.

    Without accelerators, the CPU is used as 8 virtual devices, unless JAX has already started or `JAX_NUM_CPU_DEVICES`
    or `XLA_FLAGS` sets their number.

    Args:
        folder: where to write the checkpoint; must not contain one.
        starting: called with the name of each check before it runs.
    """
    make_virtual_devices(_VIRTUAL_DEVICES)
    path = _Path(folder)
    for name, step in (
        ("write random weights", path.write),
        ("verify every file", path.verify),
        ("read slices of files", path.read_slices),
        ("tokenizer round trip", path.round_trip),
        ("load on one device", path.load_whole),
        ("load on all devices", path.load_sharded),
        ("logits on one and all devices", path.compare_logits),
        ("prefill and decode agree", path.compare_prefill_with_decode),
        ("greedy text on all devices", path.compare_greedy_text),
        ("streamed text", path.compare_stream),
    ):
        starting(name)
        start = time.perf_counter()
        result: Literal["ok", "FAILED", "skipped"] = "ok"
        try:
            # By default, accelerators round the factors of float32 products.
            with jax.default_matmul_precision("highest"):
                measured = step()
        except _Skipped as reason:
            result, measured = "skipped", str(reason)
        except Exception as error:
            result = "FAILED"
            measured = str(error) if isinstance(error, _Failed) else f"{type(error).__name__}: {error}"
        yield CheckResult(name, result, " ".join(measured.split()), time.perf_counter() - start)


class _Path:
    """The checks and their shared state."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._written = False  # an existing checkpoint in the directory is not used
        self._opened: Checkpoint | None = None
        self._models: dict[str, Model] = {}
        self._alone = False  # whether there is only one device

    def write(self) -> str:
        config = PRESETS["tiny"]
        tokenizer = train_small_tokenizer(config.vocab_size)
        write_checkpoint(self._folder, config, seed=0, tokenizer=tokenizer)
        self._written = True
        return f"{num_parameters(config) / 1e6:.1f} million parameters"

    def verify(self) -> str:
        if not self._written:
            raise _Failed("no checkpoint was written")
        self._opened = Checkpoint.open(self._folder)
        return f"{len(self._opened.table)} files, {self._opened.total_bytes / 1e6:.1f} MB"

    def read_slices(self) -> str:
        checkpoint = self._checkpoint()
        count = 0
        for index in range(len(checkpoint.table)):
            mapped = checkpoint.weight_view(index)
            key = tuple(slice(size // 3, max(size // 3 + 1, size * 2 // 3)) for size in mapped.shape)
            part = np.empty(mapped[key].shape, mapped.dtype)
            checkpoint.read_into(index, part, key)
            if part.tobytes() != mapped[key].tobytes():
                raise _Failed(f"a slice of {checkpoint.table[index].file_name} differs from the mapped file")
            count += part.nbytes
        return f"{count / 1e6:.1f} MB in {len(checkpoint.table)} files"

    def round_trip(self) -> str:
        self._checkpoint()
        tokenizer = Tokenizer.read(self._folder / "tokenizer.model")
        ids = tokenizer.encode(_UNICODE)
        text = tokenizer.decode(ids)
        if text != _UNICODE:
            raise _Failed(f"decoded {text!r}, expected {_UNICODE!r}")
        return f"{len(_UNICODE)} characters, {len(ids)} tokens"

    def load_whole(self) -> str:
        devices = jax.devices()
        if len(devices) == 1 and devices[0].platform != "cpu":
            devices = jax.devices("cpu")  # compare the accelerator ("all") with the CPU ("one")
        return self._load("one", (1, 1), devices[:1])

    def load_sharded(self) -> str:
        devices = jax.devices()
        shape = default_mesh_shape(self._checkpoint().config, len(devices))
        if shape == (1, 1) and devices[0].platform == "cpu":
            self._alone = True
            raise _Skipped("only one device")
        return self._load("all", shape, devices)

    def compare_logits(self) -> str:
        one, other = self._model("one"), self._model("all")
        tokens = one.tokenizer.encode(_PROMPT)
        expected, found = one.logits(tokens), other.logits(tokens)
        scale = float(np.abs(expected).max())
        difference = float(np.abs(found - expected).max()) / scale
        return _within(difference, LOGITS_TOLERANCE, f"of the largest logit ({scale:.1f})")

    def compare_prefill_with_decode(self) -> str:
        completion = self._greedy
        assert completion.logprobs is not None
        score = self._model("one").score([*completion.prompt_tokens, *completion.tokens])
        read = [entry.logprob for entry in score.logprobs[len(completion.prompt_tokens) - 1 :]]
        decoded = [entry.logprob for entry in completion.logprobs]
        difference = float(np.abs(np.subtract(read, decoded)).max())
        return _within(difference, LOGPROB_TOLERANCE, f"in {len(decoded)} log-probabilities")

    def compare_greedy_text(self) -> str:
        other = self._model("all")
        expected, found = self._greedy, _complete_greedily(other)
        if found.text == expected.text:
            return f"{len(expected.tokens)} identical tokens"
        differs = int(np.flatnonzero(np.not_equal(expected.tokens, found.tokens))[0])
        assert expected.logprobs is not None
        (_, first), (_, second) = expected.logprobs[differs].top
        if first - second <= LOGPROB_TOLERANCE:  # rounding decides
            return f"{differs} identical tokens, then two equally likely tokens"
        raise _Failed(f"token {differs} is {found.tokens[differs]}, expected {expected.tokens[differs]}")

    def compare_stream(self) -> str:
        model = self._model("one")
        stream = model.stream(_PROMPT, max_tokens=_NEW_TOKENS, temperature=1.0, seed=1, ignore_eos=True)
        pieces = list(stream)
        completion = stream.completion
        prompt, tokenizer = completion.prompt_tokens, model.tokenizer
        decoded = tokenizer.decode([*prompt, *completion.tokens])
        expected = decoded.removeprefix(tokenizer.decode(prompt))
        if "".join(pieces) != expected:
            raise _Failed(f"streamed {''.join(pieces)!r}, expected {expected!r}")
        return f"{len(pieces)} pieces, {len(completion.tokens)} tokens"

    def _checkpoint(self) -> Checkpoint:
        if self._opened is None:
            raise _Failed("no checkpoint was opened")
        return self._opened

    def _load(self, name: str, shape: tuple[int, int], devices: Sequence[jax.Device]) -> str:
        self._checkpoint()
        self._models[name] = load(self._folder, mesh=shape, dtype="float32", devices=devices)
        return f"{devices[0].platform}, mesh {shape[0]},{shape[1]}"

    def _model(self, name: str) -> Model:
        if name == "all" and self._alone:
            raise _Skipped("only one device")
        if name not in self._models:
            raise _Failed(f"the model was not loaded on {'one device' if name == 'one' else 'all devices'}")
        return self._models[name]

    @functools.cached_property
    def _greedy(self) -> Completion:
        """Greedy completion of the model on one device."""
        return _complete_greedily(self._model("one"))


def _complete_greedily(model: Model) -> Completion:
    return model.complete(_PROMPT, greedy=True, max_tokens=_NEW_TOKENS, logprobs=2, ignore_eos=True)


def _within(difference: float, tolerance: float, of_what: str) -> str:
    measured = f"maximum difference {difference:.1e} {of_what}, tolerance {tolerance:.0e}"
    if not difference <= tolerance:  # also if it is NaN
        raise _Failed(measured)
    return measured
