import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from grok1.config import PRESETS, ModelConfig
from grok1.errors import MeshError
from grok1.params.sharding import (
    counts,
    default_mesh_shape,
    hosts_of,
    make_mesh,
    mesh_device_order,
    possible_model_shards,
    shard_range,
)

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
        ((1, 3), "divisible by 3"),
        ((1, 5), "divisible by 5"),
        ((2, 6), "divisible by 6"),
        ((1, 32), "needs 32 devices, but only 16"),
        ((1, 12), "divisible by 12"),
        ((3, 8), "needs 24 devices, but only 16"),
        ((17, 1), "needs 17 devices, but only 16"),
        ((0, 8), "expected two numbers above 0"),
        ((2, -1), "expected two numbers above 0"),
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
    named = str(error.value).split()[-1]
    data, model = (int(size) for size in named.split(","))
    assert make_mesh(config, (data, model)).devices.shape == (data, model)


def test_one_device_is_named_rightly():
    with pytest.raises(MeshError, match="only 1 device is available"):
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


@pytest.mark.parametrize(
    ("shape", "hosts", "rows"),
    [
        ((1, 8), "aaaabbbbbb", ["aaaabbbb"]),
        ((2, 4), "aaaabbbbbb", ["aaaa", "bbbb"]),
        ((5, 2), "aaaabbbbbb", ["aa", "aa", "bb", "bb", "bb"]),
        ((1, 4), "aabbbb", ["aabb"]),  # the first host takes part, though the second would do alone
        ((2, 3), "aaaabb", ["aaa", "abb"]),
        ((3, 2), "aaabbb", ["aa", "bb", "ab"]),
        ((2, 2), "abab", ["aa", "bb"]),
        ((1, 1), "ab", ["a"]),
    ],
)
def test_model_shards_stay_on_a_host_as_long_as_it_has_devices(shape, hosts, rows):
    places = mesh_device_order(shape, [ord(host) for host in hosts])
    assert len(set(places)) == len(places) == shape[0] * shape[1]
    assert places[0] == 0
    found = ["".join(hosts[place] for place in places[i * shape[1] : (i + 1) * shape[1]]) for i in range(shape[0])]
    assert found == rows


def test_on_one_host_a_mesh_takes_its_devices_in_their_order():
    assert mesh_device_order((2, 3), [0] * 8) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("hosts", "most_that_do_not_fit", "shape"),
    [
        ((8, 8), 4, (2, 8)),
        ((4, 4), 4, (1, 8)),
        ((4, 6), 4, (1, 8)),
        ((4, 6), 2, (2, 4)),
        ((8, 16, 8), 4, (4, 8)),
        ((1, 1), 0, (2, 1)),
        ((3, 9), 1, (5, 2)),
        ((8,), 4, (1, 8)),
    ],
)
def test_every_host_has_the_model_if_the_smallest_can(hosts, most_that_do_not_fit, shape):
    assert default_mesh_shape(RELEASE, sum(hosts), hosts, lambda shards: shards > most_that_do_not_fit) == shape


def test_devices_of_a_tpu_slice_are_on_one_host_and_others_on_that_of_their_process():
    def devices(platform, slices):
        return [SimpleNamespace(platform=platform, process_index=i, slice_index=of) for i, of in enumerate(slices)]

    assert hosts_of(devices("tpu", [0, 0, 1, 1]), [0, 1, 2, 3]) == [0, 0, 1, 1]
    assert hosts_of(devices("gpu", [0, 0, 0, 0]), [0, 0, 1, 1]) == [0, 0, 1, 1]
    assert counts([5, 5, 2, 5]) == (3, 1)
