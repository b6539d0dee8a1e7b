"""Grok-1's architecture in plain, differentiable float32 JAX, for training `bard`.

This implementation shares no code with `grok1.network`, so agreement between the two is evidence that both are correct.
Parameters are a flat dict from the release's parameter paths, without layer numbers (`decoder_layer/moe/linear/w`), to
float32 arrays. Layer parameters are stacked: `[layers, ...]`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grok1.config import ModelConfig

EMBEDDINGS = "language_model/in_out_embed/embeddings"
FINAL_NORM = "language_model/rms_norm/scale"
LAYER = "decoder_layer/"

QUERY_BLOCK = 64
"""Queries per attention block. A block uses only the keys up to its last query, which skips most masked logits."""

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Variant:
    """Forward pass with deviations from the architecture, to show the effect of typical mistakes.

    Attributes:
        gate: activation function of the experts, "gelu" or "silu".
        norms: whether each of a layer's four norms, scale included, is applied.
        cap: whether attention logits are capped.
        output_multiplier: factor applied to the output multiplier of the config.
        interleaved: whether the rotary embedding pairs neighbours instead of halves.
    """

    gate: str = "gelu"
    norms: tuple[bool, bool, bool, bool] = (True, True, True, True)
    cap: bool = True
    output_multiplier: float = 1.0
    interleaved: bool = False


FAITHFUL = Variant()


class RouterStatistics(NamedTuple):
    """Router statistics of a forward pass.

    Attributes:
        shares: fraction of the selections that went to each expert, float32 `[layers, experts]`.
        balance_loss: load-balancing loss of Switch Transformers (Fedus et al., 2021), mean over layers; 1 if balanced.
        z_loss: mean squared log-partition of the routers (ST-MoE; Zoph et al., 2022).
    """

    shares: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array


def init_params(config: ModelConfig, seed: int) -> Params:
    """Return random initial parameters, scaled for unit-variance activations and small residual branches."""
    rng = np.random.default_rng(seed)
    layers, emb, experts, ffn = config.num_layers, config.emb_size, config.num_experts, config.ffn_size

    def normal(*shape: int, std: float) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(std))

    def matrices(*shape: int) -> jax.Array:
        return normal(layers, *shape, std=shape[-2] ** -0.5)

    params = {
        EMBEDDINGS: normal(config.vocab_size, emb, std=1 / config.embedding_multiplier_scale),
        FINAL_NORM: jnp.ones(emb),
        LAYER + "multi_head_attention/query/w": matrices(emb, config.q_size),
        LAYER + "multi_head_attention/key/w": matrices(emb, config.kv_size),
        LAYER + "multi_head_attention/value/w": matrices(emb, config.kv_size),
        LAYER + "multi_head_attention/linear/w": matrices(config.q_size, emb),
        LAYER + "router/w": normal(layers, emb, experts, std=0.02),
        LAYER + "moe/linear/w": matrices(experts, emb, ffn),
        LAYER + "moe/linear_v/w": matrices(experts, emb, ffn),
        LAYER + "moe/linear_1/w": matrices(experts, ffn, emb),
    }
    for number, scale in enumerate((1.0, (2 * layers) ** -0.5) * 2):
        params[LAYER + norm_name(number)] = jnp.full((layers, emb), scale, jnp.float32)
    return params


def norm_name(number: int) -> str:
    """Return the path of a norm's scale in its layer.

    The norms are numbered: before (0) and after (1) attention, before (2) and after (3) the experts.
    """
    return "rms_norm/scale" if number == 0 else f"rms_norm_{number}/scale"


def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    variant: Variant = FAITHFUL,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, RouterStatistics]:
    """Compute the logits of the next token at each position.

    Args:
        config: the model's config.
        params: float32 arrays, as `init_params` returns them.
        tokens: int32 `[batch, seq]`.
        variant: a deviation from the architecture.
        dropout_rate: dropout rate of the embeddings and of the output of each residual branch.
        dropout_key: random key for dropout; without one, nothing is dropped.

    Returns:
        Float32 logits `[batch, seq, vocab]` and router statistics.
    """
    eps = config.rms_norm_eps
    cos, sin = rotary_angles(tokens.shape[1], config.key_size, config.rotary_base)
    branches = itertools.count()

    def dropped(x: jax.Array) -> jax.Array:
        return x if dropout_key is None else dropout(x, dropout_rate, jax.random.fold_in(dropout_key, next(branches)))

    h = dropped(params[EMBEDDINGS][tokens] * config.embedding_multiplier_scale)  # [batch, seq, emb]
    routing = []
    for weights in layer_params(params):

        def norm(number: int, x: jax.Array, weights: Params = weights) -> jax.Array:
            return rms_norm(x, weights[norm_name(number)], eps) if variant.norms[number] else x

        h = h + dropped(norm(1, attention(config, weights, norm(0, h), cos, sin, variant)))
        rows = norm(2, h).reshape(-1, config.emb_size)  # [batch * seq, emb]
        mixed, routed = mixture_of_experts(config, weights, rows, variant)
        h = h + dropped(norm(3, mixed.reshape(h.shape)))
        routing.append(routed)
    h = rms_norm(h, params[FINAL_NORM], eps)
    logits = h @ params[EMBEDDINGS].T * (config.output_multiplier_scale * variant.output_multiplier)
    shares, balance, z_loss = map(jnp.stack, zip(*routing, strict=True))
    return logits, RouterStatistics(shares, jnp.mean(balance), jnp.mean(z_loss))


def layer_params(params: Params) -> list[Params]:
    """Return the parameters of each layer, keyed by their path in the layer."""
    stacks = {path.removeprefix(LAYER): jnp.unstack(stack) for path, stack in params.items() if path.startswith(LAYER)}
    return [dict(zip(stacks, arrays, strict=True)) for arrays in zip(*stacks.values(), strict=True)]


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Set a random fraction of the values to 0 and scale the others to keep the mean (Srivastava et al., 2014).

    The rate is rounded to a multiple of 1/256, because one random byte is drawn per value.
    """
    threshold = round(rate * 256)
    kept = jax.random.bits(key, x.shape, jnp.uint8) >= threshold
    return jnp.where(kept, x * (256 / (256 - threshold)), 0.0)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Apply RMSNorm over the last axis (Zhang & Sennrich, 2019)."""
    return scale * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def rotary_angles(length: int, key_size: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Return cosine and sine of the rotary embedding's angles, each `[length, 1, key_size / 2]`."""
    frequencies = base ** -(np.arange(0, key_size, 2) / key_size)
    angles = np.outer(np.arange(length), frequencies)[:, None]
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """Apply the rotary position embedding (Su et al., 2021) to `[batch, seq, heads, key]`.

    Values of the first half are paired with those of the second half or, if `interleaved`, with their neighbours.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(
    config: ModelConfig, weights: Params, x: jax.Array, cos: jax.Array, sin: jax.Array, variant: Variant
) -> jax.Array:
    """Compute causal grouped-query attention with capped logits; input and output are `[batch, seq, emb]`."""
    batch, seq, _ = x.shape
    kv_heads, key_size = config.num_kv_heads, config.key_size

    def heads(name: str) -> jax.Array:
        return (x @ weights[f"multi_head_attention/{name}/w"]).reshape(batch, seq, -1, key_size)

    query = rotate(heads("query"), cos, sin, variant.interleaved).reshape(batch, seq, kv_heads, -1, key_size)
    query = query.transpose(0, 2, 3, 1, 4)  # [batch, kv_heads, group, seq, key]
    key = rotate(heads("key"), cos, sin, variant.interleaved).transpose(0, 2, 3, 1)  # [batch, kv_heads, key, seq]
    value = heads("value").transpose(0, 2, 1, 3)  # [batch, kv_heads, seq, key]

    attended = []
    for start in range(0, seq, QUERY_BLOCK):
        block = query[:, :, :, start : start + QUERY_BLOCK]
        *lead, group, rows, _ = block.shape
        end = start + rows
        logits = block.reshape(*lead, group * rows, key_size) @ key[..., :end] * config.attn_output_multiplier
        if variant.cap:
            logits = config.attn_logit_cap * jnp.tanh(logits / config.attn_logit_cap)
        causal = np.arange(end) <= np.arange(start, end)[:, None]
        logits = jnp.where(causal, logits.reshape(*lead, group, rows, end), -jnp.inf)
        probabilities = jax.nn.softmax(logits, axis=-1).reshape(*lead, group * rows, end)
        attended.append((probabilities @ value[..., :end, :]).reshape(block.shape))
    joined = jnp.concatenate(attended, axis=3).transpose(0, 3, 1, 2, 4)  # [batch, seq, kv_heads, group, key]
    return joined.reshape(batch, seq, -1) @ weights["multi_head_attention/linear/w"]


def mixture_of_experts(
    config: ModelConfig, weights: Params, x: jax.Array, variant: Variant
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Compute the mixture of experts.

    Every expert processes every row; experts that were not selected have weight 0. For matrices this small, this is as
    fast as sorting the rows by expert, and no row is dropped.

    Args:
        config: the model's config.
        weights: parameters of the layer.
        x: float32 `[rows, emb]`.
        variant: a deviation from the architecture.

    Returns:
        The output `[rows, emb]`, and the fields of `RouterStatistics` for this layer.
    """
    num_experts, emb, ffn = config.num_experts, config.emb_size, config.ffn_size
    router_logits = x @ weights["router/w"]  # [rows, experts]
    probabilities = jax.nn.softmax(router_logits, axis=-1)
    _, indices = jax.lax.top_k(probabilities, config.num_selected_experts)
    selected = jnp.sum(jax.nn.one_hot(indices, num_experts), axis=1)  # [rows, experts], 1 where selected

    def inner(name: str) -> jax.Array:
        matrix = weights[f"moe/{name}/w"].transpose(1, 0, 2).reshape(emb, num_experts * ffn)
        return (x @ matrix).reshape(-1, num_experts, ffn)  # [rows, experts, ffn]

    gate = inner("linear")
    gate = jax.nn.silu(gate) if variant.gate == "silu" else jax.nn.gelu(gate, approximate=True)
    hidden = gate * inner("linear_v") * (selected * probabilities)[..., None]
    mixed = hidden.reshape(-1, num_experts * ffn) @ weights["moe/linear_1/w"].reshape(num_experts * ffn, emb)

    shares = jnp.mean(selected, axis=0) / config.num_selected_experts
    balance = num_experts * jnp.sum(shares * jnp.mean(probabilities, axis=0))
    z_loss = jnp.mean(jax.nn.logsumexp(router_logits, axis=-1) ** 2)
    return mixed, (shares, balance, z_loss)


def expert_shares(config: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    """Return the fraction of router selections that each expert receives on a text, float64 `[layers, experts]`.

    Args:
        config: the model's config.
        params: its parameters.
        tokens: int32 `[tokens]`; an incomplete last context is ignored.
    """
    statistics = jax.jit(lambda batch: forward(config, params, batch)[1].shares)
    count = max(1, len(tokens) // config.sequence_len)
    batches = tokens[: count * config.sequence_len].reshape(count, -1)
    return np.mean([np.asarray(statistics(jnp.asarray(row[None])), np.float64) for row in batches], axis=0)
