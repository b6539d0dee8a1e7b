import json
import math
import shutil

import pytest

from grok1.text.tokenizer import Tokenizer

TEXT = "Ein Füßchen\n\tund 東京\n"  # 東京 is encoded as bytes


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer.read(checkpoint / "tokenizer.model")


def test_tokenize_and_detokenize_are_inverse(grok1, checkpoint, tokenizer):
    ids = tokenizer.encode(TEXT)
    plain = grok1("tokenize", "-c", checkpoint, TEXT)
    assert (plain.code, plain.out) == (0, " ".join(map(str, ids)) + "\n")
    assert grok1("tokenize", "-c", checkpoint, stdin=(TEXT + "\n").encode()).out == plain.out
    for separator in (" ", ",", "\n"):
        joined = separator.join(map(str, ids)).encode()
        assert grok1("detokenize", "-c", checkpoint, stdin=joined).out == TEXT + "\n"
    assert grok1("detokenize", "-c", checkpoint, stdin=json.dumps(ids).encode()).out == TEXT + "\n"
    assert grok1("detokenize", "-c", checkpoint, *ids).out == TEXT + "\n"
    assert grok1("detokenize", "-c", checkpoint, *ids, "--json").lines == [{"text": TEXT}]


def test_pieces_are_escaped(grok1, checkpoint, tokenizer, tmp_path):
    file = tmp_path / "text"
    file.write_text(TEXT + "\n", encoding="utf-8")
    ids = tokenizer.encode(TEXT)
    rows = [
        line.split("\t") for line in grok1("tokenize", "-c", checkpoint, "--pieces", "--file", file).out.splitlines()
    ]
    assert [int(token) for token, _ in rows] == ids
    assert rows[-1][1] == "\\n"
    (record,) = grok1("tokenize", "-c", checkpoint, "--json", "--file", file).lines
    assert record == {"token_ids": ids, "pieces": tokenizer.pieces(ids)}


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ("1 x", 'invalid token id "x"'),
        ("1.5", 'invalid token id "1.5"'),
        ("512", "token id 512 is out of range (0 to 511)"),
        ("9" * 30, "of 30 digits"),
        ("[1, true]", "input: invalid token id true"),
        ("[1", "is not valid JSON"),
    ],
)
def test_invalid_token_ids(grok1, checkpoint, ids, words):
    result = grok1("detokenize", "-c", checkpoint, stdin=ids.encode())
    assert (result.code, result.out) == (1, "")
    assert words in result.err


def test_missing_tokenizer(grok1, tmp_path):
    result = grok1("tokenize", "-c", tmp_path, "word")
    assert result.code == 1
    assert "--tokenizer FILE" in result.err


@pytest.fixture
def score(grok1, checkpoint):
    def run(*arguments, stdin=b"", folder=checkpoint):
        return grok1("score", "-c", folder, "--mesh", "1,1", *arguments, stdin=stdin)

    return run


def test_score_of_a_text(score, tokenizer, tmp_path):
    ids = tokenizer.encode(TEXT)
    (record,) = score("--text", TEXT, "--top", 2, "--json").lines
    assert record["token_ids"] == ids
    assert record["pieces"] == tokenizer.pieces(ids)
    assert record["num_tokens"] == len(ids) == len(record["logprobs"]) == len(record["top"])
    assert record["logprobs"][0] is record["top"][0] is None
    assert record["total_logprob"] == pytest.approx(sum(record["logprobs"][1:]))
    assert record["perplexity"] == pytest.approx(math.exp(-record["total_logprob"] / (len(ids) - 1)))
    scored = len(TEXT.encode()) - len(record["pieces"][0].removeprefix("▁").encode())
    bits = -math.fsum(record["logprobs"][1:]) / math.log(2)
    assert record["bits_per_byte"] == pytest.approx(bits / scored)
    for logprob, top in zip(record["logprobs"][1:], record["top"][1:], strict=True):
        assert len(top) == 2
        assert top[0]["logprob"] >= top[1]["logprob"]
        assert logprob <= top[0]["logprob"]
    file = tmp_path / "text"
    file.write_text(TEXT, encoding="utf-8")
    listed = tmp_path / "ids.json"
    listed.write_text(json.dumps(ids))
    for again in (score(file, "--json"), score("-", "--json", stdin=TEXT.encode()), score(listed, "--json")):
        assert again.lines[0]["logprobs"] == record["logprobs"]


def test_bits_per_byte_count_the_bytes_of_scored_tokens(score, tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.pieces(ids)[-7:-1] == [f"<0x{byte:02X}>" for byte in "東京".encode()]
    for tokens, count in [
        ([1, *ids], len(TEXT.encode())),  # after BOS, the whole text
        ([ids[0], *tokenizer.encode("東")[1:3]], 2),  # part of a character
        ([ids[0], 3, 2], len("[UNK]")),
    ]:
        (record,) = score("--ids", "--json", stdin=json.dumps(tokens).encode()).lines
        bits = -math.fsum(record["logprobs"][1:]) / math.log(2)
        assert record["bits_per_byte"] == pytest.approx(bits / count)
    (record,) = score("--ids", "--json", stdin=b"5 2 0").lines
    assert record["bits_per_byte"] is None
    assert "bits per byte" not in score("--ids", stdin=b"5 2 0").out


def test_score_agrees_with_the_logprobs_of_a_completion(score, complete):
    (completed,) = complete("word", "-n", 6, "--seed", 2, "--logprobs", 0, "--ignore-eos", "--json").lines
    ids = completed["prompt_token_ids"] + completed["token_ids"]
    (scored,) = score("--ids", "--json", stdin=json.dumps(ids).encode()).lines
    generated = [entry["logprob"] for entry in completed["logprobs"]]
    assert scored["logprobs"][-6:] == pytest.approx(generated, abs=1e-3)


def test_score_as_a_table(score, tokenizer):
    ids = tokenizer.encode(TEXT)
    (record,) = score("--text", TEXT, "--json").lines
    lines = score("--text", TEXT).out.splitlines()
    assert lines[0].split() == ["index", "id", "piece", "logprob"]
    assert [int(line.split()[1]) for line in lines[1 : len(ids) + 1]] == ids
    assert lines[2].split()[-1] == f"{record['logprobs'][1]:.4f}"
    assert lines[-2].split() == ["perplexity", f"{record['perplexity']:.4f}"]
    assert lines[-1] == f"bits per byte          {record['bits_per_byte']:.4f}"


def test_ids_are_scored_without_a_tokenizer(score, checkpoint, tmp_path):
    bare = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.model"))
    (record,) = score("--ids", "--json", stdin=b"5 6 7", folder=bare).lines
    assert (record["token_ids"], record["pieces"], record["bits_per_byte"]) == ([5, 6, 7], None, None)
    assert math.isfinite(record["perplexity"])
    assert score("--ids", stdin=b"5 6 7", folder=bare).out.splitlines()[-1].startswith("perplexity ")
    missing = score("--text", "word", folder=bare)
    assert missing.code == 1
    assert "no tokenizer.model" in missing.err


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["--ids"], b"5", "1 tokens, expected at least 2"),
        (["--ids"], b"5 512", "token id 512 is out of range"),
        (["-"], b"ab\xff", "0xff at offset 2"),
    ],
)
def test_invalid_texts(score, arguments, stdin, words):
    result = score(*arguments, stdin=stdin)
    assert (result.code, result.out) == (1, "")
    assert words in result.err


def test_usage_errors_of_score(score, tmp_path):
    assert score(tmp_path / "file", "--text", "word").code == 2
    assert score("--text", "word", "--top", "21").code == 2
