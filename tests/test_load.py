"""What each device holds of a checkpoint, against the files' bytes read and cut another way."""

import contextlib
import dataclasses
import shutil

import ml_dtypes
import numpy as np
import pytest
import reference
from built import require_kernels
from configs import SHARDED

from grok1.checkpoint import byte_ranges, load
from grok1.checkpoint.reader import Checkpoint
from grok1.checkpoint.shards import HostShard, local_shards
from grok1.errors import CheckpointError
from grok1.host.memory import MIN_LOAD_MEMORY, MemoryBudget
from grok1.ops.cpu import library as cpu
from grok1.params.sharding import make_mesh
from grok1.params.tree import parameter_arrays
from grok1.params.weights import QuantizedMatrix

MESHES = [(1, 1), (1, 2), (2, 8), (1, 16), (4, 2)]


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint(SHARDED)


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
            layers = [_parts(files[path.replace("_0/", f"_{i}/", 1)]) for i in range(SHARDED.num_layers)]
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
            query_heads = np.split(np.arange(SHARDED.num_q_heads), shards)[shard]
            heads = np.unique(query_heads * SHARDED.num_kv_heads // SHARDED.num_q_heads)
            columns = (heads[:, None] * SHARDED.key_size + np.arange(SHARDED.key_size)).reshape(-1)
            return array[..., columns]
        case [*_, "multi_head_attention", "linear", "w"] | [*_, "moe", "linear_1", "w"]:
            return rows_scales() if is_scales else share(-2)
    return array


def leaves(params):
    for module, parameters in params.items():
        for name, value in parameters.items():
            path = f"{module}/{name}"
            if isinstance(value, QuantizedMatrix):
                yield path, False, value.values
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


@pytest.mark.parametrize(("shape", "dtype"), [*((shape, np.float32) for shape in MESHES), ((2, 8), ml_dtypes.bfloat16)])
def test_each_device_holds_its_slices(shape, dtype, checkpoint, stacks):
    mesh = make_mesh(SHARDED, shape)
    params = load.load_parameters(checkpoint, mesh, dtype)
    assert_devices_hold_their_parts(params, stacks, mesh, dtype)


def unpacked_parts(leaf):
    """A packed weight's (device, values) on each device."""
    for panels, scales in zip(leaf.values.addressable_shards, leaf.scales.addressable_shards, strict=True):
        assert panels.device == scales.device
        part = dataclasses.replace(leaf, values=np.asarray(panels.data), scales=np.asarray(scales.data))
        yield panels.device, part.unpack().values


@pytest.mark.parametrize(
    ("shape", "load_memory"), [*((shape, MIN_LOAD_MEMORY) for shape in MESHES), ((1, 2), 1000), ((1, 16), 1000)]
)
def test_packed_weights_are_the_same_on_each_device(shape, load_memory, checkpoint, stacks, monkeypatch):
    require_kernels()
    if load_memory < MIN_LOAD_MEMORY:  # pieces of a few values, in any order
        monkeypatch.setattr(load, "MIN_LOAD_MEMORY", 0)
        monkeypatch.setattr(load, "STAGING_BYTES", 64)
        monkeypatch.setattr(byte_ranges, "STAGING_BYTES", 64)
    mesh = make_mesh(SHARDED, shape)
    params = load.load_parameters(checkpoint, mesh, load_memory=load_memory, pack=cpu.pack_box)
    places = {device: place for place, device in np.ndenumerate(mesh.devices)}
    packed = 0
    for module, parameters in params.items():
        for name, leaf in parameters.items():
            path = f"{module}/{name}"
            if isinstance(leaf, QuantizedMatrix):
                packed += 1
                for device, values in unpacked_parts(leaf):
                    expected = part_of_shard(path, stacks[path][0], False, places[device][1], shape[1])
                    np.testing.assert_array_equal(values, expected, err_msg=f"{path} on {device}")
    assert packed == 7


@pytest.fixture
def as_accelerators(monkeypatch):
    """Loads to CPU devices as if they had memory of their own."""
    monkeypatch.setattr(load, "local_shards", lambda array, mesh, *_: local_shards(array, mesh, False))


@pytest.mark.parametrize(("shape", "dtype"), [((2, 2), ml_dtypes.bfloat16), ((1, 8), np.float32)])
def test_filling_arrays_on_the_devices_gives_the_same(shape, dtype, checkpoint, stacks, as_accelerators):
    mesh = make_mesh(SHARDED, shape)
    reports = []
    params = load.load_parameters(checkpoint, mesh, dtype, lambda *report: reports.append(report))
    assert_devices_hold_their_parts(params, stacks, mesh, dtype)
    assert reports[-1][0] == reports[-1][1]


@pytest.mark.parametrize(("shape", "on_host"), [((2, 8), True), ((1, 1), False), ((2, 4), False)])
def test_little_memory_cuts_pieces_and_is_never_exceeded(shape, on_host, checkpoint, stacks, monkeypatch):
    monkeypatch.setattr(load, "MIN_LOAD_MEMORY", 0)
    monkeypatch.setattr(load, "local_shards", lambda array, mesh, *_: local_shards(array, mesh, on_host))
    monkeypatch.setattr(load, "STAGING_BYTES", 64)
    monkeypatch.setattr(byte_ranges, "STAGING_BYTES", 64)
    held = []

    class Watched(MemoryBudget):
        @contextlib.contextmanager
        def hold(self, count):
            with super().hold(count):
                held.append((count, self.held))
                yield

    monkeypatch.setattr(load, "MemoryBudget", Watched)
    mesh = make_mesh(SHARDED, shape)
    params = load.load_parameters(checkpoint, mesh, ml_dtypes.bfloat16, load_memory=1000)
    assert_devices_hold_their_parts(params, stacks, mesh, ml_dtypes.bfloat16)
    assert len(held) > len(checkpoint.table)
    assert max(together for _, together in held) <= 1000
    if on_host:
        return
    # What is held beyond the staging are the pieces, all of them: each distinct part of each array once.
    distinct = 0
    for path, (weight, scales) in stacks.items():
        for is_scales, array in enumerate((weight, scales)):
            if array is not None:
                parts = [part_of_shard(path, array, bool(is_scales), shard, shape[1]) for shard in range(shape[1])]
                distinct += sum(part.nbytes for part in {part.tobytes(): part for part in parts}.values())
    assert sum(count - 64 for count, _ in held) == distinct


def test_too_little_memory_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"load_memory is 15.0 MB, expected at least 16.0 MB"):
        load.load_parameters(checkpoint, make_mesh(SHARDED, (1, 1)), load_memory=15_000_000)


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (4, 2)])
def test_no_byte_is_read_twice(shape, folder, stacks):
    """On one machine that has all shards: also of what several of them hold."""
    checkpoint = Checkpoint.open(folder)
    load.load_parameters(checkpoint, make_mesh(SHARDED, shape))
    arrays = [array for both in stacks.values() for array in both if array is not None]
    assert checkpoint.bytes_read == sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("shards", [8, 16])
def test_a_shard_of_the_release_reads_its_own_bytes_and_no_others(shards, hollow_release):
    """One layer's; as a process does that has the devices of that shard alone."""
    checkpoint = Checkpoint.open(hollow_release)
    chosen = [
        dataclasses.replace(array, files=tuple(file for file in array.files if file.layer == 5))
        for array in parameter_arrays(checkpoint.config)
        if array.spec.stacked
    ]
    held = [[HostShard(array, array.file_key(shards, 3), 1, [])] for array in chosen]
    before = _bytes_read_by_process()
    load.fill_shards(checkpoint, chosen, held)
    after = _bytes_read_by_process()
    experts = 3 * 8 * 6144 * 32768 // shards
    queries_and_output = 2 * 6144 * 6144 // shards
    keys_and_values = 2 * 6144 * 128  # one head each
    scales = 8 * 2 * 32768 // shards * 2 + 8 * 6144 * 2  # of linear and linear_v, and a group of linear_1
    scales += 6144 // shards * 2 + 2 * 128 * 2 + 6144 * 2  # of queries, keys and values, and a group of the output
    norms_and_router = 4 * 6144 * 4 + 6144 * 8 * 4
    expected = experts + queries_and_output + keys_and_values + scales + norms_and_router
    assert checkpoint.bytes_read == expected
    assert expected <= after - before <= expected + 100_000 or before is None


def _bytes_read_by_process():
    """As the system counts them; None where it does not."""
    try:
        with open("/proc/self/io") as file:
            return int(file.readline().removeprefix("rchar: "))
    except OSError:
        return None


def test_shards_that_hold_the_same_share_it(checkpoint):
    """Key/value heads of 16 shards, of which there are 4, and scale groups, of which there are 8."""
    params = load.load_parameters(checkpoint, make_mesh(SHARDED, (1, 16)))
    for path, is_scales, array in leaves(params):
        distinct = {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
        match path.split("/")[-2:], is_scales:
            case ["key" | "value", _], _:
                assert len(distinct) == 4
            case ["linear_1", "w"], True:
                assert len(distinct) == 8


@pytest.mark.parametrize("crowded", [True, False])
def test_files_leave_the_page_cache_only_where_memory_is_short(crowded, folder, monkeypatch):
    checkpoint = Checkpoint.open(folder)
    needed = 2 * checkpoint.total_bytes + MIN_LOAD_MEMORY
    monkeypatch.setattr(load, "available_bytes", lambda: needed if crowded else 2 * needed)
    forgotten = []
    monkeypatch.setattr(Checkpoint, "forget", lambda self, index: forgotten.append(index))
    load.load_parameters(checkpoint, make_mesh(SHARDED, (1, 2)), load_memory=MIN_LOAD_MEMORY)
    assert sorted(forgotten) == (list(range(len(checkpoint.table))) if crowded else [])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_devices_of_a_cpu_share_the_memory_of_data_rows(dtype, checkpoint):
    mesh = make_mesh(SHARDED, (4, 2))
    for path, is_scales, array in leaves(load.load_parameters(checkpoint, mesh, dtype)):
        at = {shard.device: shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
        for column in mesh.devices.T:
            assert len({at[device] for device in column}) == 1, (path, is_scales)


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (4, 2)])
def test_progress_rises_to_the_bytes_that_are_read(shape, checkpoint):
    reports = []
    mesh = make_mesh(SHARDED, shape)
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
        load.load_parameters(opened, make_mesh(SHARDED, (1, 2)))
