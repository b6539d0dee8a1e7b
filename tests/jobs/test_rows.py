import hashlib
import json

import pytest

from grok1.engine.request import MAX_SEED, SamplingOptions
from grok1.errors import TokenizerError
from grok1.jobs.rows import RowDefaults, read_rows, row_seed
from grok1.jobs.source import MAX_LINE_BYTES, Source

DEFAULTS = RowDefaults(SamplingOptions(max_tokens=7, seed=5))


@pytest.fixture
def read(write, tokenizer, config):
    """The rows of a content."""

    def read(content, name="rows.jsonl", defaults=DEFAULTS, tokenizer=tokenizer):
        return list(read_rows(Source.open(write(name, content)), defaults, tokenizer, config))

    return read


@pytest.fixture
def read_object(read):
    """The row of an object."""

    def read_object(defaults=DEFAULTS, **fields):
        [row] = read(json.dumps(fields).encode(), defaults=defaults)
        return row

    return read_object


def test_seeds_of_rows():
    assert row_seed(5, 3) == int(hashlib.sha256(b"5 3").hexdigest()[:16], 16) // 4
    seeds = {row_seed(seed, index) for seed in range(30) for index in range(30)}
    assert len(seeds) == 900
    assert max(seeds) + 1023 < 2**62 + 1023 <= MAX_SEED


def test_lines_of_text(read, tokenizer):
    rows = read('Ein Füßchen\r\n\\n {"prompt"}\nlast'.encode(), "rows.txt")
    assert [row.request.prompt for row in rows] == ["Ein Füßchen", '\\n {"prompt"}', "last"]
    assert [(row.index, row.line, row.id) for row in rows] == [(0, 1, None), (1, 2, None), (2, 3, None)]
    for row in rows:
        assert row.tokens == tokenizer.encode(row.request.prompt)
        assert row.request.options == SamplingOptions(max_tokens=7, seed=row_seed(5, row.index))
        assert (row.request.num_samples, row.request.truncate, row.echo, row.error) == (1, False, False, None)


def test_escapes(read):
    defaults = RowDefaults(unescape=True)
    rows = read(rb"a\nb\tc\rd\\ne" + b"\n" + rb"bad \x here" + b"\nbad at the end\\\n", "rows.txt", defaults)
    assert rows[0].request.prompt == "a\nb\tc\rd\\ne"
    assert rows[1].error == r"\x at character 4 is no escape: expected \n, \t, \r or \\"
    assert rows[2].error.startswith("\\ at character 14 is no escape")


def test_an_object_and_all_that_it_may_say(read_object, tokenizer):
    row = read_object(
        id="first",
        prompt="Ein Wort",
        max_tokens=3,
        temperature=1,
        top_p=0.5,
        top_k=4,
        min_p=0.25,
        seed=9,
        stop=["a", "b"],
        n=3,
        logprobs=2,
        echo=True,
        ignore_eos=True,
        truncate=True,
    )
    assert row.error is None
    assert (row.id, row.echo, row.request.truncate, row.request.num_samples) == ("first", True, True, 3)
    assert row.tokens == tokenizer.encode("Ein Wort")
    assert row.request.options == SamplingOptions(
        max_tokens=3,
        temperature=1,
        top_p=0.5,
        top_k=4,
        min_p=0.25,
        seed=9,
        stop=("a", "b"),
        logprobs=2,
        ignore_eos=True,
    )


def test_what_a_row_does_not_say_is_the_default(read_object):
    sampling = SamplingOptions(max_tokens=2, temperature=0.5, top_k=3, stop=("x",), logprobs=1, ignore_eos=True, seed=1)
    defaults = RowDefaults(sampling, num_samples=2, echo=True, truncate=True)
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "logprobs", "echo")
    nothing = dict.fromkeys((*names, "ignore_eos", "truncate", "id", "prompt_token_ids"))
    for row in (read_object(defaults, prompt="a"), read_object(defaults, prompt="a", **nothing)):
        assert row.error is None
        assert row.request.options == SamplingOptions(
            max_tokens=2, temperature=0.5, top_k=3, stop=("x",), logprobs=1, ignore_eos=True, seed=row_seed(1, 0)
        )
        assert (row.id, row.request.num_samples, row.echo, row.request.truncate) == (None, 2, True, True)
    row = read_object(defaults, prompt="a", stop=[], echo=False, truncate=False, ignore_eos=False, seed=0, n=1)
    assert (row.request.options.stop, row.request.options.ignore_eos, row.request.options.seed) == ((), False, 0)
    assert (row.request.num_samples, row.echo, row.request.truncate) == (1, False, False)


@pytest.mark.parametrize("given", ["word", 7, 10**30, None])
def test_ids_come_back_as_they_are(given, read_object):
    assert read_object(prompt="a", id=given).id == given


@pytest.mark.parametrize(
    "fields", [{"prompt": [5, 6]}, {"prompt_token_ids": [5, 6]}, {"custom_id": "x", "body": {"prompt": [5, 6]}}]
)
def test_token_ids_need_no_tokenizer(fields, read):
    [row] = read(json.dumps(fields).encode(), tokenizer=None)
    assert (row.tokens, row.request.prompt, row.error) == ([5, 6], [5, 6], None)


@pytest.mark.parametrize("fields", [{"prompt": "a"}, {"prompt": [5], "stop": "x"}])
def test_text_needs_one(fields, read):
    with pytest.raises(TokenizerError, match="--tokenizer FILE"):
        read(json.dumps(fields).encode(), tokenizer=None)


def test_blank_lines_of_objects_count_as_lines_only(read):
    rows = read(b'{"prompt": "a"}\n\n  \r\n{"prompt": "b"}\r\n\n')
    assert [(row.index, row.line, row.request.prompt) for row in rows] == [(0, 1, "a"), (1, 4, "b")]


def test_a_compressed_file_and_one_with_a_byte_order_mark_give_the_same_rows(read):
    content = b'{"prompt": "a"}\n{"prompt": "b"}\n'
    plain = read(content)
    assert read(content, "rows.jsonl.gz") == plain
    marked = read(b"\xef\xbb\xbf" + content)
    assert [row.request for row in marked] == [row.request for row in plain]


def test_a_row_of_the_openai_api(read_object):
    body = {
        "model": "grok-1",
        "prompt": "a",
        "max_tokens": 2,
        "n": 2,
        "best_of": 2,
        "stream": False,
        "suffix": "",
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "user": "me",
        "echo": True,
        "logprobs": 3,
        "stop": "x",
    }
    row = read_object(custom_id="request-1", method="POST", url="/v1/completions", body=body)
    assert (row.error, row.id, row.request.prompt, row.request.num_samples, row.echo) == (
        None,
        "request-1",
        "a",
        2,
        True,
    )
    assert (row.request.options.stop, row.request.options.logprobs, row.request.options.max_tokens) == (("x",), 3, 2)


def test_a_prompt_that_is_too_long_is_cut_if_it_may_be(read_object):
    ids = [5 + i for i in range(200)]
    assert read_object(prompt=ids, truncate=True, max_tokens=10).tokens == ids[-86:]
    assert read_object(prompt=ids).error.startswith(
        "the prompt has 200 tokens, but 95 fit in the model's context of 96"
    )


EXAMPLE = '{"prompt": "The answer is", "max_tokens": 8}'


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (
            "nonsense",
            "it is no JSON (expected ident at line 1 column 2); lines of plain text are read with --format txt",
        ),
        ('{"prompt": "a"', "it is no JSON (EOF while parsing"),
        ('{"prompt": "a", "min_p": NaN}', "it is no JSON ("),
        ('{"prompt": "\\ud800"}', "it is no JSON ("),
        ("[" * 5000, "it is no JSON ("),
        ("[1]", f"it is JSON, but no object: expected one such as {EXAMPLE}"),
        ('"text"', "it is JSON, but no object"),
        ("{}", f"it has no prompt: expected one of them, such as {EXAMPLE}"),
        ('{"prompt": null}', "it has no prompt"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "it has a prompt and prompt_token_ids: expected one of them"),
        ('{"prompt": ""}', "the prompt is empty: give at least one character"),
        ('{"prompt": []}', "the prompt is empty"),
        ('{"prompt_token_ids": []}', "the prompt is empty"),
        ('{"prompt": 3}', "prompt is 3: expected one text, or one list of token ids"),
        ('{"prompt": ["a", "b"]}', 'prompt is ["a", "b"]: expected one text, or one list of token ids'),
        ('{"prompt": [1, true]}', "prompt is [1, true]: expected one text"),
        ('{"prompt": [512]}', "token id 512 is none of the model's: expected 0 to 511"),
        ('{"prompt": [-1]}', "token id -1 is none"),
        ('{"prompt_token_ids": [1180591620717411303424]}', "token id 1180591620717411303424 is none"),
        ('{"prompt_token_ids": "a"}', 'prompt_token_ids is "a": expected a valid list'),
        ('{"prompt_token_ids": [1, 2.0]}', "prompt_token_ids.1 is 2.0: expected a valid integer"),
        ('{"prompt": "a", "temprature": 1}', "temprature is no field of a row"),
        ('{"prompt": "a", "id": 1.5}', "id is 1.5: expected a valid string; id is 1.5: expected a valid integer"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0, expected at least 1"),
        ('{"prompt": "a", "max_tokens": 8.5}', "max_tokens is 8.5: expected a valid integer"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens is true: expected a valid integer"),
        ('{"prompt": "a", "max_tokens": "8"}', 'max_tokens is "8": expected a valid integer'),
        ('{"prompt": "a", "temperature": -1}', "temperature is -1.0, expected 0 or more"),
        ('{"prompt": "a", "temperature": 1e999}', "temperature is inf, expected 0 or more"),
        ('{"prompt": "a", "top_p": 0}', "top_p is 0.0, expected above 0 and at most 1"),
        ('{"prompt": "a", "top_k": -1}', "top_k is -1, expected 0 (off) or more"),
        ('{"prompt": "a", "min_p": 2}', "min_p is 2.0, expected 0 to 1"),
        ('{"prompt": "a", "seed": -1}', "seed is -1, expected 0 to 9223372036854775807"),
        ('{"prompt": "a", "seed": 9223372036854775807, "n": 2}', "seed is 9223372036854775807, expected at most 9223"),
        ('{"prompt": "a", "stop": ""}', "stop is ('',), expected texts that are not empty"),
        ('{"prompt": "a", "stop": ["a", 3]}', 'stop is ["a", 3]: expected a text or a list of texts'),
        ('{"prompt": "a", "n": 0}', "n is 0, expected 1 to 1024"),
        ('{"prompt": "a", "n": 1025}', "n is 1025, expected 1 to 1024"),
        ('{"prompt": "a", "logprobs": 21}', "logprobs is 21, expected 0 to 20"),
        ('{"prompt": "a", "logprobs": true}', "logprobs is true: expected a valid integer"),
        ('{"prompt": "a", "echo": 1}', "echo is 1: expected true or false"),
        ('{"prompt": "a", "top_p": "x", "echo": 1}', 'top_p is "x": expected a valid number; echo is 1: expected true'),
        ('{"custom_id": "x"}', "body is missing"),
        ('{"body": {"prompt": "a"}}', "custom_id is missing"),
        ('{"custom_id": 5, "body": {"prompt": "a"}}', "custom_id is 5: expected a valid string"),
        ('{"custom_id": "x", "method": "GET", "body": {"prompt": "a"}}', "method is \"GET\": expected 'POST'"),
        ('{"custom_id": "x", "url": "/v1/chat/completions", "body": {"prompt": "a"}}', 'url is "/v1/chat/completions"'),
        ('{"custom_id": "x", "body": {"messages": []}}', "body.messages is no field of a row"),
        ('{"custom_id": "x", "body": {"prompt": "a", "stream": true}}', "body.stream is true: expected false"),
        ('{"custom_id": "x", "body": {"prompt": "a", "suffix": "b"}}', "body.suffix is \"b\": expected ''"),
        ('{"custom_id": "x", "body": {"prompt": "a", "best_of": 3}}', "body.best_of is not n: "),
        (
            '{"custom_id": "x", "body": {"prompt": "a", "frequency_penalty": 0.5}}',
            "body.frequency_penalty is 0.5: expected 0",
        ),
        (
            '{"custom_id": "x", "body": {"prompt": "a", "presence_penalty": -1}}',
            "body.presence_penalty is -1: expected 0",
        ),
        (
            '{"custom_id": "x", "body": {"prompt": "a", "logit_bias": {"3": 1}}}',
            'body.logit_bias is {"3": 1}: expected it to be empty',
        ),
    ],
)
def test_bad_rows_say_what_is_wrong(line, error, read):
    good, bad, next_good = read(f'{{"prompt": "a"}}\n{line}\n{{"prompt": "a"}}'.encode())
    assert good.error is next_good.error is None
    assert bad.request is None
    assert bad.error.startswith(error)
    assert len(bad.error) < 200
    assert (bad.index, bad.line) == (1, 2)


def test_bad_rows_keep_their_id(read_object):
    assert read_object(id="x", prompt=3).id == "x"
    assert read_object(custom_id="y", body={}).id == "y"
    assert read_object(id=True, prompt="a").id is None


def test_of_many_faults_some_are_told(read_object):
    error = read_object(prompt_token_ids=[0.5] * 1000).error
    assert error.count("expected a valid integer") == 5
    assert error.endswith("and 995 more")


def test_a_long_value_is_shown_in_part(read_object):
    assert read_object(prompt="a", top_p="x" * 1000).error == f'top_p is "{"x" * 56}...: expected a valid number'


def test_bytes_that_are_no_text(read):
    [row] = read(b'{"prompt": "a\xff"}')
    assert row.error.startswith("it is no JSON (")
    good, bad = read(b"good\nab\xffc\n", "rows.txt")
    assert good.error is None
    assert bad.error == "it is not UTF-8 text: byte 0xff at offset 2 of the line; convert the file to UTF-8"


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl"])
def test_a_line_that_is_too_long(name, read):
    _, row, _ = read(b'{"prompt": "a"}\n' + b"a" * MAX_LINE_BYTES + b'\n{"prompt": "a"}', name)
    assert row.error == "it is longer than 16 MiB: give one row a line"


def test_blank_lines_of_text_are_bad_rows(read):
    assert [row.error is None for row in read(b"a\n\nb\n", "rows.txt")] == [True, False, True]


def test_an_empty_text_is_told_from_a_missing_one(read):
    [row] = read(b"\n", "rows.txt")
    assert row.error == "the prompt is empty: give at least one character"
