"""On-device sampling, with options and a seed per sequence."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grok1.ops.sampling import filter_logits
from grok1.request import SamplingOptions, TokenLogprobs

_DEVICE_OPTIONS = [field for field in dataclasses.fields(SamplingOptions) if "dtype" in field.metadata]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """The sampling options of a batch.

    Attributes:
        options: array `[batch]` of each field of `SamplingOptions` that has a dtype in its metadata, by name.
        seed: uint32 `[batch, 2]`, high and low word of each seed.
    """

    options: OrderedDict[str, Any]
    seed: Any

    @classmethod
    def empty(cls, batch: int) -> SamplingState:
        """Return NumPy arrays with greedy sampling for every sequence."""
        neutral = OrderedDict(
            (field.name, np.full(batch, field.metadata["neutral"], field.metadata["dtype"]))
            for field in _DEVICE_OPTIONS
        )
        return cls(neutral, np.zeros((batch, 2), np.uint32))

    def put(self, row: int, options: SamplingOptions, seed: int) -> None:
        """Store the options and seed of one sequence in place; requires NumPy arrays."""
        for name, array in self.options.items():
            array[row] = getattr(options, name)
        self.seed[row] = seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledTokens:
    """The next token of each sequence of a batch, and log-probabilities under the model's unmodified distribution.

    Attributes:
        tokens: int32 `[batch]`.
        logprobs: float32 `[batch]`, log-probabilities of `tokens`.
        top_tokens: int32 `[batch, K]`, the most likely tokens in descending order.
        top_logprobs: float32 `[batch, K]`, log-probabilities of `top_tokens`.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array

    def entry(self, index: int, top: int) -> TokenLogprobs:
        """Return the log-probabilities of one token and of the `top` most likely ones; requires NumPy arrays."""
        best = zip(self.top_tokens[index, :top].tolist(), self.top_logprobs[index, :top].tolist(), strict=True)
        return TokenLogprobs(float(self.logprobs[index]), tuple(best))


def _apply_temperature(logits: jax.Array, options: Mapping[str, jax.Array]) -> jax.Array:
    return logits / jnp.maximum(options["temperature"], 1e-6)[:, None]


def _filter(logits: jax.Array, options: Mapping[str, jax.Array]) -> jax.Array:
    top_k, top_p, min_p = options["top_k"], options["top_p"], options["min_p"]
    return lax.cond(
        jnp.any((top_k > 0) | (top_p < 1) | (min_p > 0)),
        lambda: filter_logits(logits, top_k, top_p, min_p),
        lambda: logits,
    )


_TRANSFORMATIONS: list[Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array]] = [_apply_temperature, _filter]
"""Transformations of the logits `[batch, vocab]` of sequences that are not greedy, applied in this order."""


def sample(logits: jax.Array, state: SamplingState, positions: jax.Array, top_logprobs: int) -> SampledTokens:
    """Sample a token for each sequence.

    A token's random numbers depend only on its sequence's seed and its position.

    Args:
        logits: float32 `[batch, vocab]`.
        state: sampling options of the sequences.
        positions: int32 `[batch]`, positions of the sampled tokens.
        top_logprobs: number of most likely tokens to report.
    """
    temperature = state.options["temperature"]

    def draw() -> jax.Array:
        transformed = logits
        for transform in _TRANSFORMATIONS:
            transformed = transform(transformed, state.options)
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(state.seed, impl="threefry2x32"), positions)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        return jnp.argmax(transformed + noise, axis=-1).astype(jnp.int32)

    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)
    tokens = jnp.where(temperature > 0, drawn, greedy)
    return token_logprobs(logits, tokens, top_logprobs)


def token_logprobs(logits: jax.Array, tokens: jax.Array, top_logprobs: int) -> SampledTokens:
    """Return the log-probabilities of given tokens and of the most likely ones.

    Args:
        logits: float32 `[batch, vocab]`.
        tokens: int32 `[batch]`.
        top_logprobs: number of most likely tokens to report.
    """
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - normaliser
    best, best_tokens = lax.top_k(logits, top_logprobs)
    return SampledTokens(tokens, chosen[:, 0], best_tokens.astype(jnp.int32), best - normaliser)
