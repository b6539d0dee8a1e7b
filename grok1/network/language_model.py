"""The decoder layers and the language model.

Module and parameter names match the release, except that its `decoder_layer_0` to `decoder_layer_63` are one module,
`decoder_layer`. Its parameters have a leading layer axis, so that one layer is compiled and run in a loop.
"""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from grok1.network.attention import MultiHeadAttention
from grok1.network.experts import MixtureOfExperts, Router
from grok1.network.kv_cache import KVCache
from grok1.network.layers import RMSNorm
from grok1.network.shard import ModelShard


class DecoderLayer(hk.Module):
    """Attention and experts, each with a norm before and after it, added to the residual stream."""

    def __init__(self, shard: ModelShard, name: str = "decoder_layer"):
        super().__init__(name=name)
        self.shard = shard

    def __call__(
        self,
        h: jax.Array,
        cache: KVCache,
        layer: jax.Array | int,
        positions: jax.Array,
        slots: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Apply one layer to the residual stream `h`, float32 `[batch, seq, emb]`."""
        shard, emb = self.shard, self.shard.config.emb_size

        def norm(x: jax.Array) -> jax.Array:  # Haiku names the four calls rms_norm, rms_norm_1, _2, _3
            return RMSNorm(emb, shard.config.num_layers, name="rms_norm")(x, layer)

        attended, cache = MultiHeadAttention(shard)(norm(h).astype(shard.dtype), cache, layer, positions, slots)
        h = h + norm(attended)
        x = norm(h).reshape(-1, emb)
        probabilities, experts = Router(shard)(x, layer)
        valid = positions.reshape(-1) >= 0
        mixed = MixtureOfExperts(shard)(x.astype(shard.dtype), probabilities, experts, layer, valid)
        return h + norm(mixed.reshape(h.shape)), cache


class Transformer(hk.Module):
    """The stack of decoder layers."""

    def __init__(self, shard: ModelShard, name: str = "transformer"):
        super().__init__(name=name)
        self.shard = shard

    def __call__(
        self, h: jax.Array, cache: KVCache, positions: jax.Array, slots: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Apply all layers to the residual stream `h`, float32 `[batch, seq, emb]`."""
        decoder_layer = DecoderLayer(self.shard)
        if hk.running_init():
            return decoder_layer(h, cache, 0, positions, slots)

        def step(layer: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
            return decoder_layer(*carry, layer, positions, slots)

        return hk.fori_loop(0, self.shard.config.num_layers, step, (h, cache))


class InOutEmbed(hk.Module):
    """Tied embedding matrix, which embeds tokens and, transposed, computes the logits."""

    def __init__(self, shard: ModelShard, name: str = "in_out_embed"):
        super().__init__(name=name)
        self.shard = shard

    @property
    def embeddings(self) -> jax.Array:
        """The shard's rows of the matrix, `[vocab of a shard, emb]` in the dtype of activations."""
        shape = (self.shard.vocab_size, self.shard.config.emb_size)
        return hk.get_parameter("embeddings", shape, self.shard.dtype, init=jnp.zeros)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embed int32 `[batch, seq]` as float32 `[batch, seq, emb]`."""
        rows = tokens - self.shard.first_token()
        mine = (rows >= 0) & (rows < self.shard.vocab_size)
        embedded = self.embeddings[jnp.where(mine, rows, 0)].astype(jnp.float32)
        return self.shard.sum_over_shards(jnp.where(mine[..., None], embedded, 0.0))

    def logits(self, x: jax.Array) -> jax.Array:
        """Compute float32 logits `[rows, vocab]` from float32 `[rows, emb]`."""
        logits = self.shard.kernels.output_logits(x.astype(self.shard.dtype), self.embeddings)
        return self.shard.gather_vocabulary(logits)


class LanguageModel(hk.Module):
    """Causal mixture-of-experts decoder that computes next-token logits."""

    def __init__(self, transformer: Transformer, shard: ModelShard, name: str = "language_model"):
        super().__init__(name=name)
        self.transformer = transformer
        self.shard = shard

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: KVCache,
        every_position: bool,
        slots: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Process tokens and return the logits of the next ones.

        Args:
            tokens: int32 `[batch, seq]`.
            positions: int32 `[batch, seq]`, consecutive; negative for padding, which follows the tokens.
            cache: keys and values of all earlier positions.
            every_position: whether to return logits for every token or only for the last of each row.
            slots: int32 `[batch]`, slot of each row; by default row i uses slot i.

        Returns:
            float32 logits, `[batch, seq, vocab]` or `[batch, vocab]`, undefined for padding; and the updated cache.
        """
        config = self.shard.config
        in_out_embed = InOutEmbed(self.shard)
        h = in_out_embed.embed(tokens) * config.embedding_multiplier_scale
        h, cache = self.transformer(h, cache, positions, slots)
        if not every_position:
            last = jnp.maximum(jnp.sum(positions >= 0, axis=1) - 1, 0)
            h = jnp.take_along_axis(h, last[:, None, None], axis=1)
        h = RMSNorm(config.emb_size)(h)
        logits = in_out_embed.logits(h.reshape(-1, config.emb_size)) * config.output_multiplier_scale
        if every_position:
            logits = logits.reshape(*tokens.shape, -1)
        return logits, cache


def network(shard: ModelShard) -> hk.Transformed:
    """Return one shard's network as a pair of pure functions.

    `init(None, *arguments)` creates placeholder parameters with the right shapes and dtypes, and
    `apply(params, *arguments)` runs the network; `arguments` are those of `LanguageModel.__call__`. With several
    shards, call `apply` inside `jax.shard_map` over `shard.axis`.
    """

    def forward(*arguments: Any) -> tuple[jax.Array, KVCache]:
        return LanguageModel(Transformer(shard), shard)(*arguments)

    return hk.without_apply_rng(hk.transform(forward))
