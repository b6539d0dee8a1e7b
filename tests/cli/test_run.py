import shutil

import pytest

from grok1.checkpoint.reader import Checkpoint
from grok1.text.tokenizer import Tokenizer
from grok1.text.train_tokenizer import train_small_tokenizer

KEYS = {
    "prompt",
    "prompt_token_ids",
    "text",
    "token_ids",
    "finish_reason",
    "stop_text",
    "seed",
    "sample",
    "prefill_seconds",
    "decode_seconds",
    "compile_seconds",
    "time_to_first_token_seconds",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "load_seconds",
    "peak_memory_bytes",
    "peak_device_memory_bytes",
    "mesh",
}


def assert_fails(result, *words):
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("grok1: error: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert word in result.err


def test_text_json_and_subprocess_agree(complete, start, checkpoint):
    options = ["A word", "-n", 12, "--seed", 5, "--ignore-eos"]
    (record,) = complete(*options, "--json").lines
    assert set(record) == KEYS
    assert (record["prompt"], record["seed"], record["sample"], record["mesh"]) == ("A word", 5, 0, [1, 1])
    assert len(record["token_ids"]) == 12
    assert record["finish_reason"] == "max_tokens"
    plain = complete(*options)
    assert (plain.code, plain.out, plain.err) == (0, record["text"] + "\n", "")
    process = start("run", "-c", checkpoint, "--mesh", "1,1", *options)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.decode(), err) == (0, record["text"] + "\n", b"")


def test_seed_gives_the_same_text_in_any_batch_and_mesh(complete):
    options = ["Some words", "-n", 10, "--ignore-eos", "--json"]
    samples = complete(*options, "--seed", 7, "--num-samples", 3).lines
    assert [line["sample"] for line in samples] == [0, 1, 2]
    assert [line["seed"] for line in samples] == [7, 8, 9]
    assert len({line["text"] for line in samples}) == 3
    (alone,) = complete(*options, "--seed", 8).lines
    assert alone["text"] == samples[1]["text"]
    (sharded,) = complete(*options, "--seed", 8, mesh="2,2").lines
    assert sharded["mesh"] == [2, 2]
    assert sharded["text"] == samples[1]["text"]


def test_samples_as_text_are_preceded_by_a_line(complete):
    options = ["Some words", "-n", 6, "--seed", 7, "--num-samples", 2]
    texts = [line["text"] for line in complete(*options, "--json").lines]
    first, second = (f"--- sample {i + 1} of 2, seed {7 + i} ---\n{text}\n" for i, text in enumerate(texts))
    assert complete(*options).out == first + second


def test_logprobs(complete):
    (record,) = complete("word", "-n", 5, "--logprobs", 2, "--greedy", "--ignore-eos", "--json").lines
    assert len(record["logprobs"]) == 5
    for token, entry in zip(record["token_ids"], record["logprobs"], strict=True):
        assert set(entry) == {"token_id", "logprob", "top"}
        assert len(entry["top"]) == 2
        assert entry["token_id"] == token == entry["top"][0]["token_id"]
        assert entry["logprob"] == entry["top"][0]["logprob"] < 0


def test_stop_text_ends_the_text_before_it(complete):
    options = ["A word", "-n", 12, "--seed", 5, "--ignore-eos", "--json"]
    text = complete(*options).lines[0]["text"]
    stop = text[3:5]
    (record,) = complete(*options, "--stop", stop).lines
    assert record["text"] == text[: text.index(stop)]
    assert (record["finish_reason"], record["stop_text"]) == ("stop", stop)


def test_prompt_sources(complete, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes("two [bold]lines\nñ\n\n".encode())
    options = ["-n", 2, "--json"]
    expected = "two [bold]lines\nñ\n"
    assert complete("--prompt-file", file, *options).lines[0]["prompt"] == expected
    assert complete(*options, stdin=file.read_bytes()).lines[0]["prompt"] == expected
    assert complete("-", *options, stdin=file.read_bytes()).lines[0]["prompt"] == expected
    assert complete("/quit", *options, stdin=b"not read").lines[0]["prompt"] == "/quit"
    both = complete("word", "--prompt-file", file)
    assert both.code == 2
    assert "PROMPT and --prompt-file" in both.err


def test_echo_prints_the_prompt_first(complete):
    options = ["[bold]Some words", "-n", 4, "--seed", 1]
    assert complete(*options, "--echo").out == "[bold]Some words" + complete(*options).out


def test_prompt_that_is_too_long(complete):
    words = " ".join(["0"] * 200)
    assert_fails(complete(words), "400 tokens", "expected at most 63", "context is 64", "--truncate")
    (record,) = complete(words, "--truncate", "-n", 4, "--json").lines
    assert len(record["prompt_token_ids"]) == 60
    assert record["prompt"] == words


def test_invalid_prompts(complete, tmp_path):
    assert_fails(complete(""), "the prompt is empty")
    assert_fails(complete(stdin=b""), "the prompt is empty")
    assert_fails(complete(stdin=b"ab\xffc"), "standard input", "0xff at offset 2")
    assert_fails(complete("ab\udcffc"), "PROMPT", "0xff at offset 2")
    assert_fails(complete("--prompt-file", tmp_path / "none"), "none", "No such file")
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    assert_fails(complete("--prompt-file", tmp_path / "latin"), "0xef at offset 2")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "-1"], "'-t' / '--temperature' / '--temp': expected a finite number, 0 or more, got -1.0."),
        (["--temp", "nan"], "expected a finite number, 0 or more, got NaN"),
        (["-t", "inf"], "expected a finite number, 0 or more, got Infinity"),
        (["--top-p", "0"], "'--top-p': expected a number above 0 and at most 1, got 0.0"),
        (["--top-p", "1.1"], "at most 1, got 1.1"),
        (["--top-p", "nan"], "at most 1, got NaN"),
        (["--top-k", "-1"], "'--top-k': expected 0 to 2147483647, got -1"),
        (["--min-p", "2"], "'--min-p': expected 0 to 1, got 2.0"),
        (["-n", "0"], "'--max-tokens': expected at least 1, got 0"),
        (["-n", "many"], "'many' is not a valid integer"),
        (["--seed", "-1"], "'--seed': expected 0 to 9223372036854775807, got -1"),
        (["--seed", str(2**63 - 1), "--num-samples", "2"], "expected at most 9223372036854775806 for 2 samples"),
        (["--stop", ""], 'expected non-empty texts, got [""]'),
        (["--logprobs", "2"], "--logprobs requires --json"),
        (["--logprobs", "21", "--json"], "'--logprobs': expected 0 to 20, got 21"),
        (["--num-samples", "0"], "--num-samples"),
        (["--greedy", "--temperature", "0.5"], "--greedy and --temperature cannot be used together"),
        (["--mesh", "8"], 'expected two positive integers such as 1,8, got "8"'),
        (["--mesh", "1,x"], 'expected two positive integers such as 1,8, got "1,x"'),
        (["--mesh", "0,8"], 'expected two positive integers such as 1,8, got "0,8"'),
        (["--dtype", "float16"], "'float16' is not one of"),
    ],
)
def test_values_out_of_range_are_usage_errors(grok1, options, words):
    result = grok1("run", "word", *options)
    assert (result.code, result.out) == (2, "")
    assert words in result.err


def test_greedy_agrees_with_temperature_0(complete):
    greedy, cold = (complete("word", "-n", 4, *options).out for options in (["--greedy"], ["-t", 0]))
    assert greedy == cold
    assert complete("word", "-n", 4, "--greedy", "--temp", 0).out == cold


def test_invalid_mesh_error_suggests_a_valid_mesh(complete):
    result = complete("word", mesh="1,3")
    assert_fails(result, "mesh 1,3", "8 query heads", "use --mesh 1,2")
    assert complete("word", "-n", 1, mesh="1,2").code == 0


def test_missing_checkpoint_error_explains_how_to_get_one(grok1, tmp_path, monkeypatch):
    assert_fails(grok1("run", "-c", tmp_path / "none", "word"), "none does not exist", "grok1 init")
    monkeypatch.setenv("GROK1_CHECKPOINT", str(tmp_path / "other"))
    assert_fails(grok1("run", "word"), "other does not exist")


def test_missing_or_mismatched_tokenizers(grok1, checkpoint, tmp_path, monkeypatch):
    bare = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.model"))
    assert_fails(grok1("run", "-c", bare, "word"), "no tokenizer.model", "--tokenizer FILE")
    monkeypatch.setenv("GROK1_TOKENIZER", str(checkpoint / "tokenizer.model"))
    assert grok1("run", "-c", bare, "word", "-n", 1, "--mesh", "1,1").code == 0
    other = tmp_path / "other.model"
    other.write_bytes(train_small_tokenizer(600))
    wrong = grok1("run", "-c", checkpoint, "--tokenizer", other, "word")
    assert_fails(wrong, "has 600 pieces", "expected 512")


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "A word", "-n", 2),
        ("score", "--text", "A word"),
        ("batch", "-", "--format", "txt", "-n", 2),
        ("bench", "--prompt", 8, "--decode", 2),
    ],
)
def test_checkpoint_and_tokenizer_are_read_once(arguments, grok1, checkpoint, monkeypatch):
    read = []

    def count(kind, name):
        real = getattr(kind, name)

        def counted(*arguments):
            read.append(kind)
            return real(*arguments)

        monkeypatch.setattr(kind, name, counted)

    count(Checkpoint, "open")
    count(Tokenizer, "read")
    assert grok1(*arguments, "-c", checkpoint, "--mesh", "1,1", stdin=b"A word\n").code == 0
    assert read == [Checkpoint, Tokenizer]
