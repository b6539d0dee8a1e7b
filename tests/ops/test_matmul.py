import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference

from grok1.ops.gpu.kernels import KERNELS as GPU
from grok1.ops.matmul import reference_matmul
from grok1.ops.tpu.kernels import KERNELS as TPU
from grok1.ops.tpu.matmul import can_multiply
from grok1.ops.xla.kernels import XLA
from grok1.params.weights import QuantizedMatrix


@functools.partial(jax.jit, static_argnames="kernels")
def multiply(x, weight, index, kernels=XLA):
    return kernels.matmul(x, weight, index)


def random_case(rows, inner, columns, groups, lead, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (*lead, inner, columns)).astype(np.int8)
    scales = rng.uniform(0.5, 2, (*lead, groups, columns)).astype(ml_dtypes.bfloat16)
    x = rng.standard_normal((rows, inner)).astype(dtype)
    return x, weight, scales


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "groups"),
    [
        (1, 1, 1, 1),
        (1, 8, 3, 8),
        (1, 40, 7, 1),  # one block and a rest
        (1, 344, 33, 8),  # groups of 43 rows
        (2, 600, 5, 1),
        (3, 24, 9, 8),
        (3, 600, 20, 1),  # two blocks and a rest
        (7, 344, 16, 8),
        (16, 256, 16, 1),
        (17, 72, 31, 8),
        (40, 1000, 6, 8),
        (40, 1032, 6, 2),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kernels", [XLA, GPU], ids=lambda kernels: kernels.backend)
def test_product_with_a_matrix_of_a_stack(rows, inner, columns, groups, dtype, kernels):
    x, weight, scales = random_case(rows, inner, columns, groups, (3,), dtype)
    quantized = QuantizedMatrix(jnp.asarray(weight), jnp.asarray(scales))
    found = multiply(jnp.asarray(x), quantized, (1,), kernels=kernels)
    assert found.dtype == jnp.float32
    matrix = reference.dequantised(weight[1], scales[1])
    exact = x.astype(np.float64) @ matrix
    # Rounding of float32 sums is far below this part of the terms' size; a row left out is far above.
    bound = 1e-5 * (np.abs(x.astype(np.float64)) @ np.abs(matrix))
    assert np.all(np.abs(found - exact) <= bound)
    assert np.all(np.abs(reference_matmul(jnp.asarray(x), quantized, (1,)) - exact) <= bound)


@pytest.mark.parametrize(("inner", "groups"), [(128, 1), (1024, 8), (384, 1)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (17, 384), (300, 256)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_product_in_tiles_of_a_tpu(rows, inner, columns, groups, dtype):
    x, weight, scales = random_case(rows, inner, columns, groups, (3,), dtype)
    quantized = QuantizedMatrix(jnp.asarray(weight), jnp.asarray(scales))
    assert can_multiply(quantized)
    found = multiply(jnp.asarray(x), quantized, (1,), kernels=TPU)
    matrix = reference.dequantised(weight[1], scales[1])
    bound = 1e-5 * (np.abs(x.astype(np.float64)) @ np.abs(matrix))
    assert np.all(np.abs(found - x.astype(np.float64) @ matrix) <= bound)


def test_matrices_that_are_no_whole_tiles_of_a_tpu():
    x, weight, scales = random_case(3, 120, 130, 8, (2,))
    quantized = QuantizedMatrix(jnp.asarray(weight), jnp.asarray(scales))
    assert not can_multiply(quantized)
    found = multiply(x, quantized, (1,), kernels=TPU)
    np.testing.assert_allclose(found, reference_matmul(x, quantized, (1,)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernels", [XLA, GPU, TPU], ids=lambda kernels: kernels.backend)
def test_several_stacks_at_once(kernels):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 256)).astype(np.float32)
    stacks = [random_case(5, 256, columns, 1, (2,), seed=columns)[1:] for columns in (384, 128, 130)]
    quantized = [QuantizedMatrix(jnp.asarray(weight), jnp.asarray(scales)) for weight, scales in stacks]
    found = jax.jit(lambda x, weights: kernels.matmuls(x, weights, (1,)))(x, quantized)
    for product, (weight, scales) in zip(found, stacks, strict=True):
        np.testing.assert_allclose(product, x @ reference.dequantised(weight[1], scales[1]), rtol=1e-4, atol=1e-2)


def test_index_may_be_traced_and_of_several_axes():
    x, weight, scales = random_case(4, 48, 10, 8, (2, 3))
    quantized = QuantizedMatrix(jnp.asarray(weight), jnp.asarray(scales))
    for layer in range(2):
        for expert in range(3):
            found = multiply(x, quantized, (jnp.int32(layer), jnp.int32(expert)))
            exact = x.astype(np.float64) @ reference.dequantised(weight[layer, expert], scales[layer, expert])
            np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-2)
