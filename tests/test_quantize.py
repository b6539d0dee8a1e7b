import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference

from grok1.params.weights import Panels, QuantizedMatrix, panels_shape


def random_weight(shape, groups, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, shape).astype(np.int8)
    scales = rng.uniform(0.5, 2, (*shape[:-2], groups, shape[-1])).astype(ml_dtypes.bfloat16)
    return QuantizedMatrix(jnp.asarray(weight), jnp.asarray(scales))


@pytest.mark.parametrize(("shape", "groups"), [((8, 3), 1), ((8, 3), 8), ((24, 5), 8), ((2, 3, 16, 4), 8), ((1, 1), 1)])
def test_dequantize_scales_each_group_of_rows(shape, groups):
    weight = random_weight(shape, groups)
    expected = reference.dequantised(np.asarray(weight.values), np.asarray(weight.scales))
    np.testing.assert_allclose(weight.dequantize(), expected, rtol=1e-6)
    assert weight.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    assert (weight.shape, weight.dtype, weight.groups) == (shape, jnp.int8, groups)


def test_it_is_one_pytree():
    weight = random_weight((2, 8, 3), 8)
    doubled = jax.jit(lambda w: QuantizedMatrix(w.values, w.scales * 2))(weight)
    np.testing.assert_array_equal(doubled.values, weight.values)
    np.testing.assert_array_equal(doubled.scales.astype(jnp.float32), 2 * weight.scales.astype(jnp.float32))
    assert len(jax.tree.leaves(weight)) == 2


@pytest.mark.parametrize(("rows", "columns", "groups"), [(8, 16, 1), (6, 20, 2), (10, 1, 1), (24, 33, 4)])
def test_panels_hold_quads_of_four_rows_and_sixteen_columns(rows, columns, groups):
    """Value (k, n) of group g is byte k % 4 of column n % 16 in quad k // 4 of panel n // 16, plus 128."""
    rng = np.random.default_rng(rows)
    values = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
    scales = jnp.ones((groups, columns), jnp.bfloat16)
    per_group = rows // groups
    quads = -(-per_group // 4)
    panels = rng.integers(0, 256, panels_shape((rows, columns), groups)).astype(np.uint8)
    for k in range(rows):
        for n in range(columns):
            group, row = divmod(k, per_group)
            panels[n // 16, group * quads + row // 4, 4 * (n % 16) + row % 4] = int(values[k, n]) + 128
    packed = QuantizedMatrix(jnp.asarray(panels), scales, layout=Panels(per_group))
    assert packed.shape == (rows, columns)
    np.testing.assert_array_equal(packed.unpack().values, values)
