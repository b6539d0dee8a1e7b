import csv
import dataclasses
import math
import pickletools

import pytest

from grok1.checkpoint.audit.inspect import inspect_checkpoint
from grok1.checkpoint.reader import Checkpoint
from grok1.checkpoint.writer import write_checkpoint
from grok1.config import PRESETS
from grok1.errors import CheckpointError
from grok1.params.table import Kind, num_active_parameters, num_parameters


@pytest.fixture(scope="module")
def small(written):
    """What is in a random checkpoint of 11 layers."""
    return inspect_checkpoint(Checkpoint.open(written))


@pytest.fixture(scope="module")
def release(hollow_release):
    """What is in the hollow release."""
    return inspect_checkpoint(Checkpoint.open(hollow_release))


def test_totals_are_those_of_the_files(small, written):
    files = list((written / "ckpt-0").iterdir())
    assert len(small.tensors) == len(files)
    assert small.file_bytes == sum(path.stat().st_size for path in files)
    assert small.allocated_bytes == sum(path.stat().st_blocks * 512 for path in files)
    assert not small.hollow


def test_kinds_cover_every_file_once(small, written):
    kinds = small.kinds()
    assert tuple(kind.kind for kind in kinds) == tuple(Kind)
    # Per layer 3 matrices of experts, 4 of attention, 4 norms and a router; and the final norm.
    assert [kind.count for kind in kinds] == [1, 33, 44, 45, 11]
    assert [sum(kind.forms.values()) for kind in kinds] == [1, 33, 44, 45, 11]
    for kind in kinds:
        names = [tensor.spec.file_name for tensor in small.tensors if tensor.spec.kind == kind.kind]
        assert kind.file_bytes == sum((written / "ckpt-0" / name).stat().st_size for name in names)
    assert sum(kind.parameters for kind in kinds) == small.parameters


def test_parameters_agree_with_the_config_and_the_shapes(small, small_config):
    assert small.parameters == num_parameters(small_config)
    assert small.parameters == sum(math.prod(tensor.stored.array.shape) for tensor in small.tensors)
    assert small.active_parameters == num_active_parameters(small_config)


def test_layers_come_by_number_and_not_by_file(small):
    layers = [tensor.spec.layer for tensor in small.tensors]
    assert layers == [None] + [layer for layer in range(11) for _ in range(12)] + [None]
    assert [tensor.spec.kind for tensor in small.tensors if tensor.spec.layer is None] == ["embedding", "norms"]
    by_layer = {tensor.spec.layer: tensor.spec.file_name for tensor in reversed(small.tensors)}
    assert (by_layer[2], by_layer[10]) == ("tensor00038_000", "tensor00026_000")
    for tensor in small.tensors:
        if tensor.spec.layer is not None:
            assert tensor.spec.parameter.startswith(f"transformer/decoder_layer_{tensor.spec.layer}/")


def test_offsets_lead_to_the_arrays(small, written, unpickle):
    for tensor in small.tensors:
        path, stored = written / "ckpt-0" / tensor.spec.file_name, tensor.stored
        content, held = path.read_bytes(), unpickle(path)
        assert content[stored.array.offset :].startswith(held.array.tobytes())
        assert (stored.array.shape, stored.array.dtype) == (held.array.shape, held.array.dtype)
        if held.scales is None:
            assert stored.scales is None
        else:
            assert content[stored.scales.offset :].startswith(held.scales.tobytes())
            assert stored.scales.shape == held.scales.shape


def test_offsets_of_data_beside_the_frames(tmp_path):
    """The standard library's disassembler says where the bytes of a large array end: where the next opcode is."""
    config = dataclasses.replace(PRESETS["tiny"], num_layers=1)
    write_checkpoint(tmp_path, config)
    inspection = inspect_checkpoint(Checkpoint.open(tmp_path))
    (linear,) = (tensor for tensor in inspection.tensors if tensor.spec.parameter.endswith("moe/linear_v/w"))
    size = math.prod(linear.stored.array.shape)
    assert size > 64 * 1024
    opcodes = list(pickletools.genops((tmp_path / "ckpt-0" / linear.spec.file_name).read_bytes()))
    ends = {
        opcodes[number + 1][2]
        for number, (opcode, argument, _) in enumerate(opcodes)
        if opcode.name == "BINBYTES" and len(argument) == size
    }
    assert ends == {linear.stored.array.offset + size}


def test_the_release(release, release_table):
    assert release.file_bytes == 318_239_886_140
    assert release.parameters == num_parameters(PRESETS["grok-1"])
    assert release.active_parameters == num_active_parameters(PRESETS["grok-1"])
    assert [kind.count for kind in release.kinds()] == [1, 192, 256, 257, 64]
    with release_table.open() as file:
        rows = {row["file"]: row for row in csv.DictReader(file, delimiter="\t")}
    for tensor in release.tensors:
        row = rows.pop(tensor.spec.file_name)
        assert (tensor.spec.parameter, tensor.file_bytes) == (row["parameter"], int(row["file_bytes"]))
        assert tensor.stored.array.shape == tuple(map(int, row["shape"].split(",")))
    assert not rows


def test_hollow_is_what_the_disk_says(release, hollow_release, small):
    assert release.hollow
    assert release.allocated_bytes == sum(path.stat().st_blocks * 512 for path in (hollow_release / "ckpt-0").iterdir())
    assert not small.hollow


def test_forms_of_the_experts(release):
    forms = release.kinds()[1].forms
    assert [(array.shape, str(array.dtype), scales.shape, count) for (array, scales), count in forms.items()] == [
        ((8, 6144, 32768), "int8", (8, 1, 32768), 128),
        ((8, 32768, 6144), "int8", (8, 8, 6144), 64),
    ]


def test_a_file_that_is_gone_since_it_was_opened(checkpoint_copy):
    checkpoint = Checkpoint.open(checkpoint_copy)
    (checkpoint_copy / "ckpt-0" / "tensor00005_000").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*tensor00005_000"):
        inspect_checkpoint(checkpoint)
