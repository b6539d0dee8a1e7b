import concurrent.futures
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grok1.checkpoint.reader import Checkpoint, find_checkpoint
from grok1.checkpoint.writer import write_checkpoint
from grok1.config import ModelConfig
from grok1.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint of one layer whose experts have slices of more and of less than 64 KiB."""
    config = ModelConfig(
        vocab_size=512,
        emb_size=256,
        key_size=8,
        num_q_heads=16,
        num_layers=1,
        widening_factor=3,
        num_experts=4,
        sequence_len=64,
    )
    directory = tmp_path_factory.mktemp("wide")
    write_checkpoint(directory, config)
    return Checkpoint.open(directory)


def test_golden_arrays_are_those_that_unpickling_gives(golden, unpickle):
    checkpoint = Checkpoint.open(golden)
    assert checkpoint.config == ModelConfig.read(golden / "config.json")
    assert checkpoint.directory == golden / "ckpt-0"
    assert checkpoint.total_bytes == sum(path.stat().st_size for path in checkpoint.directory.iterdir())
    for spec in checkpoint.table:
        expected = unpickle(golden / "ckpt-0" / spec.file_name)
        view = checkpoint.weight_view(spec.index)
        assert view.dtype == expected.array.dtype
        assert np.array_equal(view, expected.array)
        scales = checkpoint.scales_view(spec.index)
        if expected.scales is None:
            assert scales is None
        else:
            assert scales.dtype == expected.scales.dtype
            assert np.array_equal(scales, expected.scales)


def test_views_cannot_be_written(written):
    checkpoint = Checkpoint.open(written)
    with pytest.raises(ValueError, match="read-only"):
        checkpoint.weight_view(0)[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        checkpoint.scales_view(2)[0, 0, 0] = 1


def test_opens_the_folder_around_or_the_files_themselves(written):
    for path in (written, written / "ckpt-0"):
        checkpoint = Checkpoint.open(path)
        assert checkpoint.directory == written / "ckpt-0"
        assert checkpoint.config.num_layers == 11


def test_config_in_the_folder_of_files(checkpoint_copy, small_config):
    shutil.move(checkpoint_copy / "config.json", checkpoint_copy / "ckpt-0")
    assert Checkpoint.open(checkpoint_copy).config == small_config


def test_files_in_a_folder_of_another_name(checkpoint_copy):
    (checkpoint_copy / "ckpt-0").rename(checkpoint_copy / "weights")
    assert find_checkpoint(checkpoint_copy / "weights") == checkpoint_copy / "weights"
    assert Checkpoint.open(checkpoint_copy / "weights").config.num_layers == 11


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.touch()])
def test_no_checkpoint_says_how_to_get_one(tmp_path, make):
    path = tmp_path / "models"
    make(path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)
    assert "checkpoints/README.md" in str(caught.value)
    assert "`grok1 init bard --preset bard` and pass -c bard" in str(caught.value)


def test_a_folder_that_only_sounds_like_tensors_is_none(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        find_checkpoint(tmp_path)


def fault(path):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_file_missing(checkpoint_copy):
    (checkpoint_copy / "ckpt-0" / "tensor00133_000").unlink()
    assert "1 of 134 files is missing or damaged: tensor00133_000 is missing; " in fault(checkpoint_copy)


def test_one_file_too_many(checkpoint_copy):
    (checkpoint_copy / "ckpt-0" / "tensor00134_000").touch()
    assert "1 of 134 files is missing or damaged: tensor00134_000 is unexpected; " in fault(checkpoint_copy)


def test_other_files_do_not_matter(checkpoint_copy):
    for name in (".DS_Store", "README.md", ".tensor00134_000.part"):
        (checkpoint_copy / "ckpt-0" / name).touch()
    assert len(Checkpoint.open(checkpoint_copy).tensors) == 134


def test_faults_are_counted_and_the_first_three_listed(checkpoint_copy):
    files = checkpoint_copy / "ckpt-0"
    for index in (3, 5, 7, 9):
        (files / f"tensor{index:05d}_000").unlink()
    (files / "tensor00004_000").write_bytes(b"")
    (files / "tensor99999_000").touch()
    sentence = fault(checkpoint_copy)
    assert "6 of 134 files are missing or damaged" in sentence
    listed = [f"tensor{index:05d}_000" in sentence for index in (3, 4, 5, 7, 9, 99999)]
    assert listed == [True, True, True, False, False, False]
    assert "and 3 more" in sentence


def test_swapped_files(checkpoint_copy):
    first, second = (checkpoint_copy / "ckpt-0" / f"tensor{index:05d}_000" for index in (2, 3))
    first.rename(checkpoint_copy / "third")
    second.rename(first)
    (checkpoint_copy / "third").rename(second)
    sentence = fault(checkpoint_copy)
    assert "2 of 134 files" in sentence
    assert (
        "tensor00003_000 (transformer/decoder_layer_0/moe/linear_1/w) contains scales bfloat16 (3, 1, 16), "
        "expected bfloat16 (3, 8, 16)"
    ) in sentence


def test_another_vocabulary_than_the_config_says(checkpoint_copy, small_config):
    text = small_config.to_json().replace('"vocab_size": 24', '"vocab_size": 32')
    (checkpoint_copy / "config.json").write_text(text)
    sentence = fault(checkpoint_copy)
    assert "1 of 134 files is missing or damaged: tensor00000_000 (language_model/in_out_embed/embeddings)" in sentence
    assert "contains float32 (24, 16), expected float32 (32, 16)" in sentence


def test_a_quantised_file_where_a_plain_one_is_expected(checkpoint_copy):
    files = checkpoint_copy / "ckpt-0"
    shutil.copy(files / "tensor00005_000", files / "tensor00001_000")
    sentence = fault(checkpoint_copy)
    assert "tensor00001_000 (language_model/rms_norm/scale) contains int8 (16, 8), expected float32 (16,)" in sentence


def test_a_hostile_file_among_good_ones(checkpoint_copy):
    (checkpoint_copy / "ckpt-0" / "tensor00001_000").write_bytes(b"\x80\x04cos\nsystem\n.")
    sentence = fault(checkpoint_copy)
    assert "1 of 134 files is missing or damaged: tensor00001_000: at byte 2, opcode GLOBAL" in sentence
    assert "'os.system'" in sentence


def test_without_a_config_it_is_taken_for_the_release(checkpoint_copy):
    (checkpoint_copy / "config.json").unlink()
    sentence = fault(checkpoint_copy)
    assert "of 770 files are missing or damaged" in sentence
    assert "expected float32 (131072, 6144)" in sentence
    assert "config.json" in sentence


def test_a_config_that_is_none(checkpoint_copy):
    (checkpoint_copy / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json"):
        Checkpoint.open(checkpoint_copy)
    (checkpoint_copy / "config.json").unlink()
    os.mkfifo(checkpoint_copy / "config.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(checkpoint_copy)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 5, 13])
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_read_into_any_slice(wide, index, data):
    scales = data.draw(st.booleans()) and wide.tensors[index].scales is not None
    whole = np.array(wide.scales_view(index) if scales else wide.weight_view(index))
    key = []
    for size in whole.shape[: data.draw(st.integers(0, whole.ndim))]:
        start = data.draw(st.integers(0, size))
        key.append(data.draw(st.sampled_from([slice(None), slice(start, None), slice(0, start), slice(-start, -1)])))
    expected = whole[tuple(key)]
    out = np.full(expected.shape, 99, whole.dtype)
    wide.read_into(index, out, tuple(key), scales=scales)
    assert np.array_equal(out, expected)


def test_read_into_in_several_threads(wide):
    whole = np.array(wide.weight_view(3))

    def read(number):
        columns = slice(16 * number, 16 * (number + 1))
        out = np.empty((4, 512, 16), np.int8)
        wide.read_into(3, out, (slice(None), slice(None), columns))
        rows = np.empty((2, 512 - number, 256), np.int8)
        wide.read_into(3, rows, (slice(1, 3), slice(number, None)))
        return np.array_equal(out, whole[:, :, columns]) and np.array_equal(rows, whole[1:3, number:])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, [number % 16 for number in range(64)]))


@pytest.mark.parametrize(
    ("out", "key"),
    [
        (np.empty((4, 512, 255), np.int8), ()),
        (np.empty((4, 512, 256), np.uint8), ()),
        (np.empty((4, 256, 512), np.int8).transpose(0, 2, 1), ()),
        (np.empty((4, 256, 256), np.int8), (slice(None), slice(None, None, 2))),
        (np.empty((4, 512, 256), np.int8), (slice(None),) * 4),
        (np.broadcast_to(np.int8(0), (4, 512, 256)), ()),
    ],
)
def test_read_into_refuses_what_does_not_fit(wide, out, key):
    with pytest.raises(ValueError, match=r"slice|out is"):
        wide.read_into(3, out, key)


def test_scales_of_a_plain_array(wide):
    with pytest.raises(ValueError, match="no scales"):
        wide.read_into(0, np.empty((1,), np.float32), scales=True)


def test_a_file_that_changes_after_opening(checkpoint_copy):
    checkpoint = Checkpoint.open(checkpoint_copy)
    path = checkpoint.directory / "tensor00003_000"
    out = np.empty(checkpoint.table[3].shape, np.int8)
    column = np.empty((*out.shape[:2], 1), np.int8)
    os.truncate(path, checkpoint.tensors[3].array.offset + 20)
    with pytest.raises(CheckpointError, match=r"tensor00003_000 was truncated"):
        checkpoint.read_into(3, out)
    with pytest.raises(CheckpointError, match=r"tensor00003_000 was truncated"):
        checkpoint.read_into(3, column, (slice(None), slice(None), slice(0, 1)))
    os.truncate(path, 0)
    with pytest.raises(CheckpointError, match=r"tensor00003_000"):
        checkpoint.weight_view(3)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tensor00003_000.*No such file"):
        checkpoint.read_into(3, out)
    with pytest.raises(CheckpointError, match=r"tensor00003_000.*No such file"):
        checkpoint.scales_view(3)


def test_views_of_all_files_share_one_descriptor_a_file(written):
    checkpoint = Checkpoint.open(written)
    before = len(os.listdir("/dev/fd"))
    views = [(checkpoint.weight_view(index), checkpoint.scales_view(index)) for index in range(134)]
    assert len(os.listdir("/dev/fd")) <= before + 134
    del views
    assert len(os.listdir("/dev/fd")) == before
