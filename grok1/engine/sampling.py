"""Sampling the next token of each sequence on the device, with its own options and random stream."""

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
        options: `[batch]` for each field of `SamplingOptions` that has a dtype for the device.
        seed: uint32 `[batch, 2]`, high and low word.
    """

    options: OrderedDict[str, Any]
    seed: Any

    @classmethod
    def empty(cls, batch: int) -> SamplingState:
        """Greedy sampling for every sequence of a batch, as NumPy arrays."""
        neutral = OrderedDict(
            (field.name, np.full(batch, field.metadata["neutral"], field.metadata["dtype"]))
            for field in _DEVICE_OPTIONS
        )
        return cls(neutral, np.zeros((batch, 2), np.uint32))

    def put(self, row: int, options: SamplingOptions, seed: int) -> None:
        """Store the options and the seed of one sequence; the arrays must be NumPy's."""
        for name, array in self.options.items():
            array[row] = getattr(options, name)
        self.seed[row] = seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledTokens:
    """The next token of each sequence of a batch.

    Log-probabilities are those of the model's own distribution, before the transformations of the logits.

    Attributes:
        tokens: int32 `[batch]`.
        logprobs: float32 `[batch]`, of the sampled tokens.
        top_tokens: int32 `[batch, K]`, the likeliest tokens, likeliest first.
        top_logprobs: float32 `[batch, K]`.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array

    def entry(self, index: int, top: int) -> TokenLogprobs:
        """The log-probabilities of one token and of the `top` likeliest in its place; the arrays must be NumPy's."""
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
"""What sampling options do to the logits `[batch, vocab]` of sequences that are not greedy, in this order."""


def sample(logits: jax.Array, state: SamplingState, positions: jax.Array, top_logprobs: int) -> SampledTokens:
    """Sample a token for each sequence.

    The random numbers of a token depend only on the seed of its sequence and its position.

    Args:
        logits: float32 `[batch, vocab]`.
        state: the sequences' options.
        positions: int32 `[batch]`, positions of the sampled tokens.
        top_logprobs: how many of the likeliest tokens to report.
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
    """Log-probabilities of given tokens and of the likeliest ones.

    Args:
        logits: float32 `[batch, vocab]`.
        tokens: int32 `[batch]`.
        top_logprobs: how many of the likeliest tokens to report.
    """
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - normaliser
    best, best_tokens = lax.top_k(logits, top_logprobs)
    return SampledTokens(tokens, chosen[:, 0], best_tokens.astype(jnp.int32), best - normaliser)
