"""Memory use of the compiled decode step."""

import math
import re

import numpy as np
import pytest
from configs import LARGE_MATRICES

from grok1.engine.programs import StepKey
from grok1.params.weights import panels_shape


@pytest.fixture(scope="module", params=[1, 8], ids=lambda slots: f"{slots} slots")
def step(request, kernels, make_checkpoint, make_engine):
    """The compiled step and its batch."""
    engine = make_engine(make_checkpoint(LARGE_MATRICES), kernels=kernels)
    state, _ = engine.decode(engine.new_batch(request.param), np.ones(request.param, bool))
    return engine.compiled[StepKey("decode", request.param)], state


def test_no_matrix_is_dequantized_in_memory(step):
    program, _ = step
    expert = LARGE_MATRICES.emb_size * LARGE_MATRICES.ffn_size
    assert 0 < program.memory_analysis().temp_size_in_bytes < 4 * expert  # less than one matrix in float32


def test_the_cache_is_updated_in_place(step):
    program, state = step
    cache = state.cache.keys.nbytes + state.cache.values.nbytes
    assert program.memory_analysis().alias_size_in_bytes >= cache
    assert program.memory_analysis().output_size_in_bytes < 2 * cache


def test_weights_stay_int8(step, kernels):
    program, _ = step
    shape = (LARGE_MATRICES.num_layers, LARGE_MATRICES.num_experts, LARGE_MATRICES.emb_size, LARGE_MATRICES.ffn_size)
    kind, stored = ("u8", panels_shape(shape, 1)) if kernels == "native" else ("s8", shape)
    stack = ",".join(str(size) for size in stored)
    text = program.as_text()
    assert f"{kind}[{stack}]" in text
    assert f"f32[{stack}]" not in text
    matrix = f"{LARGE_MATRICES.emb_size},{LARGE_MATRICES.ffn_size}]"
    assert not any(f"{kind}[{matrix}" in text for kind in ("f32", "bf16"))


def test_no_weight_is_copied(step):
    program, _ = step
    expert = LARGE_MATRICES.num_experts * LARGE_MATRICES.emb_size * LARGE_MATRICES.ffn_size
    copies = [line for line in program.as_text().splitlines() if " copy(" in line or " transpose(" in line]
    for line in copies:
        shape = re.search(r"= \w+\[([\d,]*)\]", line)[1]
        assert math.prod(int(size) for size in shape.split(",") if size) < expert, line
