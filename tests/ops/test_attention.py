"""Attention kernels, compared with float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from grok1.ops.attention import reference_attention
from grok1.ops.cpu import library as cpu
from grok1.ops.gpu.kernels import KERNELS as GPU
from grok1.ops.xla.kernels import XLA, Kernels

CAP = 30.0


@pytest.fixture(
    params=["reference", XLA, GPU, *cpu.kernel_names()], ids=lambda kernels: getattr(kernels, "backend", kernels)
)
def attend(request):
    """Attention by one implementation: the reference, XLA, or native kernels."""
    if request.param == "reference":
        attention = functools.partial(reference_attention, cap=CAP)
    elif isinstance(request.param, Kernels):
        attention = functools.partial(request.param.attention, cap=CAP)
    else:
        attention = functools.partial(cpu.attention, cap=CAP, kernels=request.param)

    @functools.partial(jax.jit, static_argnames="multiplier")
    def attend(query, keys, values, layer, positions, multiplier, slots=None):
        return attention(query, keys, values, layer, positions, slots, multiplier=multiplier)

    return attend


def exact(query, keys, values, positions, multiplier):
    """Compute attention in float64, one query at a time. `keys` and `values` are those of one layer."""
    query, keys, values = (array.astype(np.float64) for array in (query, keys, values))
    out = np.zeros(query.shape)
    batch, seq, heads, _ = query.shape
    for b, s, h in np.ndindex(batch, seq, heads):
        seen = positions[b, s] + 1
        if seen > 0:
            kv_head = h * keys.shape[1] // heads
            logits = keys[b, kv_head, :seen] @ query[b, s, h] * multiplier
            weights = np.exp(CAP * np.tanh(logits / CAP))
            out[b, s, h] = weights @ values[b, kv_head, :seen] / np.sum(weights)
    return out


def random_case(batch, seq, heads, kv_heads, max_seq_len, size, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((batch, seq, heads, size)).astype(dtype)
    keys = rng.standard_normal((2, batch, kv_heads, max_seq_len, size)).astype(dtype)
    values = rng.standard_normal((2, batch, kv_heads, max_seq_len, size)).astype(dtype)
    return query, keys, values


@pytest.mark.parametrize(
    ("heads", "kv_heads", "max_seq_len", "size", "positions"),
    [
        (1, 1, 1, 2, [[0]]),
        (4, 2, 16, 6, [[0], [15], [7]]),
        (6, 1, 257, 4, [[255], [256], [0], [-1]]),
        (6, 3, 300, 4, [[299], [255], [256], [3]]),
        (8, 8, 600, 4, [[511], [512], [599], [40]]),
        (2, 2, 300, 8, [[0, 1, 2, 3, 4], [10, 11, 12, -1, -1], [295, 296, 297, 298, 299]]),
        (2, 1, 2100, 70, [[1023], [1024], [2099]]),
        (6, 2, 130, 68, [list(range(130)), [*range(60, 129), *[-1] * 61]]),
        (4, 2, 600, 4, [[254, 255, 256, 257], [-1, -1, -1, -1], [597, 598, 599, -1]]),
    ],
)
def test_queries_attend_to_the_cache_up_to_their_positions(heads, kv_heads, max_seq_len, size, positions, attend):
    positions = np.asarray(positions, np.int32)
    batch, seq = positions.shape
    query, keys, values = random_case(batch, seq, heads, kv_heads, max_seq_len, size)
    for row in range(batch):  # left by an earlier, longer sequence
        keys[:, row, :, positions[row].max() + 1 :] = 50
        values[:, row, :, positions[row].max() + 1 :] = 1e4
    expected = exact(query, keys[1], values[1], positions, size**-0.5)
    found = attend(query, keys, values, 1, positions, size**-0.5)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_rows_attend_to_their_own_slots(attend):
    positions = np.asarray([[3, 4], [298, 299], [5, 6], [-1, -1]], np.int32)
    slots = np.asarray([2, 0, 2, 1], np.int32)  # two rows of the same sequence
    query, keys, values = random_case(4, 2, 4, 2, 300, 4)
    expected = exact(query, keys[1][slots], values[1][slots], positions, 0.5)
    np.testing.assert_allclose(attend(query, keys, values, 1, positions, 0.5, slots), expected, atol=2e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_saturate_at_the_cap(sign, attend):
    """If all logits are at +30 or -30, attention is uniform over the visible positions."""
    query = np.ones((1, 1, 2, 4), np.float32)
    keys = np.full((1, 1, 1, 300, 4), sign * 100, np.float32)
    values = random_case(1, 1, 2, 1, 300, 4)[2][:1]
    found = attend(query, keys, values, 0, np.asarray([[279]], np.int32), 1.0)
    np.testing.assert_allclose(found[0, 0, 1], values[0, 0, 0, :280].mean(axis=0), atol=1e-5)


def test_one_key_at_the_cap_dominates(attend):
    query = np.ones((1, 1, 1, 4), np.float32)
    keys = np.full((1, 1, 1, 300, 4), -100, np.float32)
    keys[0, 0, 0, 3] = 100
    values = random_case(1, 1, 1, 1, 300, 4)[2][:1]
    found = attend(query, keys, values, 0, np.asarray([[299]], np.int32), 1.0)
    np.testing.assert_allclose(found[0, 0, 0], values[0, 0, 0, 3], atol=1e-5)


def test_bfloat16_cache(attend):
    positions = np.asarray([[299], [120]], np.int32)
    query, keys, values = random_case(2, 1, 4, 2, 300, 8, ml_dtypes.bfloat16)
    found = attend(query, keys, values, 1, positions, 8**-0.5)
    assert found.dtype == jnp.float32
    # Only the attention weights are rounded, with a relative error of up to 1/256.
    np.testing.assert_allclose(found, exact(query, keys[1], values[1], positions, 8**-0.5), atol=4e-3)
