"""Drawing the next token of each sequence on the device, each with options and a random stream of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grok1.ops.sampling import filter_logits
from grok1.request import SamplingOptions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """The sampling options of a batch.

    Attributes:
        temperature: float32 `[batch]`; 0 is greedy.
        top_k: int32 `[batch]`; 0 is off.
        top_p: float32 `[batch]`; 1 is off.
        min_p: float32 `[batch]`; 0 is off.
        seed: uint32 `[batch, 2]`, high and low word.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array

    @classmethod
    def of(cls, options: SamplingOptions, seed: int) -> SamplingState:
        """The state of one sequence, as arrays with a leading axis of 1."""
        values: dict[str, Any] = {
            "temperature": np.asarray([options.temperature], np.float32),
            "top_k": np.asarray([options.top_k], np.int32),
            "top_p": np.asarray([options.top_p], np.float32),
            "min_p": np.asarray([options.min_p], np.float32),
            "seed": np.asarray([[seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF]], np.uint32),
        }
        return cls(**values)

    @classmethod
    def empty(cls, batch: int) -> SamplingState:
        """Greedy for every sequence of a batch, as NumPy arrays."""
        return cls(
            temperature=np.zeros(batch, np.float32),  # type: ignore[arg-type]
            top_k=np.zeros(batch, np.int32),  # type: ignore[arg-type]
            top_p=np.ones(batch, np.float32),  # type: ignore[arg-type]
            min_p=np.zeros(batch, np.float32),  # type: ignore[arg-type]
            seed=np.zeros((batch, 2), np.uint32),  # type: ignore[arg-type]
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledTokens:
    """The next token of each sequence of a batch.

    Log-probabilities are the model's own: of its logits before temperature and filters.

    Attributes:
        tokens: int32 `[batch]`.
        logprobs: float32 `[batch]`, of the chosen tokens.
        top_tokens: int32 `[batch, K]`, the likeliest tokens, likeliest first.
        top_logprobs: float32 `[batch, K]`.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


def sample(logits: jax.Array, state: SamplingState, positions: jax.Array, top_logprobs: int) -> SampledTokens:
    """Chooses a token for each sequence.

    The random numbers of a token depend on its sequence's seed and its position alone.

    Args:
        logits: float32 `[batch, vocab]`.
        state: the sequences' options.
        positions: int32 `[batch]`, the positions that the chosen tokens will have.
        top_logprobs: how many of the likeliest tokens to report.
    """

    def draw() -> jax.Array:
        warmed = logits / jnp.maximum(state.temperature, 1e-6)[:, None]
        filtered = jnp.any((state.top_k > 0) | (state.top_p < 1) | (state.min_p > 0))
        warmed = lax.cond(
            filtered, lambda: filter_logits(warmed, state.top_k, state.top_p, state.min_p), lambda: warmed
        )
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(state.seed, impl="threefry2x32"), positions)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        return jnp.argmax(warmed + noise, axis=-1).astype(jnp.int32)

    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = lax.cond(jnp.any(state.temperature > 0), draw, lambda: greedy)
    tokens = jnp.where(state.temperature > 0, drawn, greedy)
    return token_logprobs(logits, tokens, top_logprobs)


def token_logprobs(logits: jax.Array, tokens: jax.Array, top_logprobs: int) -> SampledTokens:
    """The log-probabilities of given tokens and of the likeliest ones.

    Args:
        logits: float32 `[batch, vocab]`.
        tokens: int32 `[batch]`.
        top_logprobs: how many of the likeliest tokens to report.
    """
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - normaliser
    best, best_tokens = lax.top_k(logits, top_logprobs)
    return SampledTokens(tokens, chosen[:, 0], best_tokens.astype(jnp.int32), best - normaliser)
