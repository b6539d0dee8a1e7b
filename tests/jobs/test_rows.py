"""Rows of prompts: accepted lines, and the messages for invalid ones."""

import gzip
import hashlib
import io
import json
from types import SimpleNamespace

import pytest
from letters import Letters

from grok1.config import PRESETS
from grok1.errors import JobError, TokenizerError
from grok1.jobs.batch import CompletionJob
from grok1.jobs.rows import RowDefaults, row_seed
from grok1.jobs.source import MAX_LINE_BYTES, Source
from grok1.request import MAX_SEED, SamplingOptions

CONFIG = PRESETS["tiny"]
LETTERS = Letters()


@pytest.fixture
def rows(tmp_path):
    """The rows of a file of that name and content."""

    def rows(content, name="rows.jsonl", tokenizer=LETTERS, **defaults):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        checkpoint = SimpleNamespace(config=CONFIG)
        return list(CompletionJob(Source.open(path), checkpoint, tokenizer, RowDefaults(**defaults)).rows())

    return rows


def row(rows, **fields):
    [row] = rows(json.dumps(fields))
    return row


def test_lines_of_text(rows):
    found = rows("\ufeffone\r\ntwo \n\nthree", "rows.txt")
    assert [row.error for row in found] == [None, None, "the prompt is empty, expected at least one character", None]
    assert [row.task.request.prompt for row in found if row.task] == ["one", "two ", "three"]
    assert [row.line for row in found] == [1, 2, 3, 4]
    assert [row.index for row in found] == [0, 1, 2, 3]


def test_escapes_only_when_asked_for(rows):
    text = r"a\nb\tc\\n\r"
    assert rows(text, "rows.txt")[0].task.request.prompt == text
    assert rows(text, "rows.txt", unescape=True)[0].task.request.prompt == "a\nb\tc\\n\r"
    for wrong, place in (("a\\x", 1), ("ab\\", 2), ("\\\\\\q", 2)):
        [bad] = rows(wrong, "rows.txt", unescape=True)
        assert f" at character {place}, expected" in bad.error


def test_a_row_has_options_of_its_own(rows):
    given = {
        "prompt": "x",
        "id": "me",
        "max_tokens": 3,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 9,
        "stop": "end",
        "n": 2,
        "logprobs": 4,
        "echo": True,
        "ignore_eos": True,
        "truncate": True,
    }
    found = row(rows, **given)
    assert (found.id, found.task.echo, found.error) == ("me", True, None)
    assert (found.task.request.num_samples, found.task.request.truncate) == (2, True)
    assert found.task.request.options == SamplingOptions(
        max_tokens=3, temperature=1.0, top_p=0.5, top_k=7, min_p=0.1, seed=9, stop=("end",), ignore_eos=True, logprobs=4
    )
    assert row(rows, prompt="x", stop=["a", "b"]).task.request.options.stop == ("a", "b")


def test_what_a_row_does_not_say_is_as_given(rows):
    sampling = SamplingOptions(max_tokens=5, temperature=0.2, stop=("x",), seed=3)
    content = '{"prompt": "a"}\n{"prompt": "b", "max_tokens": null, "seed": null, "stop": null, "n": null}\n'
    found = rows(content, sampling=sampling, num_samples=4, echo=True, truncate=True)
    for index, one in enumerate(found):
        assert one.task.request.options == SamplingOptions(
            max_tokens=5, temperature=0.2, stop=("x",), seed=row_seed(3, index)
        )
        assert (one.task.request.num_samples, one.task.echo, one.task.request.truncate) == (4, True, True)


def test_seeds_are_of_the_job_and_the_place():
    for seed, index in ((0, 0), (7, 123456), (2**62, 1)):
        digest = hashlib.sha256(f"{seed} {index}".encode()).hexdigest()
        assert row_seed(seed, index) == int(digest[:16], 16) // 4
    assert len({row_seed(seed, index) for seed in range(30) for index in range(30)}) == 900


def test_the_last_sample_of_a_row_may_have_the_largest_seed(rows):
    (row,) = rows('{"prompt": "x", "seed": 9223372036854775804, "n": 4}\n')
    request = row.task.request
    assert (request.options.seed, request.num_samples) == (MAX_SEED - 3, 4)


def test_token_ids(rows):
    assert row(rows, prompt_token_ids=[1, 2]).task.tokens == [1, 2]
    assert row(rows, prompt=[1, 2]).task.tokens == [1, 2]
    assert rows('{"prompt": [5]}', tokenizer=None)[0].task.tokens == [5]
    with pytest.raises(TokenizerError):
        rows('{"prompt": "text"}', tokenizer=None)


def test_lines_of_an_openai_batch(rows):
    body = {"model": "grok-1", "prompt": "x", "max_tokens": 2, "n": 2, "best_of": 2, "stream": False, "logit_bias": {}}
    body |= {"frequency_penalty": 0, "presence_penalty": 0.0, "suffix": "", "user": "u"}
    line = {"custom_id": "first", "method": "POST", "url": "/v1/completions", "body": body}
    found = row(rows, **line)
    assert (found.id, found.error) == ("first", None)
    assert (found.task.request.prompt, found.task.request.options.max_tokens, found.task.request.num_samples) == (
        "x",
        2,
        2,
    )
    wrong = {
        "url": ({"url": "/v1/chat/completions"}, "'/v1/completions'"),
        "method": ({"method": "GET"}, "'POST'"),
        "custom_id": ({"custom_id": None}, "custom_id is null"),
        "extra": ({"more": 1}, 'unknown field "more"'),
        "body.stream": ({"body": body | {"stream": True}}, "body.stream is true"),
        "body.best_of": ({"body": body | {"best_of": 3}}, "best_of differs from n"),
        "body.suffix": ({"body": body | {"suffix": "end"}}, 'body.suffix is "end"'),
        "body.frequency_penalty": ({"body": body | {"frequency_penalty": 0.5}}, "body.frequency_penalty is 0.5"),
        "body.logit_bias": ({"body": body | {"logit_bias": {"5": 1}}}, "body.logit_bias"),
        "body.messages": ({"body": {"messages": []}}, 'unknown field "body.messages"'),
    }
    for change, words in wrong.values():
        assert words in row(rows, **(line | change)).error


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "invalid JSON"),
        ('{"prompt": "x"', "invalid JSON"),
        ('{"prompt": NaN}', "invalid JSON"),
        ('{"prompt": "\\ud800"}', "invalid JSON"),
        ("[" * 100000, "invalid JSON"),
        ("[1]", "expected a JSON object"),
        ("{}", "has no prompt"),
        ('{"prompt": null}', "has no prompt"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "has both prompt and prompt_token_ids"),
        ('{"prompt": ""}', "the prompt is empty"),
        ('{"prompt": []}', "the prompt is empty"),
        ('{"prompt": ["a", "b"]}', "expected a string or a list of token ids"),
        ('{"prompt": [1, true]}', "expected a string or a list of token ids"),
        ('{"prompt": 5}', "expected a string or a list of token ids"),
        ('{"prompt": [1, 1024]}', "token id 1024 is out of range"),
        ('{"prompt": [-1]}', "token id -1 is out of range"),
        ('{"prompt_token_ids": [1, "2"]}', 'prompt_token_ids.1 is "2", expected a whole number'),
        ('{"prompt": "x", "max_token": 3}', 'unknown field "max_token"'),
        ('{"prompt": "x", "max_tokens": "3"}', 'max_tokens is "3", expected a whole number'),
        ('{"prompt": "x", "max_tokens": true}', "max_tokens is true"),
        ('{"prompt": "x", "max_tokens": 2.5}', "max_tokens is 2.5"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens is 0, expected at least 1"),
        ('{"prompt": "x", "temperature": -1}', "temperature is -1"),
        ('{"prompt": "x", "top_p": 0}', "top_p is 0"),
        ('{"prompt": "x", "top_k": -1}', "top_k is -1"),
        ('{"prompt": "x", "min_p": 2}', "min_p is 2"),
        ('{"prompt": "x", "logprobs": 21}', "logprobs is 21"),
        ('{"prompt": "x", "logprobs": true}', "logprobs is true"),
        ('{"prompt": "x", "seed": -1}', "seed is -1"),
        ('{"prompt": "x", "seed": 9223372036854775807, "n": 2}', "seed is 9223372036854775807, expected at most"),
        ('{"prompt": "x", "n": 0}', "n is 0, expected 1 to 1024"),
        ('{"prompt": "x", "n": 1025}', "n is 1025, expected 1 to 1024"),
        ('{"prompt": "x", "stop": ["a", 2]}', "expected a string or a list of strings"),
        ('{"prompt": "x", "stop": [""]}', 'stop is [""]'),
        ('{"prompt": "x", "echo": 1}', "echo is 1"),
        ('{"prompt": "x", "id": 1.5}', "id is 1.5"),
        (b'{"prompt": "\xff"}', "invalid JSON"),
    ],
)
def test_bad_rows(rows, line, words):
    found = rows((line if isinstance(line, bytes) else line.encode()) + b'\n\n{"prompt": "good"}\n')
    assert [one.error is None for one in found] == [False, True]  # a blank line is no row
    assert words in found[0].error
    assert (found[0].task, found[0].line, found[1].line) == (None, 1, 3)


def test_all_faults_of_a_row_are_reported(rows):
    found = row(rows, prompt="x", top_k="a", n="b", id=5)
    assert 'top_k is "a"' in found.error
    assert 'n is "b"' in found.error
    assert found.id == 5


def test_a_prompt_that_is_too_long(rows):
    assert "expected at most 511" in row(rows, prompt="x" * 512).error
    assert row(rows, prompt="x" * 511).error is None
    assert len(row(rows, prompt="x" * 5000, truncate=True, max_tokens=100).task.tokens) == 412


def test_text_that_is_not_utf8(rows):
    [bad, good] = rows(b"ab\xff\ngood\n", "rows.txt")
    assert "byte 0xff at offset 2 of the line" in bad.error
    assert good.error is None


def test_a_line_that_is_too_long_to_be_kept(rows):
    found = rows(b"x" * (2 * MAX_LINE_BYTES + 5) + b"\ngood\n" + b"y" * MAX_LINE_BYTES, "rows.txt", truncate=True)
    assert ["16 MiB" in (one.error or "") for one in found] == [True, False, False]
    assert found[1].task.request.prompt == "good"


def test_the_hash_is_of_the_content(tmp_path, monkeypatch):
    content = b'{"prompt": "a"}\r\n\xef\xbb\xbf\n' + b"x" * 70000
    plain, packed = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content[:30]) + gzip.compress(content[30:]))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    for source in (Source.open(plain), Source.open(packed), Source.open(type(plain)("-"))):
        for _ in range(2):
            lines = list(source.lines())
            assert lines == [b'{"prompt": "a"}', b"\xef\xbb\xbf", b"x" * 70000]
            assert source.sha256 == hashlib.sha256(content).hexdigest()
        assert source.content() == content
        assert source.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.csv", b"", "--format"),
        ("rows.gz", b"", "--format"),
        ("rows.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], "not a valid gzip file"),
        ("rows.txt.gz", b"no gzip", "not a valid gzip file"),
        ("folder", None, "is a directory"),
        ("missing.txt", None, "does not exist"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path, name, content, words):
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(JobError, match=words):
        list(Source.open(tmp_path / name).lines())
