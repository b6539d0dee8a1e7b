"""Every kind of error message, compared with tests/cli/messages.txt.

Each case in that file is a command line and what it prints. After changing a message on purpose, write the file again
and review the difference:

    UPDATE_MESSAGES=1 scripts/test tests/cli/test_messages.py
"""

import dataclasses
import json
import os
import pickle
import re
import shlex
import shutil
from pathlib import Path

import pytest
from configs import TEXT

from grok1.checkpoint.writer import write_checkpoint
from grok1.text.train_tokenizer import train_small_tokenizer

GOLDEN = Path(__file__).with_name("messages.txt")
CASES = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", GOLDEN.read_text(encoding="utf-8"), re.MULTILINE)


class _Call:
    """Pickles as a call of `os.system`."""

    def __reduce__(self):
        return os.system, ("true",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint):
    """A folder with a checkpoint in `model`, and with damaged or unsuitable files of every kind."""
    folder = tmp_path_factory.mktemp("messages")
    model = folder / "model"
    shutil.copytree(checkpoint, model)

    def variant(name, **files):
        """Copy the checkpoint and replace files of its folder by the given contents, or remove those given as None."""
        copy = folder / name
        shutil.copytree(model, copy)
        for file_name, content in files.items():
            path = copy / "ckpt-0" / file_name if file_name.startswith("tensor") else copy / file_name.replace("_", ".")
            path.unlink()
            if content is not None:
                path.write_bytes(content)

    tensor = (model / "ckpt-0" / "tensor00003_000").read_bytes()
    config = json.loads((model / "config.json").read_text())

    def changed(**settings):
        return json.dumps(config | settings).encode()

    variant("missing-file", tensor00003_000=None)
    variant("truncated", tensor00003_000=tensor[:100])
    variant("extended", tensor00003_000=tensor + b"\0")
    variant("executable", tensor00003_000=pickle.dumps(_Call()))
    variant("swapped", tensor00003_000=(model / "ckpt-0" / "tensor00001_000").read_bytes())
    variant("config-invalid", config_json=b"{")
    variant("config-list", config_json=b"[]")
    variant("config-lacks", config_json=json.dumps({k: v for k, v in config.items() if k != "num_layers"}).encode())
    variant("config-unknown", config_json=changed(num_layer=2))
    variant("config-text", config_json=changed(num_layers="two"))
    variant("config-range", config_json=changed(num_layers=0))
    variant("config-odd", config_json=changed(key_size=7))
    variant("config-heads", config_json=changed(num_q_heads=7))
    variant("config-experts", config_json=changed(num_selected_experts=5))
    variant("config-other", config_json=changed(num_layers=3))
    variant("no-tokenizer", tokenizer_model=None)
    variant("empty-tokenizer", tokenizer_model=b"")
    variant("bad-tokenizer", tokenizer_model=b"not a model")
    variant("other-tokenizer", tokenizer_model=train_small_tokenizer(400))
    variant("config-nan", config_json=changed(attn_output_multiplier=float("nan")))
    (folder / "empty").mkdir()
    write_checkpoint(folder / "hollow", dataclasses.replace(TEXT, num_layers=1), hollow=True)
    for name, content in {
        "unknown-field.jsonl": '{"prompt": "A", "temperatur": 1}\n{"prompt": "B"}\n',
        "invalid.jsonl": '{"prompt": "A"\n',
        "list.jsonl": '["A"]\n',
        "no-prompt.jsonl": '{"id": "a"}\n',
        "two-prompts.jsonl": '{"prompt": "A", "prompt_token_ids": [5]}\n',
        "types.jsonl": '{"prompt": 5}\n{"prompt": "A", "max_tokens": "5"}\n{"prompt": "A", "stop": 1}\n',
        "ranges.jsonl": '{"prompt": "A", "temperature": -1}\n{"prompt": "A", "n": 0}\n{"prompt": "A", "top_p": 2}\n',
        "ids.jsonl": '{"prompt_token_ids": [5, 99999]}\n{"prompt_token_ids": []}\n',
        "empty.jsonl": "",
        "rows.jsonl": '{"prompt": "A", "max_tokens": 2}\n',
        "rows.json": '{"prompt": "A"}\n',
        "escape.txt": "a \\q\n",
        "long.txt": "word " * 100,
        "empty.txt": "",
        "existing.jsonl": "{}\n",
        "foreign.jsonl.journal": "not a journal\n",
        "no-completion.jsonl": '{"prompt": "A"}\n',
        "score-both.jsonl": '{"text": "A", "token_ids": [5, 6]}\n',
        "ids.json": '{"ids": 5}',
        "words.txt": "5 six\n",
        "manifest-bad.sha256": "abc  ckpt-0/tensor00000_000\n",
        "manifest-empty.sha256": "",
        "manifest-path.sha256": f"{'0' * 64}  ../tensor00000_000\n",
    }.items():
        (folder / name).write_text(content)
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    (folder / "broken.jsonl.gz").write_bytes(b"\x1f\x8b\x08")
    return folder


def _run(command, grok1, monkeypatch):
    """Run a command line of the golden file: `[NAME=VALUE ...] grok1 ARGUMENT ... [< FILE]`."""
    words = shlex.split(command)
    stdin = b""
    if "<" in words:
        stdin = Path(words.pop()).read_bytes()
        words.pop()
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    before = sorted(Path().rglob("*"))
    result = grok1(*words[1:], stdin=stdin)
    assert result.code in (1, 2), result
    assert sorted(Path().rglob("*")) == before, "the command left files behind"
    message = re.sub(r"\AUsage: .*\nTry '.*'.*\n\n", "", result.err)
    return message.replace(f"{Path.cwd()}{os.sep}", "FOLDER/")


@pytest.mark.parametrize(("command", "expected"), CASES, ids=[command for command, _ in CASES])
def test_message(command, expected, folder, grok1, monkeypatch):
    monkeypatch.chdir(folder)
    found = _run(command, grok1, monkeypatch)
    if "UPDATE_MESSAGES" in os.environ:
        text = GOLDEN.read_text(encoding="utf-8")
        GOLDEN.write_text(text.replace(f"$ {command}\n{expected}", f"$ {command}\n{found}", 1), encoding="utf-8")
    else:
        assert found == expected
