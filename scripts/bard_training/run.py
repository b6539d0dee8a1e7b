"""Training: the optimizer, the loss, and a loop that can be interrupted and resumed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bard_training import corpus
from bard_training.evaluate import bits_per_byte, token_logprobs
from bard_training.model import EMBEDDINGS, FAITHFUL, Params, RouterStatistics, forward, init_params
from grok1.config import ModelConfig
from grok1.host.atomic_write import atomic_write

MATRIX_RATE = 1.5e-2
OTHER_RATE = 5e-3
WEIGHT_DECAY = 0.1
BALANCE_WEIGHT = 0.01
Z_WEIGHT = 0.001

State = tuple[Params, optax.OptState]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings that, together with the text, determine the trained parameters.

    Attributes:
        config: the model.
        steps: number of optimizer steps.
        seed: seed of the initial parameters, the order of the text and the dropout.
        dropout: dropout rate.
        batch_tokens: tokens per optimizer step.
        phases: (fraction of the steps, sequence length) pairs, in order. Starting with short sequences is faster and
            costs little quality.
    """

    config: ModelConfig
    steps: int = 3000
    seed: int = 0
    dropout: float = 0.1
    batch_tokens: int = 4096
    phases: tuple[tuple[float, int], ...] = ((0.4, 128), (0.4, 256), (0.2, 512))

    def batch_shapes(self) -> list[tuple[int, int]]:
        """Return the batch shape (sequences, tokens per sequence) of each step."""
        boundaries = itertools.accumulate(fraction for fraction, _ in self.phases)
        ends = [round(boundary * self.steps) for boundary in boundaries]
        counts = [end - start for start, end in itertools.pairwise([0, *ends])]
        return [
            (max(1, self.batch_tokens // length), length)
            for count, (_, length) in zip(counts, self.phases, strict=True)
            for _ in range(count)
        ]


def optimizer(steps: int) -> optax.GradientTransformation:
    """Return the optimizer: Muon for matrices (per expert), AdamW for embeddings and routers, Adam for norms."""

    def rate(peak: float) -> optax.Schedule:
        warm_up = max(1, steps * 3 // 100)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warm_up, max(steps, warm_up + 1), 0.02 * peak)

    def label(path: tuple[Any, ...], _: jax.Array) -> str:
        name = path[0].key
        if "norm" in name:
            return "norm"
        return "adamw" if name == EMBEDDINGS or "router" in name else "matrix"

    last_two = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    kinds = {
        "matrix": optax.contrib.muon(
            rate(MATRIX_RATE),
            weight_decay=WEIGHT_DECAY,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: last_two, params),
        ),
        "adamw": optax.adamw(rate(OTHER_RATE), 0.9, 0.95, weight_decay=WEIGHT_DECAY),
        "norm": optax.adam(rate(OTHER_RATE), 0.9, 0.95),
    }
    labels = functools.partial(jax.tree_util.tree_map_with_path, label)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(kinds, labels))


def loss(
    config: ModelConfig, params: Params, tokens: jax.Array, dropout_rate: float, dropout_key: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, RouterStatistics]]:
    """Compute the training loss: cross-entropy in nats per token plus the auxiliary router losses.

    Args:
        config: the model's config.
        params: its parameters.
        tokens: int32 `[batch, seq + 1]`.
        dropout_rate: as for `forward`.
        dropout_key: as for `forward`.

    Returns:
        The loss, and a pair of the cross-entropy and the router statistics.
    """
    logits, routers = forward(config, params, tokens[:, :-1], FAITHFUL, dropout_rate, dropout_key)
    predicted = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    cross_entropy = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - predicted)
    return cross_entropy + BALANCE_WEIGHT * routers.balance_loss + Z_WEIGHT * routers.z_loss, (cross_entropy, routers)


@functools.cache
def train_step(recipe: Recipe) -> Callable[[State, jax.Array, int], tuple[State, tuple[jax.Array, RouterStatistics]]]:
    """Return the compiled optimizer step, a function of the state (donated), a batch of tokens and the step number."""
    transformation = optimizer(recipe.steps)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, tokens: jax.Array, number: int) -> tuple[State, tuple[jax.Array, RouterStatistics]]:
        params, optimizer_state = state
        key = jax.random.fold_in(jax.random.key(recipe.seed), number)
        gradient = jax.grad(loss, argnums=1, has_aux=True)
        gradients, statistics = gradient(recipe.config, params, tokens, recipe.dropout, key)
        updates, optimizer_state = transformation.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), statistics

    return step


class ResumeError(Exception):
    """Raised when a saved state is damaged or belongs to another run."""


class DivergedError(Exception):
    """Raised when the loss is not finite."""


class Run:
    """A training run that saves its state in a directory and resumes from it.

    Args:
        folder: an existing directory for `state.npz` and `log.jsonl`.
        recipe: settings of the run.
        tokens: the training text, int32 `[tokens]`.
        measured: texts to evaluate during training: (tokens, number of bytes) by name.

    Attributes:
        done: number of completed steps.
        seconds: total training time, including interrupted runs.
        log: measurements, oldest first.

    Raises:
        ResumeError: if the saved state is damaged, or belongs to another recipe or text.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, tokens: np.ndarray, measured: dict[str, tuple[np.ndarray, int]]
    ) -> None:
        self.folder, self.recipe, self.tokens, self.measured = folder, recipe, tokens, measured
        self.log: list[dict[str, Any]] = []
        self.done, self.seconds = 0, 0.0
        self._losses: list[float] = []  # since the last measurement
        params = init_params(recipe.config, recipe.seed)
        self.state: State = (params, optimizer(recipe.steps).init(params))
        if self._state_file.exists():
            self._restore()

    @property
    def params(self) -> Params:
        """Current parameters."""
        return self.state[0]

    @property
    def _state_file(self) -> Path:
        return self.folder / "state.npz"

    @property
    def _fingerprint(self) -> str:
        return f"{self.recipe} {hashlib.sha256(self.tokens.tobytes()).hexdigest()}"

    def train(
        self,
        *,
        save_every: int = 100,
        measure_every: int = 200,
        report: Callable[[Run], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> bool:
        """Run the remaining steps, or until `stop` returns true, and save the state.

        Args:
            save_every: steps between saves.
            measure_every: steps between measurements.
            report: called after each step.
            stop: called after each step; true stops the run.

        Returns:
            Whether all steps are complete.

        Raises:
            DivergedError: if the loss is not finite; the last saved state is kept.
            ValueError: if the text is shorter than two of the longest sequences.
        """
        step = train_step(self.recipe)
        shapes = self.recipe.batch_shapes()
        batches = {shape: corpus.batches(self.tokens, *shape, self.recipe.seed) for shape in dict.fromkeys(shapes)}
        start = time.monotonic() - self.seconds
        for number, shape in enumerate(shapes, start=1):
            batch = next(batches[shape])
            if number <= self.done:
                continue
            self.state, (cross_entropy, routers) = step(self.state, jnp.asarray(batch), number)
            self._losses.append(float(cross_entropy))
            if not math.isfinite(self._losses[-1]):
                raise DivergedError(f"the loss at step {number} is {self._losses[-1]}")
            self.done, self.seconds = number, time.monotonic() - start
            last = number == len(shapes)
            if number % measure_every == 0 or last:
                self._measure(shape[1], routers)
            stopping = stop is not None and stop()
            if number % save_every == 0 or last or stopping:
                self._save()
            if report is not None:
                report(self)
            if stopping:
                break
        return self.done == len(shapes)

    def _measure(self, context: int, routers: RouterStatistics) -> None:
        entry: dict[str, Any] = {
            "step": self.done,
            "tokens": sum(batch * length for batch, length in self.recipe.batch_shapes()[: self.done]),
            "seconds": round(self.seconds, 1),
            "train_nats_per_token": float(np.mean(self._losses)),
            "balance_loss": float(routers.balance_loss),
            "smallest_expert_share": float(jnp.min(routers.shares)),
            "largest_expert_share": float(jnp.max(routers.shares)),
        }
        for name, (tokens, num_bytes) in self.measured.items():
            logprobs = token_logprobs(self.recipe.config, self.params, tokens, context)
            entry[f"{name}_bits_per_byte"] = bits_per_byte(logprobs, num_bytes)
        self.log.append(entry)
        self._losses = []

    def _save(self) -> None:
        about = {
            "fingerprint": self._fingerprint,
            "done": self.done,
            "seconds": self.seconds,
            "log": self.log,
            "losses": self._losses,
        }
        with atomic_write(self._state_file, "wb") as file:
            leaves = {f"leaf_{index}": np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(self.state))}
            np.savez(file, about=np.asarray(json.dumps(about)), **leaves)
        with atomic_write(self.folder / "log.jsonl") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in self.log)

    def _restore(self) -> None:
        leaves, structure = jax.tree.flatten(self.state)
        try:
            with np.load(self._state_file, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                restored = [jnp.asarray(stored[f"leaf_{index}"]) for index in range(len(leaves))]
        except (
            OSError,
            ValueError,
            LookupError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
            NotImplementedError,
        ) as error:
            raise ResumeError(f"{self._state_file} is damaged ({error})") from None
        if about["fingerprint"] != self._fingerprint:
            raise ResumeError(f"{self._state_file} belongs to a run with other options or another text")
        self.state = jax.tree.unflatten(structure, restored)
        self.done, self.seconds = about["done"], about["seconds"]
        self.log, self._losses = about["log"], about["losses"]
