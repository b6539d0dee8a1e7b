import csv
import shutil
import types

import numpy as np
import pytest

from grok1.checkpoint import hollow
from grok1.checkpoint.pickled.framing import tensor_file_size
from grok1.checkpoint.reader import Checkpoint
from grok1.checkpoint.writer import write_checkpoint
from grok1.config import PRESETS, ModelConfig
from grok1.errors import CheckpointError
from grok1.params.table import tensor_table

RELEASE = PRESETS["grok-1"]


@pytest.fixture
def filled_holes(monkeypatch):
    """A filesystem where every file takes its whole size."""
    monkeypatch.setattr(hollow, "allocated_bytes", lambda status: status.st_size)


def test_every_file_is_as_large_as_the_release_has_it(hollow_release, release_table):
    with release_table.open() as file:
        expected = {row["file"]: int(row["file_bytes"]) for row in csv.DictReader(file, delimiter="\t")}
    found = {path.name: path.stat().st_size for path in (hollow_release / "ckpt-0").iterdir()}
    assert found == expected
    assert (len(found), sum(found.values())) == (770, 318_239_886_140)


def test_almost_nothing_is_on_the_disk_and_the_estimate_is_enough(hollow_release):
    allocated = sum(path.stat().st_blocks * 512 for path in (hollow_release / "ckpt-0").iterdir())
    assert allocated <= sum(map(hollow.hollow_disk_bytes, tensor_table(RELEASE))) < 25_000_000


def test_the_scanner_finds_the_release_in_the_hollow_files(hollow_release, release_table):
    def numbers(shape):
        return "" if shape is None else ",".join(map(str, shape))

    checkpoint = Checkpoint.open(hollow_release)
    assert checkpoint.config == RELEASE
    found = [
        (spec.parameter, numbers(held.array.shape), str(held.array.dtype), numbers(held.scales and held.scales.shape))
        for spec, held in zip(checkpoint.table, checkpoint.tensors, strict=True)
    ]
    with release_table.open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert found == [(row["parameter"], row["shape"], row["dtype"], row["scales_shape"]) for row in rows]
    assert not checkpoint.weight_view(769).any()


def test_config_is_the_presets_and_no_tokenizer_is_made_up(hollow_release):
    assert sorted(path.name for path in hollow_release.iterdir()) == ["ckpt-0", "config.json"]
    assert ModelConfig.read(hollow_release / "config.json") == RELEASE


def test_bytes_around_the_data_are_those_of_a_random_checkpoint(written, tmp_path, small_config, unpickle):
    write_checkpoint(tmp_path, small_config, hollow=True, tokenizer=b"pieces")
    names = sorted(path.name for path in (written / "ckpt-0").iterdir())
    assert sorted(path.name for path in (tmp_path / "ckpt-0").iterdir()) == names
    for name in names:
        full, emptied = written / "ckpt-0" / name, tmp_path / "ckpt-0" / name
        content, held = full.read_bytes(), unpickle(full)
        for array in (held.array, held.scales):
            if array is not None:
                assert content.count(array.tobytes()) == 1
                content = content.replace(array.tobytes(), bytes(array.nbytes))
        assert emptied.read_bytes() == content
        assert not np.any(unpickle(emptied).array)
    for name in ("config.json", "tokenizer.model"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_data_beside_the_frames_is_left_out_too(tmp_path, unpickle):
    """Data of 64 KiB and more stands between frames, smaller data within one."""
    config = PRESETS["tiny"]
    write_checkpoint(tmp_path, config, hollow=True)
    for spec in tensor_table(config)[:14]:
        path = tmp_path / "ckpt-0" / spec.file_name
        assert path.stat().st_size == tensor_file_size(spec)
        assert unpickle(path).array.shape == spec.shape


def test_space_is_asked_for_what_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1_000_000))
    with pytest.raises(CheckpointError, match=r"0\.0\d GB needed, 0\.00 GB free"):
        write_checkpoint(tmp_path / "release", RELEASE, hollow=True)
    assert not (tmp_path / "release").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=5_000_000))
    write_checkpoint(tmp_path / "tiny", PRESETS["tiny"], hollow=True)
    with pytest.raises(CheckpointError, match=r"0\.02 GB needed"):
        write_checkpoint(tmp_path / "random", PRESETS["tiny"])


def test_a_filesystem_that_fills_holes_is_not_filled(tmp_path, monkeypatch, filled_holes):
    config = ModelConfig(
        vocab_size=20_000, emb_size=64, key_size=8, num_q_heads=8, num_layers=30, widening_factor=8, sequence_len=64
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=15_000_000))
    (tmp_path / "mine").touch()
    calls = []
    with pytest.raises(CheckpointError, match=r"does not support sparse files: tensor00000_000 uses 5 MB") as caught:
        write_checkpoint(tmp_path, config, hollow=True, progress=lambda *call: calls.append(call))
    remaining = sum(tensor_file_size(spec) for spec in tensor_table(config)[1:])
    assert f"need {remaining / 1e9:.2f} GB" in str(caught.value)
    assert calls == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_filesystem_that_fills_holes_may_have_the_room(tmp_path, filled_holes):
    write_checkpoint(tmp_path, PRESETS["tiny"], hollow=True)
    assert Checkpoint.open(tmp_path).config == PRESETS["tiny"]


def test_progress_ends_at_the_size_of_all_files(tmp_path, small_config):
    calls = []
    write_checkpoint(tmp_path, small_config, hollow=True, progress=lambda *call: calls.append(call))
    sizes = sum(path.stat().st_size for path in (tmp_path / "ckpt-0").iterdir())
    assert (calls[-1], len(calls)) == ((sizes, sizes), 134)
    assert calls == sorted(calls)


def test_force_replaces_a_hollow_checkpoint_and_a_hollow_one_replaces(tmp_path, small_config):
    write_checkpoint(tmp_path, small_config, hollow=True)
    with pytest.raises(CheckpointError, match="--force"):
        write_checkpoint(tmp_path, small_config, hollow=True)
    write_checkpoint(tmp_path, small_config, force=True)
    assert Checkpoint.open(tmp_path).weight_view(2).any()
    write_checkpoint(tmp_path, small_config, force=True, hollow=True)
    assert not Checkpoint.open(tmp_path).weight_view(2).any()
