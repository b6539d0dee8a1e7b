import jax
import jax.numpy as jnp
import numpy as np
import pytest
from built import require_kernels

from grok1.checkpoint.load import load_parameters
from grok1.checkpoint.reader import Checkpoint
from grok1.ops.cpu import library as cpu
from grok1.params.random import random_parameters
from grok1.params.sharding import make_mesh


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("mesh", "dtype"), [((1, 1), np.float32), ((2, 4), jnp.bfloat16)], ids=str)
def test_it_is_shaped_and_placed_as_what_loading_gives(mesh, dtype, packed, small_config, make_checkpoint):
    if packed:
        require_kernels()
    device_mesh = make_mesh(small_config, mesh)
    checkpoint = Checkpoint.open(make_checkpoint(small_config))
    loaded = load_parameters(checkpoint, device_mesh, dtype, pack=cpu.pack_box if packed else None)
    made = random_parameters(small_config, device_mesh, dtype, packed)
    assert jax.tree.structure(made) == jax.tree.structure(loaded)
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(loaded), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_values_are_spread_and_repeat_with_their_seed(small_config):
    mesh = make_mesh(small_config, (1, 1))
    first, again, other = (jax.tree.leaves(random_parameters(small_config, mesh, seed=seed)) for seed in (1, 1, 2))
    differing = 0
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        differing += not np.array_equal(a, c)
        if a.dtype == np.int8:
            values = np.asarray(a, float)
            assert abs(values.mean()) < 5 * 74 / values.size**0.5
            assert abs(values.std() - 74) < 4  # of even ones from -128 to 127
            assert abs(np.corrcoef(values[..., 1:].ravel(), values[..., :-1].ravel())[0, 1]) < 5 / values.size**0.5
    assert differing > len(first) / 3  # all but norms and scales


def test_values_do_not_depend_on_the_mesh(small_config):
    whole = random_parameters(small_config, make_mesh(small_config, (1, 1)))
    parts = random_parameters(small_config, make_mesh(small_config, (2, 4)))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(one, other)
