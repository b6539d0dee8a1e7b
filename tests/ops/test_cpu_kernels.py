"""CPU kernels, compared with products in float64."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from built import require_kernels

from grok1.host.threads import num_threads
from grok1.ops.cpu import library as cpu
from grok1.params.weights import Panels, QuantizedMatrix, panels_shape

require_kernels()

INTEGER_KERNELS = ("amx-int8", "avx512-vnni", "avx-vnni", "arm-dotprod")
SHAPES = [  # inner, columns, groups, matrices
    (1, 1, 1, 1),
    (16, 64, 1, 1),
    (17, 5, 1, 3),
    (100, 70, 4, 3),
    (48, 1030, 3, 2),
    (1200, 100, 8, 2),
]


def pack(weight, groups):
    """Pack matrices `[matrices, inner, columns]` one value at a time, with random padding."""
    packed = np.random.default_rng(9).integers(0, 256, panels_shape(weight.shape, groups), dtype=np.uint8)
    group_rows = weight.shape[1] // groups
    quads = -(-group_rows // 4)
    for m, k, n in np.ndindex(weight.shape):
        group, row = divmod(k, group_rows)
        packed[m, n // 16, group * quads + row // 4, n % 16 * 4 + row % 4] = int(weight[m, k, n]) + 128
    return packed


@functools.cache
def random_weight(inner, columns, groups, matrices):
    """Return a packed stack, its int8 values, and its dequantized values in float64."""
    rng = np.random.default_rng(inner + columns)
    weight = rng.integers(-128, 128, (matrices, inner, columns), dtype=np.int8)
    scales = jnp.asarray(rng.uniform(0.5, 2, (matrices, groups, columns)) / 100, jnp.bfloat16)
    exact = weight * np.repeat(np.asarray(scales, np.float64), inner // groups, axis=1)
    panels = jnp.asarray(pack(weight, groups))
    return QuantizedMatrix(panels, scales, layout=Panels(inner // groups)), weight, exact


@pytest.fixture(params=cpu.kernel_names())
def kernels(request):
    return request.param


multiply = jax.jit(cpu.multiply, static_argnames="kernels")
multiply_transposed = jax.jit(cpu.multiply_transposed, static_argnames="kernels")
multiply_gated = jax.jit(cpu.multiply_gated, static_argnames="kernels")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_reverses_packing(shape):
    packed, weight, exact = random_weight(*shape)
    np.testing.assert_array_equal(packed.unpack().values, weight)
    np.testing.assert_allclose(packed.dequantize(), exact, rtol=1e-6)
    assert (packed.shape, packed.dtype, packed.groups) == (weight.shape, jnp.int8, shape[2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_in_boxes_of_any_size(shape):
    inner, columns, groups, matrices = shape
    packed, weight, _ = random_weight(*shape)
    rng = np.random.default_rng(0)
    for _ in range(4):
        found = np.zeros(packed.values.shape, np.uint8)
        rows = sorted({0, inner, *rng.integers(0, inner + 1, 3).tolist()})
        bounds = sorted({0, columns, *rng.integers(0, columns + 1, 2).tolist()})
        for m in range(matrices):
            for top, bottom in itertools.pairwise(rows):
                for left, right in itertools.pairwise(bounds):
                    box = weight[m, top:bottom, left:right]
                    cpu.pack_box(box, found[m], top, left, groups, inner // groups)
        unpacked = QuantizedMatrix(jnp.asarray(found), packed.scales, layout=packed.layout).unpack().values
        np.testing.assert_array_equal(unpacked, weight)
        is_value = pack(np.zeros_like(weight), groups) == pack(np.full_like(weight, 1), groups)
        assert not found[is_value].any()  # padding was not written


@pytest.mark.parametrize(("row", "column"), [(-1, 0), (1, 0), (0, -1), (0, 16)])
def test_a_box_outside_the_matrix_is_rejected(row, column):
    with pytest.raises(ValueError, match="does not fit panels"):
        cpu.pack_box(np.zeros((8, 16), np.int8), np.zeros((1, 2, 64), np.uint8), row, column, 1, 8)


@pytest.mark.parametrize("rows", [1, 3, 11, 140])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_row_is_multiplied_by_its_matrix(shape, rows, kernels):
    rng = np.random.default_rng(rows)
    weight, _, exact = random_weight(*shape)
    x = rng.standard_normal((rows, shape[0])).astype(np.float32)
    x *= 10.0 ** rng.integers(-6, 6, (rows, 1))
    index = rng.integers(-1, shape[3], rows)
    found = np.asarray(multiply(x, weight, index, kernels=kernels))
    assert found.dtype == np.float32
    for row in range(rows):
        expected = x[row].astype(np.float64) @ exact[index[row]] if index[row] >= 0 else np.zeros(shape[1])
        bound = np.abs(x[row]).astype(np.float64) @ np.abs(exact[index[row]])
        assert np.all(np.abs(found[row] - expected) <= 1e-6 * bound + 1e-7 * shape[0] * np.abs(x[row]).max())
        if index[row] < 0:
            assert not found[row].any()


def test_integer_kernels_are_bitwise_equal():
    weight, _, _ = random_weight(1200, 100, 8, 2)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((37, 1200)).astype(np.float32)
    index = rng.integers(0, 2, 37)
    results = [np.asarray(multiply(x, weight, index, kernels=k)) for k in cpu.kernel_names() if k in INTEGER_KERNELS]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_all_threads_treat_denormals_alike(kernels):
    weight, _, _ = random_weight(100, 1030, 4, 1)
    weight = dataclasses.replace(weight, scales=weight.scales * 1e-7)
    x = np.float32(1e-31) * np.random.default_rng(0).standard_normal((64, 100)).astype(np.float32)
    index = np.zeros(64, np.int32)
    try:
        results = []
        for threads in (1, 4, 4, 4):
            cpu.set_threads(threads)
            results.append(np.asarray(multiply(x, weight, index, kernels=kernels)))
    finally:
        cpu.set_threads(num_threads())
    assert np.count_nonzero(results[0])
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_several_matrices_for_each_row(rows, kernels):
    """Several rows of the result use the same row of `x`, like the experts of a token."""
    weight, _, _ = random_weight(100, 70, 4, 3)
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 100)).astype(np.float32)
    index = rng.integers(-1, 3, 2 * rows)
    together = multiply(x, weight, index, kernels=kernels)
    np.testing.assert_array_equal(together, multiply(np.repeat(x, 2, axis=0), weight, index, kernels=kernels))


@pytest.mark.parametrize("rows", [1, 6, 50])
def test_gated_product(rows, kernels):
    gate, _, exact_gate = random_weight(100, 70, 4, 3)
    rng = np.random.default_rng(rows)
    other = rng.integers(-128, 128, (3, 100, 70), dtype=np.int8)
    value = QuantizedMatrix(jnp.asarray(pack(other, 4)), gate.scales, layout=Panels(25))
    exact_value = other * np.repeat(np.asarray(gate.scales, np.float64), 25, axis=1)
    x = rng.standard_normal((rows, 100)).astype(np.float32)
    index = rng.integers(-1, 3, 2 * rows)
    found = multiply_gated(x, gate, value, index, kernels=kernels)
    for row in range(2 * rows):
        if index[row] < 0:
            assert not np.asarray(found[row]).any()
            continue
        gated = x[row // 2].astype(np.float64) @ exact_gate[index[row]]
        gelu = 0.5 * gated * (1 + np.tanh(np.sqrt(2 / np.pi) * (gated + 0.044715 * gated**3)))
        expected = gelu * (x[row // 2].astype(np.float64) @ exact_value[index[row]])
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)


def test_rows_are_bitwise_independent_of_each_other(kernels):
    rng = np.random.default_rng(0)
    weight, _, _ = random_weight(100, 70, 4, 3)
    x = rng.standard_normal((40, 100)).astype(np.float32)
    index = rng.integers(0, 3, 40)
    together = np.asarray(multiply(x, weight, index, kernels=kernels))
    order = rng.permutation(40)
    np.testing.assert_array_equal(multiply(x[order], weight, index[order], kernels=kernels), together[order])
    for row in range(40):
        alone = multiply(x[row : row + 1], weight, index[row : row + 1], kernels=kernels)
        np.testing.assert_array_equal(alone[0], together[row])


def test_extreme_weights_do_not_overflow(kernels):
    for value in (-128, 127):
        packed = np.full(panels_shape((1, 32768, 64), 1), value + 128, np.uint8)
        weight = QuantizedMatrix(jnp.asarray(packed), jnp.ones((1, 1, 64), jnp.bfloat16), layout=Panels(32768))
        for sign in (-1, 1):
            x = np.full((3, 32768), sign * 3.0, np.float32)
            found = multiply(x, weight, np.zeros(3, int), kernels=kernels)
            np.testing.assert_allclose(found, 32768 * 3.0 * sign * value, rtol=1e-5)


def test_zeros_denormals_and_non_finite_values(kernels):
    weight, _, _ = random_weight(16, 64, 1, 1)
    x = np.zeros((5, 16), np.float32)
    x[1, 3], x[2, 4], x[3, 5], x[4, 5] = np.nan, np.inf, 1, 1e-42
    found = np.asarray(multiply(x, weight, np.zeros(5, int), kernels=kernels))
    assert not found[0].any()
    assert not np.isfinite(found[1:3]).all(axis=1).any()
    assert np.isfinite(found[3:]).all()
    assert np.abs(found[4]).max() < 1e-38


def test_bfloat16_activations(kernels):
    rng = np.random.default_rng(1)
    weight, _, exact = random_weight(100, 70, 4, 3)
    x = jnp.asarray(rng.standard_normal((3, 100)), jnp.bfloat16)
    found = multiply(x, weight, np.array([1, 0, 2]), kernels=kernels)
    expected = np.einsum("mk,mkn->mn", np.asarray(x, np.float64), exact[[1, 0, 2]])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "entries"), [(1, 3, 1), (1, 64, 500), (5, 100, 33), (16, 1000, 2000)])
def test_transposed_product(rows, inner, entries, dtype, kernels):
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, inner)).astype(np.float32)
    table = rng.standard_normal((entries, inner)).astype(dtype)
    found = np.asarray(multiply_transposed(x, table, kernels=kernels))
    exact = x.astype(np.float64) @ table.astype(np.float64).T
    np.testing.assert_allclose(found, exact, atol=1e-6 * inner, rtol=1e-6)
    for row in range(rows):
        np.testing.assert_array_equal(multiply_transposed(x[row : row + 1], table, kernels=kernels)[0], found[row])


@pytest.mark.parametrize(
    ("inputs", "inner", "group_rows"), [(2, 99, 25), (3, 100, 25), (2, 100, 24), (2, 100, 0), (2, 100, 40000)]
)
def test_inconsistent_shapes_are_rejected(inputs, inner, group_rows):
    weight, _, _ = random_weight(100, 70, 4, 3)
    broken = QuantizedMatrix(weight.values, weight.scales, layout=Panels(group_rows))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        jax.block_until_ready(cpu.multiply(jnp.zeros((inputs, inner)), broken, jnp.zeros(2, int)))


def test_unknown_kernels_are_rejected():
    weight, _, _ = random_weight(100, 70, 4, 3)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such kernels"):
        jax.block_until_ready(cpu.multiply(jnp.zeros((2, 100)), weight, jnp.zeros(2, int), kernels="abacus"))
