"""What the compiled decoding step does with memory."""

import math
import re

import numpy as np
import pytest

from grok1.config import ModelConfig
from grok1.engine.programs import StepKey
from grok1.params.weights import panels_shape

CONFIG = ModelConfig(
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


@pytest.fixture(scope="module", params=[1, 8], ids=lambda slots: f"{slots} slots")
def step(request, kernels, make_checkpoint, make_engine):
    """The compiled step and the batch that it takes."""
    engine = make_engine(make_checkpoint(CONFIG), kernels=kernels)
    state, _ = engine.decode(engine.new_batch(request.param), np.ones(request.param, bool))
    return engine.compiled[StepKey("decode", request.param)], state


def test_no_matrix_is_held_dequantised(step):
    program, _ = step
    expert = CONFIG.emb_size * CONFIG.ffn_size
    assert 0 < program.memory_analysis().temp_size_in_bytes < 4 * expert  # one in float32


def test_the_cache_is_updated_in_place(step):
    program, state = step
    cache = state.cache.keys.nbytes + state.cache.values.nbytes
    assert program.memory_analysis().alias_size_in_bytes >= cache
    assert program.memory_analysis().output_size_in_bytes < 2 * cache


def test_weights_stay_bytes(step, kernels):
    program, _ = step
    shape = (CONFIG.num_layers, CONFIG.num_experts, CONFIG.emb_size, CONFIG.ffn_size)
    kind, stored = ("u8", panels_shape(shape, 1)) if kernels == "native" else ("s8", shape)
    stack = ",".join(str(size) for size in stored)
    text = program.as_text()
    assert f"{kind}[{stack}]" in text
    assert f"f32[{stack}]" not in text
    matrix = f"{CONFIG.emb_size},{CONFIG.ffn_size}]"
    assert not any(f"{kind}[{matrix}" in text for kind in ("f32", "bf16"))


def test_no_weight_is_copied(step):
    program, _ = step
    expert = CONFIG.num_experts * CONFIG.emb_size * CONFIG.ffn_size
    copies = [line for line in program.as_text().splitlines() if " copy(" in line or " transpose(" in line]
    for line in copies:
        shape = re.search(r"= \w+\[([\d,]*)\]", line)[1]
        assert math.prod(int(size) for size in shape.split(",") if size) < expert, line
