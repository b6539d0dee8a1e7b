"""The decoder layers and the language model around them.

Module and parameter names are the release's, with one difference: its `decoder_layer_0` to `decoder_layer_63` are
one module, `decoder_layer`, whose parameters have a leading axis of layers, so that the loop over the layers is
compiled once.
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
    """Attention and experts, each between two norms and added to the residual stream."""

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
        """One layer over the residual stream `h`, float32 `[batch, seq, emb]`."""
        shard, emb = self.shard, self.shard.config.emb_size

        def norm(x: jax.Array) -> jax.Array:  # Haiku numbers the four: rms_norm, rms_norm_1, _2, _3
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
        """All layers over the residual stream `h`, float32 `[batch, seq, emb]`."""
        decoder_layer = DecoderLayer(self.shard)
        if hk.running_init():
            return decoder_layer(h, cache, 0, positions, slots)

        def step(layer: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
            return decoder_layer(*carry, layer, positions, slots)

        return hk.fori_loop(0, self.shard.config.num_layers, step, (h, cache))


class InOutEmbed(hk.Module):
    """The matrix that embeds tokens and, transposed, gives the logits."""

    def __init__(self, shard: ModelShard, name: str = "in_out_embed"):
        super().__init__(name=name)
        self.shard = shard

    @property
    def embeddings(self) -> jax.Array:
        """`[vocab of a shard, emb]` in the activations' dtype."""
        shape = (self.shard.vocab_size, self.shard.config.emb_size)
        return hk.get_parameter("embeddings", shape, self.shard.dtype, init=jnp.zeros)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 `[batch, seq]` to float32 `[batch, seq, emb]`."""
        rows = tokens - self.shard.first_token()
        mine = (rows >= 0) & (rows < self.shard.vocab_size)
        embedded = self.embeddings[jnp.where(mine, rows, 0)].astype(jnp.float32)
        return self.shard.sum_over_shards(jnp.where(mine[..., None], embedded, 0.0))

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 `[rows, emb]` to float32 `[rows, vocab]`."""
        logits = self.shard.kernels.output_logits(x.astype(self.shard.dtype), self.embeddings)
        return self.shard.gather_vocabulary(logits)


class LanguageModel(hk.Module):
    """Next-token logits of a causal decoder with experts."""

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
        """Read tokens into the cache and return the logits of the next.

        Args:
            tokens: int32 `[batch, seq]`.
            positions: int32 `[batch, seq]`, consecutive; negative for padding, which follows the tokens.
            cache: keys and values of all earlier positions.
            every_position: whether to return logits for every token or for each row's last.
            slots: int32 `[batch]`, the slot of each row; by default row i belongs to slot i.

        Returns:
            float32 logits, `[batch, seq, vocab]` or `[batch, vocab]`, undefined for padding; and the cache.
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
    """The network of one shard as two pure functions; several shards run inside `jax.shard_map` over `shard.axis`.

    `init` takes None and the arguments of `LanguageModel.__call__`, and makes parameters of the right shapes and dtypes
    but of no useful values; `apply` takes parameters and those arguments.
    """

    def forward(*arguments: Any) -> tuple[jax.Array, KVCache]:
        return LanguageModel(Transformer(shard), shard)(*arguments)

    return hk.without_apply_rng(hk.transform(forward))
