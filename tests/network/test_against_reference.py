"""Networks of various shapes on many meshes, compared with the float64 reference."""

import dataclasses

import numpy as np
import pytest

from grok1.config import ModelConfig

FLOAT32_ERROR = 3e-5  # relative error; typically 2e-6
LENGTH = 20

CONFIGS = {
    # One key/value head per query head, 4 of 8 experts, 11 layers, expert width 88.
    "own-heads": ModelConfig(
        vocab_size=72,
        emb_size=48,
        key_size=4,
        num_q_heads=8,
        num_kv_heads=8,
        num_layers=11,
        widening_factor=2.75,
        num_experts=8,
        num_selected_experts=4,
        sequence_len=40,
        attn_output_multiplier=0.5,
    ),
    # Six query heads per key/value head, 12 layers, expert width 1000 in scale groups of 125 rows, key size 6.
    "six-to-one": ModelConfig(
        vocab_size=100,
        emb_size=60,
        key_size=6,
        num_q_heads=12,
        num_kv_heads=2,
        num_layers=12,
        widening_factor=25,
        num_experts=3,
        sequence_len=24,
        attn_output_multiplier=0.3,
        embedding_multiplier_scale=10,
        output_multiplier_scale=2,
    ),
    # Splits into 16 shards, which share key/value heads and scale groups; 13 layers.
    "wide": ModelConfig(
        vocab_size=96,
        emb_size=48,
        key_size=4,
        num_q_heads=16,
        num_kv_heads=8,
        num_layers=13,
        widening_factor=4.5,  # expert width 144: 9 columns per shard, scale groups of 18 rows
        num_experts=8,
        sequence_len=64,
        attn_output_multiplier=0.5,
    ),
    # Minimum of everything: one key/value head, one expert, one layer.
    "least": ModelConfig(
        vocab_size=40,
        emb_size=16,
        key_size=2,
        num_q_heads=8,
        num_kv_heads=1,
        num_layers=1,
        widening_factor=1,
        num_experts=1,
        num_selected_experts=1,
        sequence_len=20,
        attn_output_multiplier=1,
    ),
}

# With 16 shards, two share each query head and four each key/value head.
CONFIGS["few-heads"] = dataclasses.replace(CONFIGS["wide"], num_q_heads=8, num_kv_heads=4, num_layers=3)

CASES = [
    ("own-heads", (1, 1)),
    ("own-heads", (1, 8)),
    ("six-to-one", (1, 1)),
    ("six-to-one", (1, 4)),
    ("few-heads", (1, 16)),
    ("least", (1, 1)),
    ("least", (1, 8)),
    ("wide", (1, 1)),
    ("wide", (1, 2)),
    ("wide", (1, 8)),
    ("wide", (1, 16)),
    ("wide", (2, 8)),
    ("wide", (4, 2)),
    ("wide", (8, 1)),
]


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_logits_match_float64(name, mesh, make_checkpoint, make_engine, clear_sequences, relative_error):
    folder = make_checkpoint(CONFIGS[name])
    engine = make_engine(folder, mesh)
    tokens, expected = clear_sequences(folder, mesh[0], LENGTH)
    rows = engine.data_rows  # a different sequence on each
    logits, _ = engine.logits(engine.new_cache(rows), tokens.astype(np.int32), 0)
    for row in range(rows):
        assert relative_error(logits[row], expected[row]) < FLOAT32_ERROR


@pytest.mark.parametrize("mesh", [(1, 1), (2, 8)])
def test_bfloat16_differs_only_by_rounding(mesh, make_checkpoint, make_engine, clear_sequences, relative_error):
    # Selects all experts, because rounding that changes the selection would change logits a lot.
    folder = make_checkpoint(dataclasses.replace(CONFIGS["wide"], num_experts=2))
    engine = make_engine(folder, mesh, "bfloat16")
    tokens, expected = clear_sequences(folder, mesh[0], LENGTH)
    rows = engine.data_rows
    logits, cache = engine.logits(engine.new_cache(rows), tokens.astype(np.int32), 0)
    assert cache.keys.dtype == "bfloat16"
    assert logits.dtype == np.float32
    error = relative_error(logits, expected)
    assert FLOAT32_ERROR < error < 0.1  # typically 4 %
    alone = make_engine(folder, (1, 1), "bfloat16")
    for row in range(rows):
        single, _ = alone.logits(alone.new_cache(1), tokens[row : row + 1].astype(np.int32), 0)
        assert relative_error(logits[row], np.asarray(single[0])) < 0.1
