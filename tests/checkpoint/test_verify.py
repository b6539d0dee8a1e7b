import dataclasses
import hashlib
import os
import re
import shutil
import subprocess

import ml_dtypes
import numpy as np
import pytest

from grok1.checkpoint.audit import content
from grok1.checkpoint.audit import manifest as manifests
from grok1.checkpoint.audit.manifest import read_manifest
from grok1.checkpoint.audit.verify import verify
from grok1.checkpoint.pickled.framing import Payload, tensor_file_size, tensor_segments
from grok1.checkpoint.writer import write_checkpoint
from grok1.config import PRESETS, ModelConfig
from grok1.errors import CheckpointError
from grok1.params.table import tensor_table

KINDS = {
    0: "language_model/in_out_embed/embeddings",
    1: "language_model/rms_norm/scale",
    26: "transformer/decoder_layer_10/moe/linear/w",
    27: "transformer/decoder_layer_10/moe/linear_1/w",
    28: "transformer/decoder_layer_10/moe/linear_v/w",
    29: "transformer/decoder_layer_10/multi_head_attention/key/w",
    30: "transformer/decoder_layer_10/multi_head_attention/linear/w",
    31: "transformer/decoder_layer_10/multi_head_attention/query/w",
    32: "transformer/decoder_layer_10/multi_head_attention/value/w",
    33: "transformer/decoder_layer_10/rms_norm/scale",
    37: "transformer/decoder_layer_10/router/w",
}
"""A file of each kind of tensor, of the layer whose place shows a mistaken order."""


def name(index):
    return f"tensor{index:05d}_000"


def faulty(report):
    return [fault.file for fault in report.faults]


@pytest.fixture
def files(checkpoint_copy):
    return checkpoint_copy / "ckpt-0"


@pytest.fixture
def rewrite(files, dump, unpickle):
    """Changes the arrays of a file: the function gets (array, scales) and returns such a pair, or None for the same."""

    def rewrite(index, change):
        value = unpickle(files / name(index))
        scales = None if value.scales is None else value.scales.copy()
        changed = change(value.array.copy(), scales)
        (files / name(index)).write_bytes(dump(*changed))

    return rewrite


def test_a_checkpoint_as_written_is_right(written, small_config):
    report = verify(written, content=True)
    assert (report.files, report.faults, report.warnings) == (134, [], [])
    assert report.config == small_config
    assert report.structure.total_bytes == sum(path.stat().st_size for path in (written / "ckpt-0").iterdir())


def test_the_golden_checkpoint_is_right(golden):
    report = verify(golden, content=True)
    assert (report.faults, report.warnings) == ([], [])


@pytest.mark.parametrize("index", KINDS)
class TestEachKindOfTensor:
    def test_is_the_one_that_is_named(self, index, small_config):
        assert tensor_table(small_config)[index].parameter == KINDS[index]

    def test_missing(self, files, index):
        (files / name(index)).unlink()
        report = verify(files)
        assert [str(fault) for fault in report.faults] == [f"{name(index)} is missing"]
        assert report.faults[0].advice == "download it"

    def test_cut_by_a_byte(self, files, index):
        path = files / name(index)
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-1])
        report = verify(files)
        assert faulty(report) == [name(index)]
        assert f"1 byte too short ({size - 1:,}, expected {size:,})" in report.faults[0].fault

    def test_grown_by_a_byte(self, files, index):
        path = files / name(index)
        path.write_bytes(path.read_bytes() + b"\0")
        report = verify(files)
        assert faulty(report) == [name(index)]
        assert "1 byte too long " in report.faults[0].fault

    def test_another_shape(self, files, rewrite, index):
        rewrite(index, lambda array, scales: (np.concatenate([array, array], axis=-1), scales))
        report = verify(files)
        assert faulty(report) == [name(index)]
        assert f"({KINDS[index]}) contains " in report.faults[0].fault

    def test_another_dtype(self, files, rewrite, index):
        rewrite(index, lambda array, scales: (array.astype(np.float64), scales))
        report = verify(files)
        assert faulty(report) == [name(index)]
        assert "dtype 'f8'" in report.faults[0].fault

    def test_swapped_with_a_file_of_another_shape(self, files, index):
        other = 1 if index != 1 else 37
        shape = tensor_table(verify(files).config)[index].shape
        if shape == (16,):
            other = 37
        swap(files / name(index), files / name(other))
        report = verify(files)
        assert faulty(report) == sorted([name(index), name(other)])
        by_file = {fault.file: fault for fault in report.faults}
        assert f"it has the contents of {name(other)} (" in by_file[name(index)].fault
        assert f"it has the contents of {name(index)} ({KINDS[index]})" in by_file[name(other)].fault


def swap(first, second):
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])


def test_every_fault_is_listed_in_the_order_of_the_files(files):
    for index in (3, 5, 7, 9, 100):
        (files / name(index)).unlink()
    (files / name(4)).write_bytes(b"")
    (files / name(99999)).touch()
    assert faulty(verify(files)) == [name(index) for index in (3, 4, 5, 7, 9, 100, 99999)]


def test_names_shifted_by_one_are_seen_by_shape(files):
    """As after a copy that numbered the files anew without the one that was missing."""
    for index in range(5, 134):
        if index + 1 < 134:
            (files / name(index + 1)).rename(files / name(index))
    report = verify(files)
    first = report.faults[0]
    assert first.file == name(5)
    assert f"has the contents of {name(6)} (" in first.fault
    assert report.faults[-1].file == name(133)


# Content


def set_scale(value):
    def change(array, scales):
        scales.flat[-1] = ml_dtypes.bfloat16(value)
        return array, scales

    return change


def set_value(value):
    def change(array, scales):
        array.flat[-1] = value
        return array, scales

    return change


def fill(value, part=...):
    def change(array, scales):
        array[part] = value
        return array, scales

    return change


@pytest.mark.parametrize(
    ("index", "change", "fault"),
    [
        (28, set_scale(np.nan), "has 1 NaN or infinite scales"),
        (27, set_scale(np.inf), "has 1 NaN or infinite scales"),
        (31, set_scale(0.0), "has 1 zero scales"),
        (30, set_scale(-0.5), "has 1 negative scales"),
        (30, set_scale(-0.0), "has 1 zero scales"),
        (33, set_value(np.nan), "1 NaN or infinite values of 16"),
        (1, set_value(-np.inf), "1 NaN or infinite values of 16"),
        (37, set_value(np.nan), "1 NaN or infinite values of 48"),
        (0, set_value(np.inf), "1 NaN or infinite values of 384"),
        (0, fill(0), "has only zeros"),
        (36, fill(0), "has only zeros"),
        (37, fill(0.5), "has only the value 0.5"),
        (29, fill(7), "has only the value 7"),
        (32, fill(0), "has only zeros"),
        (26, fill(0), "has only zeros in matrices 0, 1, 2 of 3"),
        (26, fill(0, 1), "has only zeros in matrices 1 of 3"),
        (27, fill(0, (2, slice(4, 6))), "a single value in scale group 18 of 24"),
        (30, fill(-3, slice(0, 2)), "a single value in scale group 0 of 8"),
    ],
)
def test_arrays_that_no_weight_can_be(files, rewrite, index, change, fault):
    rewrite(index, change)
    assert verify(files).faults == []  # the structure is right
    report = verify(files, content=True)
    assert faulty(report) == [name(index)]
    assert fault in report.faults[0].fault
    assert report.warnings == []


def test_a_stretch_of_zeros_within_a_matrix(files, rewrite, monkeypatch):
    monkeypatch.setattr(content, "_CHUNK", 16)  # otherwise such a stretch has megabytes
    rewrite(31, fill(0, slice(3, 5)))
    report = verify(files, content=True)
    assert faulty(report) == [name(31)]
    assert "has 32 zero bytes" in report.faults[0].fault


def test_all_content_faults_of_a_checkpoint_at_once(files, rewrite):
    rewrite(2, set_scale(np.nan))
    rewrite(133, set_value(np.nan))
    rewrite(64, fill(0))
    (files / name(10)).unlink()
    assert faulty(verify(files, content=True)) == [name(2), name(10), name(64), name(133)]


def test_unlikely_values_are_warnings(files, rewrite):
    rewrite(29, fill(-128, (slice(0, 2), slice(0, 4))))
    rewrite(33, set_value(-1))
    report = verify(files, content=True)
    assert report.faults == []
    assert [warning.file for warning in report.warnings] == [name(29), name(33)]
    assert "-128 8 times in 128" in report.warnings[0].fault
    assert "as low as -1" in report.warnings[1].fault


def test_few_different_values_are_a_warning(tmp_path, dump):
    config = ModelConfig(
        vocab_size=8, emb_size=128, key_size=16, num_q_heads=8, num_layers=1, widening_factor=1, num_experts=2
    )
    write_checkpoint(tmp_path / "model", config)
    spec = next(spec for spec in tensor_table(config) if spec.parameter.endswith("query/w"))
    values = np.arange(spec.num_weights).astype(np.int8).reshape(spec.shape) % 4
    path = tmp_path / "model" / "ckpt-0" / spec.file_name
    path.write_bytes(dump(values, np.ones(spec.scales_shape, ml_dtypes.bfloat16)))
    report = verify(tmp_path / "model", content=True)
    assert report.faults == []
    assert [warning.file for warning in report.warnings] == [spec.file_name]
    assert "only 4 different values" in report.warnings[0].fault


def write_hollow(path, spec):
    """The file with holes in place of its data; whether the disk makes them."""
    with path.open("wb") as file:
        for segment in tensor_segments(spec):
            if isinstance(segment, Payload):
                file.seek(segment.nbytes, os.SEEK_CUR)
            else:
                file.write(segment)
    return path.stat().st_blocks * 512 * 4 < tensor_file_size(spec)


def test_a_hollow_checkpoint_is_one_fault(tmp_path):
    config = PRESETS["tiny"]
    folder = tmp_path / "ckpt-0"
    folder.mkdir()
    (tmp_path / "config.json").write_text(config.to_json())
    made = [write_hollow(folder / spec.file_name, spec) for spec in tensor_table(config)]
    if not any(made):
        pytest.skip("the filesystem does not support sparse files")
    assert verify(tmp_path).faults == []
    report = verify(tmp_path, content=True)
    assert report.hollow
    assert len(report.faults) == 1
    assert "ckpt-0 is hollow" in str(report.faults[0])


def test_a_hollow_file_among_good_ones(tmp_path):
    config = PRESETS["tiny"]
    write_checkpoint(tmp_path / "model", config)
    spec = tensor_table(config)[4]
    if not write_hollow(tmp_path / "model" / "ckpt-0" / spec.file_name, spec):
        pytest.skip("the filesystem does not support sparse files")
    report = verify(tmp_path / "model", content=True)
    assert not report.hollow
    assert faulty(report) == [spec.file_name]
    assert "is hollow" in report.faults[0].fault


def test_content_progress_reaches_the_bytes_of_all_arrays(written, small_config):
    seen = []
    verify(written, content=True, progress=lambda *step: seen.append(step))
    total = sum(spec.array_bytes for spec in tensor_table(small_config))
    assert seen[-1] == ("checking values", total, total)


# Manifests


@pytest.fixture
def manifest(tmp_path, checkpoint_copy):
    """The manifest of `checkpoint_copy`."""
    path = tmp_path / "grok1.sha256"
    verify(checkpoint_copy, new_manifest=path)
    return path


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were hashed."""
    names, original = [], manifests.hash_file

    def hash_file(path, advance):
        names.append(path.name)
        return original(path, advance)

    monkeypatch.setattr(manifests, "hash_file", hash_file)
    return names


def test_a_manifest_lists_every_file_with_its_hash_and_size(manifest, checkpoint_copy):
    entries = read_manifest(manifest)
    paths = [path for path in checkpoint_copy.rglob("*") if path.is_file()]
    assert set(entries) == {path.relative_to(checkpoint_copy).as_posix() for path in paths}
    for path in paths:
        entry = entries[path.relative_to(checkpoint_copy).as_posix()]
        assert (entry.sha256, entry.size) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    assert {path.name for path in manifest.parent.iterdir()} == {manifest.name, checkpoint_copy.name}  # nothing else


def test_a_manifest_is_right_for_its_checkpoint(manifest, checkpoint_copy):
    assert verify(checkpoint_copy, manifest=manifest).faults == []
    checkpoint_copy.rename(checkpoint_copy.with_name("moved"))
    report = verify(checkpoint_copy.with_name("moved"), manifest=manifest)
    assert (report.faults, report.warnings) == ([], [])


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_agrees(manifest, files):
    command = ["sha256sum", "--check", "--strict", "--quiet", str(manifest)]
    assert subprocess.run(command, cwd=files.parent, capture_output=True).returncode == 0
    flip_a_byte(files / name(28))
    done = subprocess.run(command, cwd=files.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, f"ckpt-0/{name(28)}: FAILED\n")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
@pytest.mark.parametrize("within", [".", "ckpt-0"])
def test_a_manifest_of_sha256sum_is_understood(tmp_path, files, within):
    names = [path.relative_to(files.parent / within).as_posix() for path in sorted(files.iterdir())]
    done = subprocess.run(["sha256sum", *names], cwd=files.parent / within, capture_output=True, check=True)
    (tmp_path / "sums").write_bytes(done.stdout)
    assert verify(files, manifest=tmp_path / "sums").faults == []
    flip_a_byte(files / name(5))
    assert faulty(verify(files, manifest=tmp_path / "sums")) == [name(5)]


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_found(manifest, files):
    flip_a_byte(files / name(26))
    flip_a_byte(files.parent / "tokenizer.model")
    assert verify(files).faults == []
    report = verify(files, manifest=manifest)
    assert faulty(report) == [name(26), "tokenizer.model"]
    assert ", expected " in report.faults[0].fault
    assert report.to_fetch == [name(26), "tokenizer.model"]


def test_layers_in_numeric_order_are_detected_by_hash(manifest, files):
    """Layers 2 and 10 in each other's place: every shape is right."""
    for index in range(26, 38):
        swap(files / name(index), files / name(index + 12))
    assert verify(files, content=True).faults == []
    report = verify(files, manifest=manifest)
    assert faulty(report) == [name(index) for index in range(26, 50)]
    assert f"has the contents of {name(38)}" in report.faults[0].fault
    assert report.to_fetch == []


def test_a_file_that_took_the_place_of_another_has_to_be_fetched(manifest, files):
    shutil.copy(files / name(26), files / name(38))
    report = verify(files, manifest=manifest)
    assert report.to_fetch == faulty(report) == [name(38)]
    assert report.faults[0].advice == "download it again"


def test_a_file_is_listed_once(manifest, files):
    (files / name(26)).write_bytes(b"")
    (files / name(27)).unlink()
    assert faulty(verify(files, content=True, manifest=manifest)) == [name(26), name(27)]


def test_files_that_the_manifest_does_not_list(manifest, files):
    lines = [line for line in manifest.read_text().splitlines(keepends=True) if name(26) not in line]
    manifest.write_text("".join(line for line in lines if "tokenizer" not in line))
    report = verify(files, manifest=manifest)
    assert faulty(report) == [name(26)]
    assert report.to_fetch == []
    assert [warning.file for warning in report.warnings] == ["tokenizer.model"]


def test_no_manifest_of_a_damaged_checkpoint(tmp_path, files, rewrite):
    rewrite(33, set_value(np.nan))
    assert verify(files, content=True, new_manifest=tmp_path / "sums").faults
    assert not (tmp_path / "sums").exists()


@pytest.mark.parametrize("place", ["config.json", "ckpt-0/tensor00001_000", "ckpt-0", "absent/sums"])
def test_a_manifest_that_cannot_be_written_there(checkpoint_copy, place):
    before = {path: path.read_bytes() for path in checkpoint_copy.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=re.escape(place)):
        verify(checkpoint_copy, new_manifest=checkpoint_copy / place)
    assert {path: path.read_bytes() for path in checkpoint_copy.rglob("*") if path.is_file()} == before


HASH = "0" * 64


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (f"{HASH}  /etc/passwd", "absolute path"),
        (f"{HASH}  C:/tensor", "absolute path"),
        (f"{HASH}  ../ckpt-0/{name(0)}", "invalid path"),
        (f"{HASH}  ckpt-0/../../x", "invalid path"),
        (f"{HASH}  ckpt-0//x", "invalid path"),
        (f"{HASH}  ckpt-0\\x", "characters"),
        (f"{HASH}  a\x1bb", "characters"),
        (f"{HASH} {name(0)}", "invalid line"),
        (f"{HASH[1:]}  {name(0)}", "invalid line"),
        (f"{'g' * 64}  {name(0)}", "invalid line"),
        (f"{HASH}", "invalid line"),
        (f"{'1' * 64}  ckpt-0/{name(0)}", "listed twice"),
        (b"\xff\xfe", "invalid UTF-8"),
    ],
)
def test_lines_that_no_manifest_has(tmp_path, written, line, why):
    text = f"# a comment\n{HASH}  ckpt-0/{name(0)}\n".encode() + (line if isinstance(line, bytes) else line.encode())
    (tmp_path / "sums").write_bytes(text + b"\n")
    with pytest.raises(CheckpointError, match=r"sums, line 3: .*" + re.escape(why)):
        verify(written, manifest=tmp_path / "sums")


def test_manifests_that_are_none(tmp_path, written):
    (tmp_path / "empty").touch()
    for path in (tmp_path / "empty", tmp_path / "absent", tmp_path):
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            verify(written, manifest=path)


class Killed(BaseException):
    """Stands in for whatever ends a run."""


def kill_after(count):
    """Progress that ends the run once that many bytes were read."""

    def progress(stage, done, total):
        if done >= count:
            raise Killed

    return progress


@pytest.mark.parametrize("option", ["new_manifest", "manifest"])
def test_an_interrupted_run_goes_on_where_it_was(files, manifest, hashed, option):
    with pytest.raises(Killed):
        verify(files, **{option: manifest}, progress=kill_after(20_000))
    cache = manifest.with_name(manifest.name + ".partial")
    lines = cache.read_text().splitlines()[1:]
    done = [line.split()[-1].rpartition("/")[2] for line in lines]
    assert 0 < len(done) < 136
    cache.write_text(cache.read_text() + lines[0][:70])  # what a kill leaves of a line
    hashed.clear()
    report = verify(files, **{option: manifest})
    assert (report.resumed, report.faults) == (len(done), [])
    everything = [name(index) for index in range(134)] + ["config.json", "tokenizer.model"]
    assert sorted(hashed) == sorted(set(everything) - set(done))
    assert not cache.exists()
    assert verify(files, manifest=manifest).faults == []


def test_a_file_that_changed_since_is_hashed_again(files, manifest, hashed):
    with pytest.raises(Killed):
        verify(files, manifest=manifest, progress=kill_after(20_000))
    cache = manifest.with_name(manifest.name + ".partial")
    first = cache.read_text().splitlines()[1].split()[-1].rpartition("/")[2]
    status = (files / first).stat()
    flip_a_byte(files / first)
    os.utime(files / first, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    hashed.clear()
    assert faulty(verify(files, manifest=manifest)) == [first]
    assert first in hashed


def test_the_hashes_of_another_checkpoint_counts_for_nothing(files, manifest, hashed):
    with pytest.raises(Killed):
        verify(files, manifest=manifest, progress=kill_after(20_000))
    files.parent.rename(files.parent.with_name("moved"))
    hashed.clear()
    assert verify(files.parent.with_name("moved"), manifest=manifest).resumed == 0
    assert len(hashed) == 136


def test_the_command_that_fetches_the_release_again(tmp_path):
    (tmp_path / "my weights" / "ckpt-0").mkdir(parents=True)
    report = verify(tmp_path / "my weights")
    assert len(report.faults) == 770
    assert (
        report.fetch_command
        == f"hf download xai-org/grok-1 --include 'ckpt-0/*' --repo-type model --local-dir '{tmp_path}/my weights'"
    )
    some = dataclasses.replace(report, faults=report.faults[5:7])
    assert f"grok-1 ckpt-0/{name(5)} ckpt-0/{name(6)} --repo-type" in some.fetch_command


def test_no_command_fetches_another_model(files):
    (files / name(5)).unlink()
    report = verify(files)
    assert report.fetch_command is None
    assert report.to_fetch == [name(5)]
