import os
import re
import subprocess
import sys

import pytest

from grok1.checkpoint.writer import write_checkpoint
from grok1.config import PRESETS, ModelConfig
from grok1.params.table import num_active_parameters, num_parameters


def sizes(folder):
    return {path.name: path.stat().st_size for path in (folder / "ckpt-0").iterdir()}


def test_json_contains_totals_kinds_and_config(grok1, checkpoint):
    result = grok1("inspect", checkpoint, "--json")
    assert (result.code, result.err) == (0, "")
    (record,) = result.lines
    config = ModelConfig.read(checkpoint / "config.json")
    assert set(record) == {
        *("directory", "files", "bytes", "allocated_bytes", "hollow", "parameters", "active_parameters"),
        *("config", "kinds"),
    }
    assert record["directory"] == str(checkpoint / "ckpt-0")
    assert (record["files"], record["bytes"]) == (26, sum(sizes(checkpoint).values()))
    assert record["hollow"] is False
    assert (record["parameters"], record["active_parameters"]) == (
        num_parameters(config),
        num_active_parameters(config),
    )
    assert ModelConfig(**record["config"]) == config
    assert [set(kind) for kind in record["kinds"]] == [{"kind", "files", "parameters", "bytes", "share", "forms"}] * 5
    assert sum(kind["share"] for kind in record["kinds"]) == pytest.approx(1)
    assert record["kinds"][0]["forms"] == [{"shape": [512, 64], "dtype": "float32", "scales_shape": None, "count": 1}]


def test_json_lines_of_tensors(grok1, checkpoint):
    result = grok1("inspect", checkpoint, "--tensors", "--json")
    assert {line["file"]: line["file_bytes"] for line in result.lines} == sizes(checkpoint)
    assert [line["layer"] for line in result.lines] == [None] + [0] * 12 + [1] * 12 + [None]
    for line in result.lines:
        assert set(line) == {
            *("parameter", "kind", "layer", "file", "shape", "dtype", "scales_shape", "offset", "scales_offset"),
            *("file_bytes", "allocated_bytes"),
        }
        assert (line["dtype"] == "int8") == (line["scales_shape"] is not None) == (line["scales_offset"] is not None)


def test_text_contains_a_row_for_each_kind(grok1, hollow_release):
    out = grok1("inspect", hollow_release).out
    assert "318,239,886,140 (318.24 GB)" in out
    assert f"parameters  {num_parameters(PRESETS['grok-1']):,} (" in out
    table = out.partition("\n\n")[2].splitlines()
    assert table[0].split() == ["kind", "files", "bytes", "share", "shapes", "dtype", "scales"]
    rows = [line.split() for line in table[1:] if not line.startswith(" ")]
    assert [row[:2] for row in rows] == [
        ["embedding", "1"],
        ["experts", "192"],
        ["attention", "256"],
        ["norms", "257"],
        ["router", "64"],
    ]
    assert sum(int(row[2].replace(",", "")) for row in rows) == 318_239_886_140
    assert sum(float(row[3]) for row in rows) == pytest.approx(100, abs=0.01)
    assert [row[1:] for row in (line.rsplit(maxsplit=3) for line in table) if row[-1] == "8,8,6144"] == [
        ["[8,32768,6144]", "int8", "8,8,6144"]
    ]


def test_text_of_tensors_matches_json(grok1, hollow_release):
    out = grok1("inspect", "--tensors", hollow_release).out
    lines = grok1("inspect", "--tensors", "--json", hollow_release).lines
    rows = [line.split() for line in out.splitlines()[1:]]
    assert len(rows) == 770
    for row, line in zip(rows, lines, strict=True):
        scales = "-" if line["scales_shape"] is None else ",".join(map(str, line["scales_shape"]))
        offset = "-" if line["scales_offset"] is None else str(line["scales_offset"])
        assert row == [
            *(line["parameter"], line["file"], ",".join(map(str, line["shape"])), line["dtype"]),
            *(scales, str(line["offset"]), offset, str(line["file_bytes"])),
        ]


def test_only_files_with_holes_are_reported_as_hollow(grok1, checkpoint, hollow_release):
    allocated = sum(path.stat().st_blocks * 512 for path in (hollow_release / "ckpt-0").iterdir())
    assert "hollow" not in grok1("inspect", checkpoint).out
    assert f"on disk     {allocated:,} bytes (hollow: " in grok1("inspect", hollow_release).out
    assert grok1("inspect", hollow_release, "--json").lines[0]["allocated_bytes"] == allocated


def test_default_folder_is_that_of_other_commands(grok1, checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = grok1("inspect")
    assert (result.code, result.out) == (1, "")
    assert "no checkpoint found: checkpoints does not exist" in result.err
    (tmp_path / "checkpoints").symlink_to(checkpoint)
    assert grok1("inspect", "--json").lines[0]["directory"] == "checkpoints/ckpt-0"
    monkeypatch.setenv("GROK1_CHECKPOINT", str(checkpoint))
    assert grok1("inspect", "--json").lines[0]["directory"] == str(checkpoint / "ckpt-0")
    monkeypatch.setenv("GROK1_CHECKPOINT", "elsewhere")
    assert "elsewhere does not exist" in grok1("inspect").err
    assert grok1("inspect", checkpoint / "ckpt-0", "--json").lines[0]["directory"] == str(checkpoint / "ckpt-0")


def test_damaged_checkpoint_is_a_one_line_error(grok1, tmp_path):
    write_checkpoint(tmp_path, PRESETS["tiny"], hollow=True)
    os.truncate(tmp_path / "ckpt-0" / "tensor00002_000", 1000)
    (tmp_path / "ckpt-0" / "tensor00007_000").unlink()
    for options in ([], ["--tensors"], ["--json"]):
        result = grok1("inspect", tmp_path, *options)
        assert (result.code, result.out) == (1, "")
        assert re.search(
            r"2 of 146 files are missing or damaged: .*tensor00002_000.*tensor00007_000 is missing", result.err
        )
        assert result.err.count("\n") == 1


def test_usage_errors(grok1, tmp_path):
    assert grok1("inspect", tmp_path, tmp_path).code == 2
    assert grok1("init", tmp_path / "new", "--hollow").code == 2
    result = grok1("init", tmp_path / "new", "--preset", "tiny", "--hollow", "--seed", "0")
    assert (result.code, result.out) == (2, "")
    assert "--hollow and --seed cannot be used together" in result.err
    assert not (tmp_path / "new").exists()


def test_init_reports_hollow_checkpoints(grok1, tmp_path, checkpoint):
    folder = tmp_path / "new"
    (record,) = grok1("init", folder, "--preset", "grok-1", "--hollow", "--json").lines
    assert (record["hollow"], record["seed"], record["files"]) == (True, None, 771)
    assert record["bytes"] == 318_239_886_140 + (folder / "config.json").stat().st_size
    tokenizer = checkpoint / "tokenizer.model"
    again = ("init", folder, "--preset", "tiny", "--hollow", "--tokenizer", tokenizer, "--json")
    assert grok1(*again).code == 1
    (record,) = grok1(*again, "--force").lines
    assert record["vocab_size"] == 512
    assert (folder / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    (record,) = grok1("init", folder, "--preset", "tiny", "--force", "--json").lines
    assert (record["hollow"], record["seed"]) == (False, 0)


def test_inspect_does_not_import_jax(hollow_release):
    program = (
        "import sys\nfrom grok1.cli import Terminal, execute\n"
        f"assert execute(['inspect', {str(hollow_release)!r}], Terminal()) == 0\n"
        "assert 'numpy' in sys.modules\nassert not {'jax', 'haiku', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=True)
