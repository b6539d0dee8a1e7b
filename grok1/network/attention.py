"""Grouped-query attention over the KV cache."""

from __future__ import annotations

import haiku as hk
import jax

from grok1.network.kv_cache import KVCache
from grok1.network.layers import QuantizedLinear, rotary_embedding
from grok1.network.shard import ModelShard


class MultiHeadAttention(hk.Module):
    """Grouped-query attention with rotary position embedding and soft-capped attention logits."""

    def __init__(self, shard: ModelShard, name: str = "multi_head_attention"):
        super().__init__(name=name)
        self.shard = shard

    def __call__(
        self,
        x: jax.Array,
        cache: KVCache,
        layer: jax.Array | int,
        positions: jax.Array,
        slots: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Write the keys and values of `x` to the cache, and attend to all cached positions up to each one.

        Args:
            x: `[batch, seq, emb]`.
            cache: cache of all layers.
            layer: index of the layer.
            positions: int32 `[batch, seq]`, negative for padding.
            slots: int32 `[batch]`, slot of each row; by default row i uses slot i.

        Returns:
            float32 `[batch, seq, emb]`, and the updated cache.
        """
        config, shard, kernels = self.shard.config, self.shard, self.shard.kernels
        layers, emb, key_size = config.num_layers, config.emb_size, config.key_size
        q_size, kv_size = shard.num_q_heads * key_size, shard.num_kv_heads * key_size

        def heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(*x.shape[:2], -1, key_size)  # [batch, seq, heads, key]

        sizes = {"query": q_size, "key": kv_size, "value": kv_size}
        weights = [QuantizedLinear((layers, emb, size), 1, name)() for name, size in sizes.items()]
        query, key, value = map(heads, kernels.matmuls(x.reshape(-1, emb), weights, (layer,)))
        cache = cache.write(
            layer, rotary_embedding(key, positions), value, positions, slots, kernels.keeps_cache_layout
        )
        attended = kernels.attention(
            rotary_embedding(query, positions),
            cache.keys,
            cache.values,
            layer,
            positions,
            slots,
            multiplier=config.attn_output_multiplier,
            cap=config.attn_logit_cap,
        )
        attended = (attended / shard.attention_copies).reshape(*x.shape[:2], q_size).astype(shard.dtype)
        linear = QuantizedLinear((layers, q_size, emb), shard.scale_groups, name="linear")()
        output = kernels.matmul(attended.reshape(-1, q_size), linear, (layer,))
        return shard.sum_over_shards(output.reshape(x.shape)), cache
