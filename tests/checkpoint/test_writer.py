import errno
import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from grok1.checkpoint import writer
from grok1.checkpoint.pickled.framing import tensor_file_size
from grok1.checkpoint.reader import Checkpoint
from grok1.checkpoint.writer import write_checkpoint
from grok1.config import PRESETS, ModelConfig
from grok1.errors import CheckpointError
from grok1.params import table as parameters
from grok1.params.table import tensor_table


def contents(directory):
    """Every file and folder below a folder, hidden ones too, with what it holds."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def one_layer(**changes):
    values = {"vocab_size": 40, "emb_size": 16, "key_size": 2, "num_q_heads": 8, "num_layers": 1}
    return ModelConfig(**{**values, "widening_factor": 2, "sequence_len": 32, **changes})


def test_files_are_those_that_a_pickler_writes(written, unpickle, small_config):
    table = tensor_table(small_config)
    assert sorted(path.name for path in (written / "ckpt-0").iterdir()) == [spec.file_name for spec in table]
    for spec in table:
        found = unpickle(written / "ckpt-0" / spec.file_name)
        assert (found.array.dtype, found.array.shape) == (spec.dtype, spec.shape)
        assert found.array.flags.c_contiguous
        assert (None if found.scales is None else found.scales.shape) == spec.scales_shape
    assert ModelConfig.read(written / "config.json") == small_config
    assert (written / "tokenizer.model").read_bytes() == b"pieces"
    assert sorted(path.name for path in written.iterdir()) == ["ckpt-0", "config.json", "tokenizer.model"]


def test_same_seed_same_bytes_and_another_seed_others(written, tmp_path, small_config):
    write_checkpoint(tmp_path / "same", small_config, seed=3, tokenizer=b"pieces")
    assert contents(tmp_path / "same") == contents(written)
    write_checkpoint(tmp_path / "other", small_config, seed=4, tokenizer=b"pieces")
    ours, theirs = contents(tmp_path / "other"), contents(written)
    same = [name for name in ours if ours[name] == theirs[name]]
    assert same == ["ckpt-0", "config.json", "tokenizer.model"]


def test_values_do_not_change_with_the_version(written):
    """A checkpoint is named by its preset and seed, so its values may not change with any version."""
    checkpoint, digest = Checkpoint.open(written), hashlib.sha256()
    for spec in checkpoint.table:
        values = checkpoint.weight_view(spec.index)
        # Of the float values only the signs, as their size is a matter of tuning.
        digest.update(values.tobytes() if spec.scales_shape else np.signbit(values).tobytes())
    assert digest.hexdigest() == "99beb130395b65ab766f1e38b606f223642bc8105828755c064610ae25a1d23b"


def test_no_two_tensors_are_alike(written):
    checkpoint = Checkpoint.open(written)
    starts = {checkpoint.weight_view(spec.index).tobytes()[:16] for spec in checkpoint.table}
    assert len(starts) == 134


def test_sizes_of_the_values(tmp_path):
    config = ModelConfig(
        vocab_size=2048,
        emb_size=128,
        key_size=16,
        num_q_heads=12,
        num_kv_heads=4,
        num_layers=2,
        widening_factor=6,
        output_multiplier_scale=0.5,
    )
    write_checkpoint(tmp_path, config)
    checkpoint = Checkpoint.open(tmp_path)
    std, means = {}, {}
    for spec in checkpoint.table:
        values = np.array(checkpoint.weight_view(spec.index), np.float64)
        scales = checkpoint.scales_view(spec.index)
        if scales is not None:
            assert values.min() == -127
            assert values.max() == 127
            rows = spec.shape[-2] // spec.scales_shape[-2]
            values *= np.repeat(scales.astype(np.float64), rows, axis=-2)
        name = spec.parameter.split("/", 2)[-1] if spec.layer is not None else spec.parameter
        std[name], means[name] = values.std(), values.mean()
    near = {"rel": 0.06}
    embedding = std["language_model/in_out_embed/embeddings"]
    length = embedding * config.embedding_multiplier_scale * math.sqrt(128)
    assert length == pytest.approx(parameters.EMBEDDED_NORM, **near)
    for name, inputs in (("linear", 128), ("linear_v", 128), ("linear_1", config.ffn_size)):
        assert std[f"moe/{name}/w"] == pytest.approx(1 / math.sqrt(inputs), **near)
    for name, expected in (("key", 128), ("value", 128), ("linear", 192)):
        assert std[f"multi_head_attention/{name}/w"] == pytest.approx(1 / math.sqrt(expected), **near)
    query = std["multi_head_attention/query/w"] * math.sqrt(128)
    assert query == pytest.approx(parameters.QUERY_GAIN, **near)
    assert std["router/w"] * math.sqrt(128) == pytest.approx(parameters.ROUTER_GAIN, **near)
    for name, expected in (("rms_norm", 1), ("rms_norm_1", 0.5), ("rms_norm_2", 1), ("rms_norm_3", 0.5)):
        assert means[f"{name}/scale"] == pytest.approx(expected, **near)
        assert std[f"{name}/scale"] > 0.05 * expected
    final = means["language_model/rms_norm/scale"]
    logit = final * math.sqrt(128) * embedding * config.output_multiplier_scale
    assert logit == pytest.approx(parameters.LOGIT_STD, **near)


def test_scales_differ_between_groups_and_columns(written):
    scales = Checkpoint.open(written).scales_view(3).astype(np.float32)  # [3, 8, 16]
    for axis in range(3):
        spread = scales.max(axis=axis) / scales.min(axis=axis)
        assert np.median(spread) > 1.3
        assert spread.min() > 1
    assert 2 < scales.max() / scales.min() <= 4


def test_memory_is_far_below_a_tensor(tmp_path):
    config = one_layer(vocab_size=16384, emb_size=256)
    tracemalloc.start()
    try:
        write_checkpoint(tmp_path, config)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tensor_file_size(tensor_table(config)[0]) > 16_000_000
    assert peak < 6_000_000
    # Every chunk of the largest tensor is there: none is missing, none comes twice.
    rows = Checkpoint.open(tmp_path).weight_view(0)
    assert len(np.unique(rows.view(np.uint32)[:, :2], axis=0)) == 16384


def test_progress_goes_from_little_to_all(tmp_path):
    calls = []
    write_checkpoint(tmp_path, one_layer(), progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    total = Checkpoint.open(tmp_path).total_bytes
    assert calls[-1] == (total, total)
    assert len(calls) > 14


@pytest.mark.parametrize("name", ["ckpt-0", "config.json", "tokenizer.model"])
def test_existing_files_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    (tmp_path / "notes.txt").write_text("mine as well")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=f"already contains {re.escape(name)}.*--force"):
        write_checkpoint(tmp_path, one_layer())
    assert contents(tmp_path) == before


def test_force_replaces_the_checkpoint_and_nothing_else(tmp_path):
    write_checkpoint(tmp_path / "model", one_layer(), tokenizer=b"old")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    write_checkpoint(tmp_path / "model", one_layer(vocab_size=48), force=True)
    assert Checkpoint.open(tmp_path / "model").config.vocab_size == 48
    # The old tokenizer belonged to the old model.
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["ckpt-0", "config.json", "notes.txt"]


def test_force_replaces_a_link_and_leaves_its_target(tmp_path):
    write_checkpoint(tmp_path / "disk", one_layer())
    before = contents(tmp_path / "disk")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "ckpt-0").symlink_to(tmp_path / "disk" / "ckpt-0")
    write_checkpoint(tmp_path / "model", one_layer(vocab_size=48), force=True)
    assert Checkpoint.open(tmp_path / "model").config.vocab_size == 48
    assert not (tmp_path / "model" / "ckpt-0").is_symlink()
    assert contents(tmp_path / "disk") == before


def test_other_content_is_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write_checkpoint(tmp_path, one_layer())
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_tensor_files_is_no_place_for_a_config(written, force):
    with pytest.raises(CheckpointError, match="already contains tensor files"):
        write_checkpoint(written / "ckpt-0", one_layer(), force=force)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file is a file, expected a directory"):
        write_checkpoint(tmp_path / "file", one_layer())
    with pytest.raises(CheckpointError, match=r"Not a directory"):
        write_checkpoint(tmp_path / "file" / "model", one_layer())


def test_a_negative_seed(tmp_path):
    with pytest.raises(CheckpointError, match="seed is -1, expected 0 or more"):
        write_checkpoint(tmp_path, one_layer(), seed=-1)


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    config = PRESETS["grok-1"]
    free = SimpleNamespace(free=318_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(CheckpointError, match=r"318\.24 GB needed, 318\.00 GB free"):
        write_checkpoint(tmp_path / "new" / "model", config)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("error", "raised", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError, "No space left on device; free disk space"),
        (OSError(errno.EACCES, "Permission denied"), CheckpointError, "choose a writable directory"),
        (OSError(errno.EIO, "Input/output error"), CheckpointError, "Input/output error"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_a_failure_while_writing_leaves_what_was_there(tmp_path, error, raised, sentence):
    write_checkpoint(tmp_path / "old", one_layer(), tokenizer=b"old")
    before = contents(tmp_path)

    def fail(done, total):
        if done > total // 2:
            raise error

    for directory in (tmp_path / "old", tmp_path / "new" / "model"):
        with pytest.raises(raised, match=sentence):
            write_checkpoint(directory, one_layer(vocab_size=48), force=True, progress=fail)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", range(6))
def test_a_failure_at_any_rename_restores_what_was_there(tmp_path, monkeypatch, number, after, error):
    write_checkpoint(tmp_path, one_layer(), tokenizer=b"old")
    before = contents(tmp_path)
    rename, calls = os.rename, []

    def fail_once(source, target):
        calls.append(target)
        if len(calls) == number + 1:
            if after:
                rename(source, target)
            raise error
        rename(source, target)

    monkeypatch.setattr(writer.os, "rename", fail_once)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        write_checkpoint(tmp_path, one_layer(vocab_size=48), force=True, tokenizer=b"new")
    assert len(calls) > number
    assert contents(tmp_path) == before


def test_what_cannot_be_moved_back_is_not_deleted(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, one_layer())
    before = contents(tmp_path / "ckpt-0")
    rename, calls = os.rename, []

    def fail_from_the_third(source, target):
        calls.append(target)
        if len(calls) > 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(writer.os, "rename", fail_from_the_third)
    with pytest.raises(CheckpointError, match="move it back by hand") as caught:
        write_checkpoint(tmp_path, one_layer(vocab_size=48), force=True)
    old = re.search(r"it is in (.*), move", str(caught.value))[1]
    assert contents(Path(old) / "ckpt-0") == before


def run_writer(directory, kill):
    """Replaces a checkpoint in a process of its own that kills itself at the place `kill` says."""
    program = f"""
import os, signal
from pathlib import Path
from grok1.checkpoint import random_weights, writer
from grok1.config import ModelConfig

def die():
    os.kill(os.getpid(), signal.SIGKILL)

progress = None
{kill}
config = ModelConfig.from_json({one_layer(vocab_size=48).to_json()!r})
writer.write_checkpoint(Path({str(directory)!r}), config, force=True, tokenizer=b"new", progress=progress)
"""
    return subprocess.run([sys.executable, "-c", program], check=False, cwd=Path(__file__).parents[2]).returncode


def test_a_writer_killed_while_writing_shows_no_checkpoint(tmp_path):
    kill = "progress = lambda done, total: die() if done > total // 2 else None"
    assert run_writer(tmp_path / "new", kill) == -signal.SIGKILL
    assert [path.name[:12] for path in (tmp_path / "new").iterdir()] == [".grok1-init-"]
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Checkpoint.open(tmp_path / "new")
    # What is left does not stop the next writer.
    write_checkpoint(tmp_path / "new", one_layer())
    assert Checkpoint.open(tmp_path / "new").config == one_layer()


@pytest.mark.parametrize("number", range(6))
def test_a_writer_killed_while_replacing_shows_no_mixture(tmp_path, number):
    write_checkpoint(tmp_path, one_layer(), tokenizer=b"old")
    kill = f"""
rename, calls = os.rename, []
def rename_or_die(source, target):
    calls.append(target)
    if len(calls) > {number}:
        die()
    rename(source, target)
writer.os.rename = rename_or_die
"""
    assert run_writer(tmp_path, kill) == -signal.SIGKILL
    if (tmp_path / "ckpt-0").exists():
        assert Checkpoint.open(tmp_path).config == one_layer()
        assert (tmp_path / "tokenizer.model").read_bytes() == b"old"
        assert number == 0
    else:
        kept = list(tmp_path.glob(".grok1-init-*/old/ckpt-0"))
        assert len(kept) == 1
        assert len(list(kept[0].iterdir())) == 14
