"""`grok1 score` of rows and chunks, compared with the scores of the same texts one by one."""

import gzip
import json
import math
import shutil
import zlib

import pytest

from grok1.model import Model
from grok1.text.tokenizer import Tokenizer

ROWS = [
    {"text": "A text of its own."},
    {"id": "b", "prompt": "The answer is", "completion": " forty two"},
    {"id": 3, "prompt": "The answer is", "completion": " not known to any of us"},
    {"token_ids": [5, 6, 7, 8]},
    {"id": "long", "text": "Words and more words, far more than the context holds. " * 8},
    {"prompt": "Ein Fuß", "completion": " größer als 東京\n"},
]
ARGUMENTS = ("--batch-size", 2, "--mesh", "1,1")


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer.read(checkpoint / "tokenizer.model")


@pytest.fixture
def score(grok1, checkpoint):
    def run(*arguments, stdin=b""):
        return grok1("score", "-c", checkpoint, *ARGUMENTS, *arguments, stdin=stdin)

    return run


@pytest.fixture(scope="module")
def one(make_engine, checkpoint):
    """Log-probabilities of a text or token ids scored alone; the first token has none."""
    model = Model(make_engine(checkpoint), None)

    def run(ids):
        return [None, *(entry.logprob for entry in model.score(ids).logprobs)]

    return run


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_rows(score, one, rows_file, tokenizer, tmp_path):
    *rows, last = score(rows_file, "--per-token", "--top", 2).lines
    assert [row["index"] for row in rows] == list(range(len(ROWS)))
    assert [row["id"] for row in rows] == [given.get("id") for given in ROWS]
    for row, given in zip(rows, ROWS, strict=True):
        text = given.get("text") or given.get("prompt", "") + given.get("completion", "")
        ids = given.get("token_ids") or tokenizer.encode(text)
        first = len(tokenizer.encode(given["prompt"])) if "prompt" in given else 1
        expected = one(ids)[first:]
        assert row["num_tokens"] == len(ids)
        assert row["num_scored"] == len(expected) == len(ids) - first
        assert row["token_ids"] == ids[first:]
        assert row["logprobs"] == pytest.approx(expected, abs=1e-3)
        assert row["total_logprob"] == pytest.approx(math.fsum(expected), abs=1e-2)
        assert row["perplexity"] == pytest.approx(math.exp(-math.fsum(expected) / len(expected)), rel=1e-3)
        unscored = tokenizer.pieces(ids)[0].removeprefix("▁") if first == 1 else given["prompt"]
        num_bytes = len((text or tokenizer.decode(ids)).encode()) - len(unscored.encode())
        assert row["num_bytes"] == num_bytes
        assert row["bits_per_byte"] == pytest.approx(-math.fsum(row["logprobs"]) / math.log(2) / num_bytes)
        assert row["greedy"] == all(
            token == top[0]["token_id"] for token, top in zip(row["token_ids"], row["top"], strict=True)
        )
        assert {len(top) for top in row["top"]} == {2}
    assert len(tokenizer.encode(ROWS[4]["text"])) > 65
    total, count = math.fsum(row["total_logprob"] for row in rows), sum(row["num_scored"] for row in rows)
    corpus = last["corpus"]
    assert (corpus["rows"], corpus["num_scored"]) == (len(ROWS), count)
    assert corpus["total_logprob"] == pytest.approx(total)
    assert corpus["perplexity"] == pytest.approx(math.exp(-total / count))
    assert corpus["num_bytes"] == sum(row["num_bytes"] for row in rows)
    bits = math.fsum(row["bits_per_byte"] * row["num_bytes"] for row in rows)
    assert corpus["bits_per_byte"] == pytest.approx(bits / corpus["num_bytes"])
    values = [value for row in rows for value in row["logprobs"]]
    spread = math.sqrt(sum((value - total / count) ** 2 for value in values) / count / (count - 1))
    assert corpus["standard_error"] == pytest.approx(corpus["perplexity"] * spread, rel=1e-6)


def test_token_ids_without_a_tokenizer_have_no_bits_per_byte(grok1, checkpoint, tmp_path):
    bare = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.model"))
    file = tmp_path / "rows.jsonl"
    file.write_text('{"token_ids": [5, 6, 7]}\n' * 2)
    result = grok1("score", "-c", bare, *ARGUMENTS, file)
    *rows, last = result.lines
    for record in (*rows, last["corpus"]):
        assert (record["num_bytes"], record["bits_per_byte"]) == (None, None)
        assert math.isfinite(record["perplexity"])


def test_greedy_completion_consists_of_most_likely_tokens(score, complete, tmp_path):
    (done,) = complete("word", "-n", 4, "--greedy", "--ignore-eos", "--json").lines
    file = tmp_path / "rows.jsonl"
    ids = done["prompt_token_ids"] + done["token_ids"]
    file.write_text("".join(json.dumps({"token_ids": ids[start:]}) + "\n" for start in range(len(ids) - 1)))
    rows = score(file, "--top", 1, "--per-token").lines[:-1]
    for row in rows:
        likeliest = [top[0]["token_id"] for top in row["top"]]
        assert row["greedy"] == (likeliest == row["token_ids"])
    first = len(done["prompt_token_ids"])
    assert [top[0]["token_id"] for top in rows[0]["top"]][first - 1 :] == done["token_ids"]


def test_output_file_and_other_input_formats_give_identical_results(score, rows_file, tmp_path):
    expected = score(rows_file).out
    output = tmp_path / "scores.jsonl"
    (record,) = score(rows_file, "-o", output, "--json").lines
    assert output.read_text() == expected
    assert record["rows"] == len(ROWS)
    corpus = json.loads(expected.splitlines()[-1])["corpus"]
    assert (record["perplexity"], record["bits_per_byte"]) == (corpus["perplexity"], corpus["bits_per_byte"])
    assert list(tmp_path.glob("*.journal")) == []
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(rows_file.read_bytes()))
    assert score(packed).out == expected
    assert score("-", "--format", "jsonl", stdin=rows_file.read_bytes()).out == expected
    again = score(rows_file, "-o", output)
    assert again.code == 1
    assert "already exists" in again.err


def test_lines_of_text(score, one, tokenizer):
    first, second, corpus = score("-", "--format", "txt", stdin=b"One line.\r\nAnother line").lines
    for row, text in ((first, "One line."), (second, "Another line")):
        ids = tokenizer.encode(text)
        assert row["num_tokens"] == len(ids)
        assert row["total_logprob"] == pytest.approx(math.fsum(one(ids)[1:]), abs=1e-2)
    assert corpus["corpus"]["rows"] == 2


def test_invalid_rows(score, tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [
        '{"text": "good one"}',
        '{"text": ""}',
        '{"prompt": "no completion"}',
        '{"prompt": "a", "completion": "b", "text": "c"}',
        '{"token_ids": [1, 512]}',
        '{"token_ids": [1]}',
        '{"txt": "x", "id": 7}',
        "{}",
        "nonsense",
    ]
    file.write_text("\n".join(lines) + "\n")
    refused = score(file)
    assert (refused.code, refused.out) == (1, "")
    *record, last = refused.err.splitlines()
    assert [int(line.split("line ")[1].split(":")[0]) for line in record] == list(range(2, 10))
    reasons = [
        "0 tokens, expected at least 2",
        "no completion",
        "text and prompt and completion",
        "token id 512",
        "1 tokens",
        'unknown field "txt"',
        "no text",
        "invalid JSON",
    ]
    for line, reason in zip(record, reasons, strict=True):
        assert reason in line
    assert "8 of 9 rows" in last
    skipped = score(file, "--skip-bad")
    assert skipped.code == 1
    good, *bad, corpus = skipped.lines
    assert good["num_scored"] > 0
    assert [row["line"] for row in bad] == list(range(2, 10))
    assert bad[5]["id"] == 7
    assert corpus["corpus"]["rows"] == 1


def test_strides(score, one, grok1, checkpoint, tokenizer, rows_file, tmp_path):
    """Compare the windows of the command with windows computed here."""
    ids = tokenizer.encode(ROWS[4]["text"])
    expected = [None] * len(ids)
    start = 0
    while None in expected[1:]:
        window = ids[start : start + 65]
        for place, value in enumerate(one(window)):
            if value is not None and expected[start + place] is None:
                expected[start + place] = value
        start += 10
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"token_ids": ids}) + "\n")
    row, _ = score(file, "--stride", 10, "--per-token").lines
    assert row["logprobs"] == pytest.approx(expected[1:], abs=1e-3)
    alone = ("score", "-c", checkpoint, "--mesh", "1,1", "--ids", "--json", "--stride", 10)
    (told,) = grok1(*alone, stdin=json.dumps(ids).encode()).lines
    assert told["logprobs"][1:] == pytest.approx(expected[1:], abs=1e-3)
    refused = score(rows_file, "--stride", 65)
    assert refused.code == 1
    assert "expected 1 to 64" in refused.err


def test_chunks(score, one, tokenizer, tmp_path):
    text = "It was said before, größer 東京 and again. " * 6
    file = tmp_path / "corpus.txt"
    file.write_text(text, encoding="utf-8")
    ids = tokenizer.encode(text)
    for bos in (False, True):
        values, expected, num_bytes = [], [], 0
        for start in range(0, len(ids) - 31, 32):
            chunk = ([1] if bos else [ids[start]]) + ids[start + 1 : start + 32]
            values += one(chunk)[17:]
            pieces = tokenizer.pieces(chunk[17:])
            num_bytes += sum(
                1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode()) for piece in pieces
            )
            expected.append(math.exp(-math.fsum(values) / len(values)))
        arguments = (file, "--chunk", 32, *(["--bos"] if bos else []))
        shown, last = score(*arguments).out.splitlines()
        found = [part.strip("[").split("]") for part in shown.rstrip(",").split(",")]
        assert [int(number) for number, _ in found] == list(range(1, len(expected) + 1))
        assert [float(value) for _, value in found] == pytest.approx(expected, rel=2e-3)
        assert last.split()[:2] == ["perplexity", found[-1][1]]
        *rows, corpus = score(*arguments, "--json").lines
        assert len(rows) == len(expected)
        bits_per_byte = corpus["corpus"]["bits_per_byte"]
        assert bits_per_byte == pytest.approx(-math.fsum(values) / math.log(2) / num_bytes, rel=1e-3)
        assert f", bits per byte {bits_per_byte:.4f}, {len(values)} tokens" in last
        assert corpus["corpus"]["perplexity"] == pytest.approx(expected[-1], rel=2e-3)
    output = tmp_path / "chunks.jsonl"
    assert score(*arguments, "-o", output).code == 0
    assert output.read_text() == score(*arguments, "--json").out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--chunk", 32], 1, "expected at least 32 (--chunk)"),
        (["--chunk", 65], 1, "expected 4 to 64"),
        (["--chunk", 3], 2, "--chunk"),
        (["--chunk", 8, "--format", "txt"], 2, "--chunk cannot be used with --format or --stride"),
        (["--chunk", 8, "--stride", 4], 2, "--chunk cannot be used with --format or --stride"),
        (["--bos"], 2, "--bos requires --chunk"),
        (["--format", "txt", "--json"], 2, "--json requires -o"),
        (["--format", "txt", "--ids"], 2, "cannot be used with --text or --ids"),
        (["--per-token"], 2, "--per-token"),
        (["--restart", "--format", "txt"], 2, "--restart requires -o"),
    ],
)
def test_conflicting_options(grok1, checkpoint, tmp_path, arguments, code, words):
    file = tmp_path / "text.txt"
    file.write_text("hardly any words")
    result = grok1("score", "-c", checkpoint, "--mesh", "1,1", file, *arguments)
    assert (result.code, result.out) == (code, "")
    assert words in result.err


def without(key, journal):
    """Return the lines of a journal without a key in the first one, as written by an older version."""
    first, *rows = journal.read_bytes().splitlines(keepends=True)
    job = json.loads(first[9:])
    del job[key]
    text = json.dumps(job).encode() + b"\n"
    return b"%08x " % zlib.crc32(text) + text + b"".join(rows)


def test_killed_job_resumes(score, start, checkpoint, rows_file, tmp_path):
    rows_file.write_text(rows_file.read_text() * 40)
    expected = score(rows_file).out
    output = tmp_path / "scores.jsonl"
    arguments = ("score", rows_file, "-c", checkpoint, *ARGUMENTS, "-o", output)
    process = start(*arguments)
    journal = tmp_path / "scores.jsonl.journal"
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 20):
        pass
    process.kill()
    process.wait()
    assert not output.exists()
    kept = journal.read_bytes().count(b"\n") - 1
    assert kept >= 19
    old = tmp_path / "old.jsonl"
    old.with_name("old.jsonl.journal").write_bytes(without("result_version", journal))
    refused = score(rows_file, "-o", old)
    assert (refused.code, old.exists()) == (1, False)
    assert "the version of the result lines was 1 and is now 2" in refused.err
    assert "--restart" in refused.err
    older = tmp_path / "older.jsonl"  # its kernels are unknown
    older.with_name("older.jsonl.journal").write_bytes(without("kernels", journal))
    assert score(rows_file, "-o", older, "--kernels", "xla").code == 0
    resumed = score(rows_file, "-o", output, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.lines[0]["rows"] == 40 * len(ROWS)
    assert resumed.lines[0]["tokens_in"] > 0
    assert output.read_text() == expected
