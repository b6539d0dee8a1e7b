"""Estimates, compared with loaded arrays and with independent calculations."""

import dataclasses
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from grok1.checkpoint.load import load_parameters
from grok1.checkpoint.reader import Checkpoint
from grok1.config import PRESETS
from grok1.engine.engine import Engine
from grok1.errors import DeviceKindError
from grok1.host import memory
from grok1.params.sharding import make_mesh, possible_model_shards
from grok1.params.table import num_active_parameters, tensor_table
from grok1.plan.devices import DEVICE_KINDS, DeviceKind, Devices, named_devices, present_devices
from grok1.plan.estimate import Estimate, next_fit, smallest_fit, widest_split

RELEASE = PRESETS["grok-1"]
TINY = PRESETS["tiny"]
MESHES = [(1, 1), (1, 8), (2, 4), (8, 1), (1, 16), (2, 8)]
GPU = DeviceKind("gpu", "gpu", None, 1e12, 1e15)
CPU = DeviceKind("cpu", "cpu", None, 1e11, 1e12)


def estimate(config=RELEASE, mesh=(1, 8), kind=GPU, usable=10**12, dtype="bfloat16", count=None):
    return Estimate(config, Devices(kind, count or mesh[0] * mesh[1], usable), mesh, dtype)


def bytes_by_device(tree):
    held = Counter()
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", MESHES)
def test_bytes_match_the_arrays_on_each_device(shape, dtype, make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint(TINY))
    mesh = make_mesh(TINY, shape)
    params = load_parameters(checkpoint, mesh, np.dtype(dtype))
    planned = estimate(TINY, shape, dtype=dtype)
    assert bytes_by_device(params) == dict.fromkeys(mesh.devices.flat, planned.weight_bytes)

    engine = Engine(TINY, params, mesh, np.dtype(dtype))
    slots = 3 * shape[0]
    cache = bytes_by_device(engine.new_cache(slots))
    assert cache == dict.fromkeys(mesh.devices.flat, 3 * planned.cache_bytes)


def test_the_release_needs_the_bytes_of_its_files():
    files = sum(
        math.prod(spec.shape) * spec.dtype.itemsize + 2 * math.prod(spec.scales_shape or (0,))
        for spec in tensor_table(RELEASE)
    )
    assert estimate(mesh=(1, 1), dtype="float32").weight_bytes == files
    embedding = RELEASE.vocab_size * RELEASE.emb_size
    assert estimate(mesh=(1, 1), dtype="bfloat16").weight_bytes == files - 2 * embedding


def test_decoding_one_sequence_reads_two_experts_per_layer():
    read = 0
    for spec in tensor_table(RELEASE):
        size = math.prod(spec.shape) * spec.dtype.itemsize + 2 * math.prod(spec.scales_shape or (0,))
        read += size // 4 if "/moe/" in spec.parameter else size
    assert estimate(mesh=(1, 1), dtype="float32").decode_read_bytes(1, 0) == read
    position = 2 * 64 * 8 * 128 * 4
    assert estimate(mesh=(1, 1), dtype="float32").decode_read_bytes(1, 1000) == read + 1000 * position


def test_decoding_a_batch_reads_the_mean_number_of_distinct_experts():
    config = dataclasses.replace(TINY, num_experts=5)
    choices = list(itertools.combinations(range(5), 2))
    distinct = [len({*a, *b, *c}) for a, b, c in itertools.product(choices, repeat=3)]
    planned = estimate(config, (2, 1))
    experts = sum(
        math.prod(spec.shape) + 2 * math.prod(spec.scales_shape)
        for spec in tensor_table(config)
        if "/moe/" in spec.parameter
    )
    other = planned.weight_bytes - experts
    mean = sum(distinct) / len(distinct)
    assert planned.decode_read_bytes(6, 0) == pytest.approx(other + experts * mean / 5, abs=1)  # 3 sequences per row


def test_decoding_the_release_on_eight_h100_is_memory_bound():
    planned = estimate(kind=DEVICE_KINDS["h100-80gb"], dtype="float32")
    # 84 GB per token at 26.8 TB/s
    assert planned.decode_tokens_per_second(1, 0) == pytest.approx(319, rel=0.03)
    assert planned.decode_tokens_per_second(1, 8192) < planned.decode_tokens_per_second(1, 0)


def test_many_tokens_are_compute_bound():
    slow = dataclasses.replace(GPU, flops=1e12)
    planned = estimate(kind=slow)
    operations = 2 * num_active_parameters(RELEASE) * 512 + 4 * 64 * 6144 * 512 * 256
    assert planned.prefill_seconds(512) == pytest.approx(operations / 8e12)
    assert planned.prefill_seconds(2048) > 4 * planned.prefill_seconds(512)
    decode = 8 * 2 * num_active_parameters(RELEASE) / 8e12
    assert planned.decode_seconds(8, 0) == pytest.approx(decode)


@pytest.mark.parametrize(("mesh", "usable"), [((1, 8), 60 * 10**9), ((2, 4), 90 * 10**9), ((8, 1), 340 * 10**9)])
def test_one_more_sequence_than_reported_does_not_fit(mesh, usable):
    planned = estimate(mesh=mesh, usable=usable)
    count = planned.sequences
    assert count > 0
    assert count % mesh[0] == 0
    assert planned.needed_bytes(count) <= usable < planned.needed_bytes(count + 1)


def test_data_rows_on_a_cpu_share_the_weights():
    one, rows = estimate(mesh=(1, 2), kind=CPU), estimate(mesh=(4, 2), kind=CPU)
    caches = 3 * 2 * (one.workspace_bytes + one.cache_bytes)
    assert rows.needed_bytes(4) - one.needed_bytes(1) == caches
    assert one.fixed_bytes > 2 * one.weight_bytes


def test_cpu_devices_share_memory_bandwidth():
    one, split = (estimate(mesh=mesh, kind=CPU, dtype="float32") for mesh in [(1, 1), (1, 8)])
    # Equal except for norms and routers, which are replicated.
    assert split.decode_seconds(1, 0) == pytest.approx(one.decode_seconds(1, 0), rel=2e-3)


def test_speed_is_unknown_without_bandwidth():
    planned = estimate(kind=dataclasses.replace(GPU, bandwidth=None))
    assert planned.decode_tokens_per_second(1, 0) is None
    assert planned.prefill_tokens_per_second(10) is None


def test_fit_is_unknown_without_memory():
    planned = estimate(usable=None)
    assert planned.fits is None
    assert planned.sequences is None


@pytest.mark.parametrize("gigabytes", [15, 21, 24, 45, 73, 100, 170, 330])
def test_smallest_fit(gigabytes):
    devices = Devices(GPU, 1, gigabytes * 10**9)
    found = smallest_fit(RELEASE, devices, "bfloat16")
    each = {
        shards: estimate(mesh=(1, shards), usable=devices.usable_bytes) for shards in possible_model_shards(RELEASE, 64)
    }
    fitting = [shards for shards, planned in each.items() if planned.needed_bytes(1) <= devices.usable_bytes]
    assert found.mesh == (1, min(fitting, default=16))
    assert found.fits == bool(fitting)


def test_next_fit_changes_mesh_then_dtype_then_number_of_devices():
    too_many_rows = estimate(mesh=(4, 2), usable=60 * 10**9)
    assert not too_many_rows.fits
    assert next_fit(too_many_rows).mesh == (1, 8)
    assert next_fit(too_many_rows).devices.count == 8

    wide = estimate(mesh=(1, 8), dtype="float32")
    between = dataclasses.replace(wide, dtype="bfloat16").needed_bytes() + 1000
    barely = estimate(mesh=(1, 8), dtype="float32", usable=between)
    assert (next_fit(barely).mesh, next_fit(barely).dtype) == ((1, 8), "bfloat16")

    few = estimate(mesh=(1, 2), usable=60 * 10**9)
    assert (next_fit(few).mesh, next_fit(few).devices.count) == ((1, 8), 8)

    nowhere = estimate(mesh=(1, 8), usable=10**9)
    assert next_fit(nowhere) is None
    assert widest_split(nowhere).mesh == (1, 256)


def test_more_cpu_devices_add_no_memory():
    assert next_fit(estimate(mesh=(1, 1), kind=CPU, usable=10**10)) is None


# Devices


def fake(name, platform="gpu", **stats):
    return SimpleNamespace(device_kind=name, platform=platform, memory_stats=lambda: stats or None)


@pytest.mark.parametrize(
    ("name", "platform", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", "h100-80gb"),
        ("NVIDIA H200", "gpu", "h200"),
        ("NVIDIA A100-SXM4-80GB", "gpu", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "gpu", "a100-40gb"),
        ("TPU v4", "tpu", "tpu-v4"),
        ("TPU v5 lite", "tpu", "tpu-v5e"),
        ("TPU v5", "tpu", "tpu-v5p"),
        ("TPU v6 lite", "tpu", "tpu-v6e"),
    ],
)
def test_present_devices_are_recognized(name, platform, kind):
    devices = [fake(name, platform, bytes_limit=70, bytes_in_use=used) for used in (10, 30, 20)]
    found = present_devices(devices)
    assert found == Devices(DEVICE_KINDS[kind], 3, 40)


def test_unknown_devices_have_only_memory():
    found = present_devices([fake("Quantum 9", bytes_limit=50)])
    assert (found.kind.name, found.kind.bandwidth, found.usable_bytes) == ("Quantum 9", None, 50)
    assert present_devices([fake("Quantum 9")]).usable_bytes is None


def test_present_cpu_memory_is_the_available_memory(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 123)
    assert present_devices(jax.devices()).usable_bytes == 123


def test_named_devices():
    assert named_devices("H200", 4).count == 4
    assert 0.9 * 141e9 < named_devices("h200", 1).usable_bytes < 141e9
    assert named_devices("h200", 1, 10**9).usable_bytes < 10**9
    with pytest.raises(DeviceKindError, match='unknown device kind "abacus", expected one of a100'):
        named_devices("abacus", 1)


def test_unknown_memory_of_a_cpu_must_be_specified(monkeypatch):
    monkeypatch.setattr(memory, "total_bytes", lambda: None)
    with pytest.raises(DeviceKindError, match="specify it with --memory"):
        named_devices("cpu", 1)


def test_workspace_of_the_release():
    # 2048 positions x (131072 logits + 2 x 2 x 32768 / 8 expert activations + 8 x 6144 others) x 4 bytes
    assert estimate(mesh=(1, 8)).workspace_bytes == 1_610_612_736
    assert estimate(mesh=(1, 1), kind=CPU).workspace_bytes == 512 * (131072 + 131072 + 49152) * 4
