"""Evaluation of a model on a text with the trainer's forward pass.

Run as a program, it shows how typical implementation mistakes change a checkpoint's perplexity and logits:

    PYTHONPATH=scripts python -m bard_training.evaluate CHECKPOINT TEXT
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np

from bard_training import corpus
from bard_training.export import read
from bard_training.model import FAITHFUL, LAYER, Params, Variant, forward
from grok1.config import ModelConfig

BATCH_TOKENS = 8192


@functools.partial(jax.jit, static_argnums=(0, 3))
def _logprobs(config: ModelConfig, params: Params, windows: jax.Array, variant: Variant) -> jax.Array:
    logits, _ = forward(config, params, windows[:, :-1], variant)
    predicted = jnp.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    return predicted - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _squares(
    config: ModelConfig, params: Params, windows: jax.Array, variant: Variant, mistaken: Params
) -> tuple[jax.Array, jax.Array]:
    expected, _ = forward(config, params, windows[:, :-1])
    found, _ = forward(config, mistaken, windows[:, :-1], variant)
    return jnp.sum((found - expected) ** 2), jnp.sum(expected**2)


def _batches(tokens: np.ndarray, context: int) -> Iterator[tuple[jax.Array, int]]:
    """Yield batches of windows of a text, int32 `[batch, context + 1]`, with the number of windows before padding."""
    stride = context // 2
    count = max(0, math.ceil((len(tokens) - 1 - context) / stride)) + 1
    padded = np.zeros((count - 1) * stride + context + 1, np.int32)
    padded[: len(tokens)] = tokens
    batch = min(count, max(1, BATCH_TOKENS // context))
    for first in range(0, count, batch):
        rows = np.minimum(np.arange(first, first + batch), count - 1)
        yield jnp.asarray(padded[rows[:, None] * stride + np.arange(context + 1)]), min(batch, count - first)


def token_logprobs(
    config: ModelConfig, params: Params, tokens: np.ndarray, context: int, variant: Variant = FAITHFUL
) -> np.ndarray:
    """Return the log-probability of each token except the first, in nats, float64 `[tokens - 1]`.

    The text is evaluated in windows of `context` tokens (an even number) that start half a context apart. Each token is
    scored in the first window that contains it, so tokens after the first window have at least half a context.
    """
    parts = [
        np.asarray(_logprobs(config, params, windows, variant), np.float64)[:count]
        for windows, count in _batches(tokens, context)
    ]
    logprobs = np.concatenate(parts)
    return np.concatenate([logprobs[0], logprobs[1:, context // 2 :].reshape(-1)])[: len(tokens) - 1]


def logit_distance(
    config: ModelConfig, params: Params, tokens: np.ndarray, context: int, mistaken: Params, variant: Variant
) -> float:
    """Return the relative error of the logits caused by a mistake: norm of the difference over norm of the logits."""
    difference, norm = 0.0, 0.0
    for windows, _ in _batches(tokens, context):
        sums = _squares(config, params, windows, variant, mistaken)
        difference, norm = difference + float(sums[0]), norm + float(sums[1])
    return math.sqrt(difference / norm)


def bits_per_byte(logprobs: np.ndarray, num_bytes: int) -> float:
    """Return the negative log-probability of the scored tokens, in bits per byte of the text."""
    return float(-np.sum(logprobs) / math.log(2) / num_bytes)


def mistakes(params: Params, num_layers: int) -> Iterator[tuple[str, Params, Variant]]:
    """Yield typical implementation mistakes as (name, changed parameters, forward pass variant)."""

    def reordered(order: list[int]) -> Params:
        return {path: array[jnp.asarray(order)] if path.startswith(LAYER) else array for path, array in params.items()}

    def exchanged(first: str, second: str) -> Params:
        return {**params, LAYER + first: params[LAYER + second], LAYER + second: params[LAYER + first]}

    yield "none", params, FAITHFUL
    yield "layers in reverse order", reordered(list(reversed(range(num_layers)))), FAITHFUL
    file_order = sorted(range(num_layers), key=str)
    yield "layers in the order of the files (0, 1, 10, 11, 2, ...)", reordered(file_order), FAITHFUL
    yield "`linear` and `linear_v` exchanged", exchanged("moe/linear/w", "moe/linear_v/w"), FAITHFUL
    yield "SiLU instead of GELU", params, Variant(gate="silu")
    names = ("before attention", "after attention", "before the experts", "after the experts")
    for number, name in enumerate(names):
        present = tuple(other != number for other in range(4))
        yield f"no norm {name}", params, Variant(norms=present)
    yield "attention logits not capped", params, Variant(cap=False)
    yield "rotary embedding pairs neighbours instead of halves", params, Variant(interleaved=True)
    yield "output multiplier 10 % too large", params, Variant(output_multiplier=1.1)
    yield "output multiplier 10 % too small", params, Variant(output_multiplier=0.9)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("text", type=click.Path(path_type=Path))
def main(checkpoint: Path, text: Path) -> None:
    """Print the effect of typical mistakes on the perplexity and the logits of CHECKPOINT on TEXT."""
    config, params = read(checkpoint)
    content = corpus.read_text(text)
    tokenizer = (checkpoint / "tokenizer.model").read_bytes()
    tokens, num_bytes = corpus.encode(tokenizer, content), len(content.encode())
    context = config.sequence_len
    click.echo("| mistake | perplexity | bits per byte | distance in logits |\n|---|---|---|---|")
    for name, misread, variant in mistakes(params, config.num_layers):
        logprobs = token_logprobs(config, misread, tokens, context, variant)
        distance = logit_distance(config, params, tokens, context, misread, variant)
        perplexity, bits = math.exp(-np.mean(logprobs)), bits_per_byte(logprobs, num_bytes)
        click.echo(f"| {name} | {perplexity:.4f} | {bits:.4f} | {distance:.4f} |")


if __name__ == "__main__":
    main()
