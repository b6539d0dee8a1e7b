"""Products with quantized matrices, compared with float64."""

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


@pytest.fixture
def multiply(request):
    """`matmul` of some kernels, by default XLA, or the reference implementation."""
    kernels = getattr(request, "param", XLA)
    return jax.jit(reference_matmul if kernels == "reference" else kernels.matmul)


def random_case(rows, inner, columns, groups, lead, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (*lead, inner, columns)).astype(np.int8)
    scales = rng.uniform(0.5, 2, (*lead, groups, columns)).astype(ml_dtypes.bfloat16)
    x = rng.standard_normal((rows, inner)).astype(dtype)
    return x, weight, scales


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "groups", "dtype"),
    [
        (1, 1, 1, 1, np.float32),
        (1, 8, 3, 8, ml_dtypes.bfloat16),
        (1, 344, 33, 8, np.float32),  # groups of 43 rows
        (3, 600, 20, 1, ml_dtypes.bfloat16),  # two blocks and a remainder
        (7, 344, 16, 8, ml_dtypes.bfloat16),
        (16, 256, 16, 1, np.float32),
        (40, 1000, 6, 8, np.float32),
        (40, 1032, 6, 2, ml_dtypes.bfloat16),
    ],
)
@pytest.mark.parametrize("multiply", [XLA, GPU, "reference"], indirect=True)
def test_product_with_a_matrix_of_a_stack(rows, inner, columns, groups, dtype, multiply):
    x, weight, scales = random_case(rows, inner, columns, groups, (3,), dtype)
    quantized = QuantizedMatrix(jnp.asarray(weight), jnp.asarray(scales))
    found = multiply(jnp.asarray(x), quantized, (1,))
    assert found.dtype == jnp.float32
    matrix = reference.dequantised(weight[1], scales[1])
    exact = x.astype(np.float64) @ matrix
    # Rounding of float32 sums is far below this bound; omitting a row is far above it.
    bound = 1e-5 * (np.abs(x.astype(np.float64)) @ np.abs(matrix))
    assert np.all(np.abs(found - exact) <= bound)


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "groups", "dtype"),
    [
        (1, 128, 128, 1, np.float32),
        (1, 1024, 256, 8, ml_dtypes.bfloat16),
        (17, 384, 384, 1, ml_dtypes.bfloat16),
        (17, 1024, 128, 8, np.float32),
        (300, 384, 256, 1, np.float32),
        (300, 128, 384, 1, ml_dtypes.bfloat16),
    ],
)
@pytest.mark.parametrize("multiply", [TPU], indirect=True)
def test_tpu_product_in_whole_tiles(rows, inner, columns, groups, dtype, multiply):
    x, weight, scales = random_case(rows, inner, columns, groups, (3,), dtype)
    quantized = QuantizedMatrix(jnp.asarray(weight), jnp.asarray(scales))
    assert can_multiply(quantized)
    found = multiply(jnp.asarray(x), quantized, (1,))
    matrix = reference.dequantised(weight[1], scales[1])
    bound = 1e-5 * (np.abs(x.astype(np.float64)) @ np.abs(matrix))
    assert np.all(np.abs(found - x.astype(np.float64) @ matrix) <= bound)


@pytest.mark.parametrize("multiply", [TPU], indirect=True)
def test_tpu_product_of_partial_tiles_falls_back(multiply):
    x, weight, scales = random_case(3, 120, 130, 8, (2,))
    quantized = QuantizedMatrix(jnp.asarray(weight), jnp.asarray(scales))
    assert not can_multiply(quantized)
    np.testing.assert_allclose(
        multiply(x, quantized, (1,)), x @ reference.dequantised(weight[1], scales[1]), rtol=1e-4, atol=1e-2
    )


@pytest.mark.parametrize("kernels", [XLA, GPU, TPU], ids=lambda kernels: kernels.backend)
def test_products_with_several_stacks(kernels):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 256)).astype(np.float32)
    stacks = [random_case(5, 256, columns, 1, (2,), seed=columns)[1:] for columns in (384, 128, 130)]
    quantized = [QuantizedMatrix(jnp.asarray(weight), jnp.asarray(scales)) for weight, scales in stacks]
    found = jax.jit(lambda x, weights: kernels.matmuls(x, weights, (1,)))(x, quantized)
    for product, (weight, scales) in zip(found, stacks, strict=True):
        np.testing.assert_allclose(product, x @ reference.dequantised(weight[1], scales[1]), rtol=1e-4, atol=1e-2)


def test_the_index_may_be_traced_and_have_several_axes(multiply):
    x, weight, scales = random_case(4, 48, 10, 8, (2, 3))
    quantized = QuantizedMatrix(jnp.asarray(weight), jnp.asarray(scales))
    for layer in range(2):
        for expert in range(3):
            found = multiply(x, quantized, (jnp.int32(layer), jnp.int32(expert)))
            exact = x.astype(np.float64) @ reference.dequantised(weight[layer, expert], scales[layer, expert])
            np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-2)
