"""Consistency of measurements; their values are not tested."""

import dataclasses

import numpy as np
import pytest
from configs import TEXT

from grok1.diagnose import bench
from grok1.engine.engine import Engine
from grok1.errors import RequestError
from grok1.model import random_model
from grok1.params.table import tensor_table


@pytest.fixture(scope="module", params=[(1, 1), (2, 2)], ids=str)
def model(request):
    return random_model(TEXT, mesh=request.param)


def test_measurements_are_consistent(model):
    found = bench.measure(model, 20, 4, 5)
    assert (found.prompt_tokens, found.batch, found.decode_steps) == (20, 4, 5)
    assert found.prefill_tokens_per_second == pytest.approx(80 / found.prefill_seconds)
    assert found.decode_tokens_per_second == pytest.approx(4 / found.decode_step_seconds)
    assert found.decode_bytes_per_second == pytest.approx(found.decode_bytes_per_step / found.decode_step_seconds)
    assert 0 < found.time_to_first_token_seconds <= found.prefill_seconds


def test_bytes_per_step_match_the_files(model):
    """A sequence reads all weights except those of unselected experts, and its part of the KV cache."""
    data, shards = model.mesh_shape
    found = bench.measure(model, 16, data, 4)
    weights = 0.0
    for spec in tensor_table(TEXT):
        size = np.prod(spec.shape) * spec.dtype.itemsize + 2 * np.prod(spec.scales_shape or 0)
        share = 0.5 if "/moe/" in spec.module else 1
        copies = data * (shards if "norm" in spec.module or "router" in spec.module else 1)
        weights += size * share * copies
    cache = data * (16 + 2 + 2) * TEXT.num_layers * 2 * TEXT.num_kv_heads * TEXT.key_size * 4
    assert found.decode_bytes_per_step == pytest.approx(weights + cache, rel=0.01)


def test_prompt_of_several_chunks(monkeypatch):
    monkeypatch.setattr(Engine, "max_chunk", 16)
    found = bench.measure(random_model(TEXT, mesh=(1, 1)), 40, 2, 2)
    assert found.prefill_seconds > 0


@pytest.mark.parametrize(
    ("prompt", "batch", "decode", "match"),
    [(60, 2, 8, "lower --prompt"), (8, 3, 1, "multiple"), (8, 1 << 40, 1, "lower --batch")],
)
def test_impossible_measurements(prompt, batch, decode, match):
    model = random_model(TEXT, mesh=(2, 1))
    with pytest.raises(RequestError, match=match):
        bench.measure(model, prompt, batch, decode)


def test_limits(model, monkeypatch):
    monkeypatch.setattr(bench, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "MATRIX_SIZE", 64)
    limits = bench.measure_limits(model)
    assert limits.read_bytes_per_second > 0
    assert limits.matrix_operations_per_second > 0
    plain = bench.measure_limits(random_model(TEXT, mesh=(1, 1), kernels="xla"))
    assert plain.matrix_product == "float32 matrix product"


def test_weight_bytes(model):
    plain = random_model(TEXT, mesh=(1, 1), kernels="xla")
    sizes = [
        np.prod(spec.shape) * spec.dtype.itemsize + 2 * np.prod(spec.scales_shape or 0) for spec in tensor_table(TEXT)
    ]
    assert bench.weight_bytes(plain) == sum(sizes)
    assert bench.weight_bytes(model) >= sum(sizes)


def test_random_models_differ_by_seed():
    tokens = [3, 4, 5]
    first, again = (random_model(TEXT, mesh=(1, 1), seed=1).logits(tokens) for _ in range(2))
    other = random_model(dataclasses.replace(TEXT), mesh=(1, 1), seed=2).logits(tokens)
    np.testing.assert_array_equal(first, again)
    assert np.isfinite(first).all()
    assert not np.array_equal(first, other)
