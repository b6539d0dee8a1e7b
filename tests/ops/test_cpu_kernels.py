"""The kernels for processors against a float64 product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1.ops import cpu
from grok1.quantize import QuantizedWeight

if cpu.kernel_name() is None:
    pytest.skip("no kernels were built: no C++ compiler was there", allow_module_level=True)

SHAPES = [  # inner, columns, groups, matrices
    (1, 1, 1, 1),
    (16, 64, 1, 1),
    (17, 5, 1, 3),
    (40, 33, 8, 2),
    (100, 70, 4, 3),
    (64, 512, 2, 1),
    (48, 1030, 3, 2),
    (1200, 100, 8, 2),
]


def random_weight(rng, inner, columns, groups, matrices):
    weight = rng.integers(-128, 128, (matrices, inner, columns), dtype=np.int8)
    scales = jnp.asarray(rng.uniform(0.5, 2, (matrices, groups, columns)) / 100, jnp.bfloat16)
    exact = weight * np.repeat(np.asarray(scales, np.float64), inner // groups, axis=1)
    return QuantizedWeight(jnp.asarray(weight), scales), exact


@pytest.fixture(scope="module", params=["portable", cpu.kernel_name()])
def multiply(request):
    return jax.jit(lambda *arguments: cpu.multiply(*arguments, portable=request.param == "portable"))


@pytest.mark.parametrize("rows", [1, 2, 7, 33, 70])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_row_gets_its_matrix(shape, rows, multiply):
    rng = np.random.default_rng(rows)
    weight, exact = random_weight(rng, *shape)
    x = rng.standard_normal((rows, shape[0])).astype(np.float32)
    x *= 10.0 ** rng.integers(-6, 6, (rows, 1))
    index = rng.integers(-1, shape[3], rows)
    found = np.asarray(multiply(x, weight, index))
    assert found.dtype == np.float32
    for row in range(rows):
        expected = x[row].astype(np.float64) @ exact[index[row]] if index[row] >= 0 else np.zeros(shape[1])
        bound = np.abs(x[row]).astype(np.float64) @ np.abs(exact[index[row]])
        assert np.all(np.abs(found[row] - expected) <= 1e-6 * bound + 1e-7 * shape[0] * np.abs(x[row]).max())
        if index[row] < 0:
            assert not found[row].any()


def test_a_row_gives_the_same_bits_in_any_company(multiply):
    rng = np.random.default_rng(0)
    weight, _ = random_weight(rng, 100, 130, 4, 3)
    x = rng.standard_normal((40, 100)).astype(np.float32)
    index = rng.integers(0, 3, 40)
    together = np.asarray(multiply(x, weight, index))
    order = rng.permutation(40)
    np.testing.assert_array_equal(np.asarray(multiply(x[order], weight, index[order])), together[order])
    for row in range(40):
        alone = np.asarray(multiply(x[row : row + 1], weight, index[row : row + 1]))
        np.testing.assert_array_equal(alone[0], together[row])


def test_extreme_weights_do_not_overflow(multiply):
    for value in (-128, 127):
        weight = QuantizedWeight(jnp.full((1, 32768, 64), value, jnp.int8), jnp.ones((1, 1, 64), jnp.bfloat16))
        for sign in (-1, 1):
            x = np.full((1, 32768), sign * 3.0, np.float32)
            np.testing.assert_allclose(multiply(x, weight, np.zeros(1, int)), 32768 * 3.0 * sign * value, rtol=1e-5)


def test_zeros_and_what_is_no_number(multiply):
    weight, _ = random_weight(np.random.default_rng(0), 32, 64, 1, 1)
    x = np.zeros((4, 32), np.float32)
    x[1, 3], x[2, 4], x[3, 5] = np.nan, np.inf, 1
    found = np.asarray(multiply(x, weight, np.zeros(4, int)))
    assert not found[0].any()
    assert not np.isfinite(found[1:3]).all(axis=1).any()
    assert np.isfinite(found[3]).all()


def test_bfloat16_activations(multiply):
    rng = np.random.default_rng(1)
    weight, exact = random_weight(rng, 64, 70, 2, 2)
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.bfloat16)
    found = multiply(x, weight, np.array([1, 0, 1]))
    expected = np.einsum("mk,mkn->mn", np.asarray(x, np.float64), exact[[1, 0, 1]])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
