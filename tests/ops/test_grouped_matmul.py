"""Grouping of rows by expert, and grouped products compared with float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from grok1.ops.experts import gather_rows, group_by_expert, scatter_rows
from grok1.ops.gpu.kernels import KERNELS as GPU
from grok1.ops.tpu.kernels import KERNELS as TPU
from grok1.ops.xla.kernels import XLA
from grok1.params.weights import QuantizedMatrix

group = jax.jit(group_by_expert, static_argnums=(1, 2))


def check_blocks(expert, num_experts):
    blocks = jax.device_get(group(jnp.asarray(expert, jnp.int32), num_experts, XLA.block_rows))
    size = blocks.block_rows
    sent = expert < num_experts
    slots = blocks.slot[sent]
    assert len(set(slots.tolist())) == len(slots)  # no two rows share a slot
    assert np.all((slots >= 0) & (slots < blocks.used * size))  # no row is dropped
    np.testing.assert_array_equal(blocks.expert[slots // size], expert[sent])
    np.testing.assert_array_equal(blocks.slot[~sent], blocks.num_slots)  # padding is outside all blocks
    counts = np.bincount(expert[sent], minlength=num_experts)
    assert blocks.used == np.sum(-(-counts // size))
    for i in range(num_experts):  # the order within an expert is preserved
        assert np.all(np.diff(blocks.slot[expert == i]) > 0)
    return blocks


@pytest.mark.parametrize(("rows", "num_experts"), [(1, 8), (4, 3), (17, 1), (64, 8)])
def test_every_row_has_one_slot_in_a_block_of_its_expert(rows, num_experts):
    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(0, num_experts), min_size=rows, max_size=rows))
    def check(experts):
        check_blocks(np.asarray(experts), num_experts)

    check()
    check_blocks(np.zeros(rows, int), num_experts)
    check_blocks(np.full(rows, num_experts), num_experts)  # all padding
    check_blocks(np.arange(rows) % num_experts, num_experts)


@pytest.mark.parametrize("experts", ["even", "one", "skewed"])
def test_many_rows_fill_large_blocks(experts):
    rows = 1100
    rng = np.random.default_rng(0)
    expert = {
        "even": rng.integers(0, 8, rows),
        "one": np.full(rows, 7),
        "skewed": np.where(rng.random(rows) < 0.9, 3, rng.integers(0, 9, rows)),
    }[experts]
    assert check_blocks(expert, 8).block_rows == 128


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "groups", "num_experts", "dtype"),
    [
        (1, 40, 7, 1, 8, np.float32),
        (2, 344, 9, 8, 8, ml_dtypes.bfloat16),
        (16, 300, 8, 1, 8, ml_dtypes.bfloat16),
        (150, 24, 6, 8, 2, np.float32),
        (70, 256, 128, 2, 3, np.float32),
        (9, 4096, 40, 8, 4, ml_dtypes.bfloat16),
    ],
)
@pytest.mark.parametrize("kernels", [XLA, GPU, TPU], ids=lambda kernels: kernels.backend)
def test_each_row_is_multiplied_by_the_matrix_of_its_expert(rows, inner, columns, groups, num_experts, dtype, kernels):
    rng = np.random.default_rng(rows)
    weight = rng.integers(-127, 128, (2, num_experts, inner, columns)).astype(np.int8)
    scales = rng.uniform(0.5, 2, (2, num_experts, groups, columns)).astype(ml_dtypes.bfloat16)
    quantized = QuantizedMatrix(jnp.asarray(weight), jnp.asarray(scales))
    x = rng.standard_normal((rows, inner)).astype(dtype)
    matrices = reference.dequantised(weight[1], scales[1])

    @jax.jit
    def product(x, weight, layer, expert):
        blocks = group_by_expert(expert, num_experts, kernels.block_rows)
        (products,) = kernels.grouped_matmuls(scatter_rows(x, blocks), [weight], layer, blocks)
        return gather_rows(products, blocks)

    for case in range(3):
        expert = rng.integers(0, num_experts + (case > 0), rows)
        if case == 2:
            expert[:] = expert[0]
        found = product(x, quantized, 1, expert.astype(np.int32))
        chosen = np.concatenate([matrices, np.zeros((1, inner, columns))])[expert]  # padding gives 0
        exact = np.einsum("mk,mkn->mn", x.astype(np.float64), chosen)
        bound = 1e-5 * np.einsum("mk,mkn->mn", np.abs(x.astype(np.float64)), np.abs(chosen))
        assert np.all(np.abs(found - exact) <= bound)
