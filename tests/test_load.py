"""What each device holds of a checkpoint, against the files' bytes read and cut another way."""

import shutil

import ml_dtypes
import numpy as np
import pytest
import reference

from grok1.checkpoint import load
from grok1.checkpoint.reader import Checkpoint
from grok1.config import ModelConfig
from grok1.errors import CheckpointError
from grok1.quantize import QuantizedWeight
from grok1.sharding import make_mesh

CONFIG = ModelConfig(
    vocab_size=32,
    emb_size=16,
    key_size=2,
    num_q_heads=16,
    num_kv_heads=4,
    num_layers=12,
    widening_factor=3,
    num_experts=3,
    sequence_len=8,
)
MESHES = [(1, 1), (1, 2), (2, 8), (1, 16), (4, 2)]


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint(CONFIG)


@pytest.fixture(scope="module")
def checkpoint(folder):
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def stacks(folder):
    """The files' arrays as (weight, scales or None), the layers of a parameter stacked, by Haiku path."""
    files = reference.read_files(folder)
    paths = [path for path in files if path.startswith("language_model/")]
    first = "transformer/decoder_layer_0/"
    stacked = {path: _parts(files[path]) for path in paths}
    for path in files:
        if path.startswith(first):
            layers = [_parts(files[path.replace("_0/", f"_{i}/", 1)]) for i in range(CONFIG.num_layers)]
            weights, scales = zip(*layers, strict=True)
            both = np.stack(weights), None if scales[0] is None else np.stack(scales)
            stacked[path.replace("_0/", "/", 1)] = both
    return stacked


def _parts(value):
    return (value, None) if isinstance(value, np.ndarray) else (value.weight, value.scales)


def part_of_shard(path, array, is_scales, shard, shards):
    """What one model shard needs of a whole array, from the multiplication that it takes part in."""

    def share(axis):
        return np.split(array, shards, axis)[shard]

    def rows_scales():
        # The groups whose rows are among those of the shard.
        of_row = np.repeat(np.arange(8), 48)  # any multiple of 8 and 16 rows shows it
        needed = np.unique(np.split(of_row, shards)[shard])
        return array[..., needed, :]

    match path.split("/")[-3:]:
        case [*_, "in_out_embed", "embeddings"]:
            return share(0)
        case [*_, "multi_head_attention", "query", "w"] | [*_, "moe", "linear" | "linear_v", "w"]:
            return share(-1)
        case [*_, "multi_head_attention", "key" | "value", "w"]:
            query_heads = np.split(np.arange(CONFIG.num_q_heads), shards)[shard]
            heads = np.unique(query_heads * CONFIG.num_kv_heads // CONFIG.num_q_heads)
            columns = (heads[:, None] * CONFIG.key_size + np.arange(CONFIG.key_size)).reshape(-1)
            return array[..., columns]
        case [*_, "multi_head_attention", "linear", "w"] | [*_, "moe", "linear_1", "w"]:
            return rows_scales() if is_scales else share(-2)
    return array


def leaves(params):
    for module, parameters in params.items():
        for name, value in parameters.items():
            path = f"{module}/{name}"
            if isinstance(value, QuantizedWeight):
                yield path, False, value.weight
                yield path, True, value.scales
            else:
                yield path, False, value


def assert_devices_hold_their_parts(params, stacks, mesh, dtype):
    places = {device: place for place, device in np.ndenumerate(mesh.devices)}
    paths = set()
    for path, is_scales, array in leaves(params):
        paths.add(path)
        whole = stacks[path][is_scales]
        if path.endswith("embeddings"):
            whole = whole.astype(dtype)
        assert array.dtype == whole.dtype
        assert {shard.device for shard in array.addressable_shards} == set(places)
        for held in array.addressable_shards:
            _, shard = places[held.device]
            expected = part_of_shard(path, whole, is_scales, shard, mesh.devices.shape[1])
            np.testing.assert_array_equal(np.asarray(held.data), expected, err_msg=f"{path} on {held.device}")
    assert paths == set(stacks)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", MESHES)
def test_each_device_holds_its_slices(shape, dtype, checkpoint, stacks):
    mesh = make_mesh(CONFIG, shape)
    params = load.load_parameters(checkpoint, mesh, dtype)
    assert_devices_hold_their_parts(params, stacks, mesh, dtype)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 2), ml_dtypes.bfloat16), ((1, 16), np.float32)])
def test_filling_arrays_on_the_devices_gives_the_same(shape, dtype, checkpoint, stacks, monkeypatch):
    """The way of accelerators."""
    monkeypatch.setattr(load, "_fill_on_host", load._fill_on_device)
    mesh = make_mesh(CONFIG, shape)
    reports = []
    params = load.load_parameters(checkpoint, mesh, dtype, lambda *report: reports.append(report))
    assert_devices_hold_their_parts(params, stacks, mesh, dtype)
    assert reports[-1][0] == reports[-1][1]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_devices_of_a_cpu_share_the_memory_of_data_rows(dtype, checkpoint):
    mesh = make_mesh(CONFIG, (4, 2))
    for path, is_scales, array in leaves(load.load_parameters(checkpoint, mesh, dtype)):
        at = {shard.device: shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
        for column in mesh.devices.T:
            assert len({at[device] for device in column}) == 1, (path, is_scales)


@pytest.mark.parametrize("shape", MESHES)
def test_progress_rises_to_the_bytes_that_are_read(shape, checkpoint):
    reports = []
    mesh = make_mesh(CONFIG, shape)
    params = load.load_parameters(checkpoint, mesh, progress=lambda *report: reports.append(report))
    done, totals = zip(*reports, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}
    in_memory = sum(shard.data.nbytes for _, _, array in leaves(params) for shard in array.addressable_shards)
    assert done[-1] == in_memory // shape[0]  # data rows share what is read


def test_a_file_cut_short_while_loading_is_an_error(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    opened = Checkpoint.open(copy)
    path = copy / "ckpt-0" / "tensor00007_000"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="tensor00007_000"):
        load.load_parameters(opened, make_mesh(CONFIG, (1, 2)))
