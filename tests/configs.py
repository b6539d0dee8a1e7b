"""The models of the tests. Tests that share one also share its checkpoint and its compiled programs."""

import dataclasses

from grok1.config import ModelConfig

# Two layers and a short context.
SMALL = ModelConfig(
    vocab_size=64,
    emb_size=48,
    key_size=4,
    num_q_heads=8,
    num_kv_heads=4,
    num_layers=2,
    widening_factor=2,
    num_experts=4,
    sequence_len=48,
    attn_output_multiplier=0.5,
)

# A context longer than two chunks. All experts are selected, so that no rounding changes which.
LONG = dataclasses.replace(SMALL, sequence_len=1100, num_experts=2)

# A vocabulary large enough for a tokenizer.
TEXT = ModelConfig(
    vocab_size=512,
    emb_size=64,
    key_size=8,
    num_q_heads=8,
    num_kv_heads=4,
    num_layers=2,
    widening_factor=3,
    num_experts=4,
    sequence_len=64,
    attn_output_multiplier=0.35,
)

# All experts are selected, so that no rounding changes which.
TEXT_ALL_EXPERTS = dataclasses.replace(TEXT, num_experts=2)

# Divides into 16 shards, which then share key/value heads and scale groups. 12 layers show the order of files.
SHARDED = ModelConfig(
    vocab_size=32,
    emb_size=16,
    key_size=2,
    num_q_heads=16,
    num_kv_heads=4,
    num_layers=12,
    widening_factor=3,
    num_experts=3,
    sequence_len=8,
)

# A matrix of an expert is larger than all arrays that a step holds beside the weights.
LARGE_MATRICES = ModelConfig(
    vocab_size=64,
    emb_size=768,
    key_size=16,
    num_q_heads=8,
    num_kv_heads=4,
    num_layers=3,
    widening_factor=3,
    num_experts=2,
    sequence_len=64,
    attn_output_multiplier=0.25,
)

# The same for a device of several, too large to be loaded in a test.
NEVER_LOADED = ModelConfig(
    vocab_size=64,
    emb_size=1024,
    key_size=16,
    num_q_heads=16,
    num_kv_heads=8,
    num_layers=3,
    widening_factor=6,
    sequence_len=64,
    attn_output_multiplier=0.25,
)

# Weights much larger than the memory for loading them.
LARGE_WEIGHTS = ModelConfig(
    vocab_size=1024,
    emb_size=1024,
    key_size=64,
    num_q_heads=16,
    num_kv_heads=8,
    num_layers=6,
    widening_factor=6,
    num_experts=2,
    sequence_len=64,
)
