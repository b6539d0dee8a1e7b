import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from grok1.checkpoint.pickled.framing import Payload, tensor_file_size, tensor_segments
from grok1.config import PRESETS
from grok1.params.table import tensor_table


@pytest.fixture
def damaged(tmp_path, checkpoint):
    """A checkpoint with a missing, a truncated and an unexpected file."""
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    (folder / "ckpt-0" / "tensor00003_000").unlink()
    cut = folder / "ckpt-0" / "tensor00025_000"
    cut.write_bytes(cut.read_bytes()[:-1])
    (folder / "ckpt-0" / "tensor00026_000").touch()
    return folder


@pytest.fixture
def hollow_release(tmp_path):
    """Sparse files with the sizes of the release, but without its data."""
    folder = tmp_path / "release" / "ckpt-0"
    folder.mkdir(parents=True)
    for spec in tensor_table(PRESETS["grok-1"]):
        path = folder / spec.file_name
        with path.open("wb") as file:
            for segment in tensor_segments(spec):
                if isinstance(segment, Payload):
                    file.seek(segment.nbytes, os.SEEK_CUR)
                else:
                    file.write(segment)
        if spec.index == 0 and path.stat().st_blocks * 512 > tensor_file_size(spec) // 4:
            pytest.skip("this disk makes no holes")
    return folder.parent


def test_valid_checkpoint_prints_one_line(grok1, checkpoint):
    size = sum(path.stat().st_size for path in (checkpoint / "ckpt-0").iterdir())
    result = grok1("verify", checkpoint)
    assert (result.code, result.out, result.err) == (0, f"26 files, {size:,} bytes: ok\n", "")
    assert grok1("verify", checkpoint / "ckpt-0", "--content").out == result.out


def test_default_folder(grok1, checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "checkpoints does not exist" in grok1("verify").err
    shutil.copytree(checkpoint, "checkpoints")
    assert grok1("verify").code == 0
    monkeypatch.setenv("GROK1_CHECKPOINT", str(tmp_path / "absent"))
    assert "absent does not exist" in grok1("verify").err


def test_one_line_per_invalid_file(grok1, damaged):
    result = grok1("verify", damaged)
    assert result.code == 1
    lines = result.out.splitlines()
    assert lines[0] == "tensor00003_000 is missing: download it"
    assert lines[1].startswith("tensor00025_000: ")
    assert lines[1].endswith(": download it again")
    assert lines[2] == "tensor00026_000 is unexpected: move it out of the directory"
    assert lines[3:] == ["files to download again: tensor00003_000 tensor00025_000"]
    assert result.err == (
        f"grok1: error: {damaged}/ckpt-0: 3 of 26 files are missing or damaged; download or restore them\n"
    )


def test_json(grok1, checkpoint, damaged):
    (valid,) = grok1("verify", checkpoint, "--json").lines
    assert (valid["right"], valid["files"], valid["faults"], valid["fetch_command"]) == (True, 26, [], None)
    result = grok1("verify", damaged, "--json")
    assert result.code == 1
    assert result.lines[0]["right"] is False
    assert [fault["file"][:11] for fault in result.lines[0]["faults"]] == ["tensor00003", "tensor00025", "tensor00026"]
    assert [fault["fetch"] for fault in result.lines[0]["faults"]] == [True, True, False]


def test_manifest_round_trip(grok1, checkpoint, damaged, tmp_path):
    manifest = tmp_path / "sums"
    written = grok1("verify", checkpoint, "--write-manifest", manifest)
    assert (written.code, written.out.endswith(": ok\n")) == (0, True)
    assert len(manifest.read_text().splitlines()) == 1 + 2 * 28
    assert grok1("verify", checkpoint, "--manifest", manifest).code == 0
    result = grok1("verify", damaged, "--manifest", manifest)
    assert (result.code, len(result.out.splitlines())) == (1, 4)
    assert grok1("verify", damaged, "--write-manifest", tmp_path / "new").code == 1
    assert not (tmp_path / "new").exists()


def test_manifest_cannot_be_written_and_checked_together(grok1, checkpoint, tmp_path):
    result = grok1("verify", checkpoint, "--manifest", tmp_path / "a", "--write-manifest", tmp_path / "b")
    assert (result.code, result.out) == (2, "")


def test_invalid_manifest_line_is_named(grok1, checkpoint, tmp_path):
    (tmp_path / "sums").write_text(f"{'0' * 64}  ../../etc/passwd\n")
    result = grok1("verify", checkpoint, "--manifest", tmp_path / "sums")
    assert (result.code, result.out) == (1, "")
    assert f"{tmp_path}/sums, line 1: " in result.err
    assert len(result.err.splitlines()) == 1


def test_verify_does_not_import_jax(checkpoint, tmp_path):
    options = ["verify", str(checkpoint), "--content", "--write-manifest", str(tmp_path / "sums")]
    code = f"from grok1.cli import Terminal, execute\nimport sys\nassert execute({options}, Terminal()) == 0\n"
    code += "print([name for name in ('numpy', 'jax', 'haiku') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['numpy']"


def test_release_without_weights_is_hollow(grok1, hollow_release):
    assert grok1("verify", hollow_release).out == "770 files, 318,239,886,140 bytes: ok\n"
    result = grok1("verify", hollow_release, "--content", "--json")
    assert result.code == 1
    assert [fault["file"] for fault in result.lines[0]["faults"]] == ["ckpt-0"]
    assert "is hollow" in result.err
    assert "--include 'ckpt-0/*' --repo-type model --force-download" in result.lines[0]["fetch_command"]


def test_damaged_release_prints_a_download_command(grok1, hollow_release):
    (hollow_release / "ckpt-0" / "tensor00005_000").unlink()
    os.truncate(hollow_release / "ckpt-0" / "tensor00769_000", 100)
    lines = grok1("verify", hollow_release).out.splitlines()
    assert lines[-1] == (
        "to download again: hf download xai-org/grok-1 ckpt-0/tensor00005_000 ckpt-0/tensor00769_000 --repo-type model "
        f"--force-download --local-dir {hollow_release}"
    )
    assert json.loads(grok1("verify", hollow_release, "--json").out)["fetch_command"] == lines[-1].split(": ")[1]


def test_interrupt_keeps_computed_checksums(start, terminal, hollow_release, tmp_path):
    manifest = tmp_path / "sums"
    process = start(
        *("verify", hollow_release, "--write-manifest", manifest),
        env={"TERM": "xterm", "COLUMNS": "100"},
        stderr=terminal.there,
    )
    terminal.read_until("hashing")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release", "sums.partial"]
