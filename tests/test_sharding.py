import dataclasses

import jax
import numpy as np
import pytest

from grok1.config import PRESETS, ModelConfig
from grok1.errors import MeshError
from grok1.sharding import default_mesh_shape, make_mesh, possible_model_shards, shard_range

RELEASE = ModelConfig()


def test_the_release_divides_into_powers_of_two():
    assert possible_model_shards(RELEASE, 64) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("devices", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 2)), (6, (1, 4)), (8, (1, 8)), (15, (1, 8)), (16, (1, 16))]
)
def test_by_default_as_many_devices_as_divide_are_on_the_model_axis(devices, shape):
    assert default_mesh_shape(RELEASE, devices) == shape
    mesh = make_mesh(RELEASE, devices=jax.devices()[:devices])
    assert (mesh.devices.shape, mesh.axis_names) == (shape, ("data", "model"))


def test_a_mesh_takes_the_first_devices_in_order():
    mesh = make_mesh(RELEASE, (2, 4), jax.devices()[3:])
    assert mesh.devices.reshape(-1).tolist() == jax.devices()[3:11]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((1, 3), "divide by 3"),
        ((1, 5), "divide by 5"),
        ((2, 6), "divide by 6"),
        ((1, 32), "needs 32 devices, but 16"),
        ((1, 12), "divide by 12"),
        ((3, 8), "needs 24 devices, but 16"),
        ((17, 1), "needs 17 devices, but 16"),
        ((0, 8), "empty axis"),
        ((2, -1), "empty axis"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_one_that_works(shape, reason):
    with pytest.raises(MeshError, match=reason) as error:
        make_mesh(RELEASE, shape)
    assert_names_a_mesh_that_works(error, RELEASE)


@pytest.mark.parametrize(
    ("changes", "shards", "reason"),
    [
        ({"num_q_heads": 12, "num_kv_heads": 4}, 8, "12 query heads"),
        ({"emb_size": 6145}, 16, "expert width"),
        ({"vocab_size": 131074}, 4, "vocabulary"),
        ({"num_q_heads": 48, "num_kv_heads": 3}, 2, "key/value heads"),
        ({"num_kv_heads": 12}, 8, "key/value heads"),
    ],
)
def test_what_does_not_divide_is_named(changes, shards, reason):
    config = dataclasses.replace(RELEASE, **changes)
    with pytest.raises(MeshError, match=reason) as error:
        make_mesh(config, (1, shards))
    assert_names_a_mesh_that_works(error, config)


def assert_names_a_mesh_that_works(error, config):
    named = str(error.value).replace(", or more devices", "").split()[-1]
    data, model = (int(size) for size in named.split(","))
    assert make_mesh(config, (data, model)).devices.shape == (data, model)


def test_one_device_is_named_rightly():
    with pytest.raises(MeshError, match="1 device is here"):
        make_mesh(PRESETS["tiny"], (1, 2), jax.devices()[:1])


def test_more_shards_than_divide_the_heads_hold_the_same_ones():
    parts = [shard_range(6144, 48, 64, shard) for shard in range(64)]
    assert [part.start for part in parts] == [384 * (shard // 4) for shard in range(64)]
    assert {part.stop - part.start for part in parts} == {384}


@pytest.mark.parametrize(("units", "length"), [(8, 24), (16, 16), (1, 5), (48, 48), (8, 8)])
@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16])
def test_shards_hold_neighbouring_parts_that_cover_the_axis(units, length, shards):
    parts = [np.arange(length)[shard_range(length, units, shards, shard)] for shard in range(shards)]
    if shards <= units:
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(length))
        assert len({len(part) for part in parts}) == 1
    else:
        copies = shards // units
        for shard, part in enumerate(parts):
            np.testing.assert_array_equal(part, np.split(np.arange(length), units)[shard // copies])
