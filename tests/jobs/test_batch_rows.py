"""Every row of a job against the same row alone."""

import dataclasses
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from configs import TEXT_ALL_EXPERTS

from grok1.errors import JobError
from grok1.jobs.batch import CompletionJob
from grok1.jobs.rows import RowDefaults
from grok1.jobs.run import JobProgress, OrderedResults, process_rows
from grok1.jobs.source import Source
from grok1.jobs.validate import validate
from grok1.model import Model
from grok1.request import SamplingOptions
from grok1.text.tokenizer import Tokenizer
from grok1.text.train_tokenizer import train_small_tokenizer

BATCHING = {"batch_size": 5, "lanes": 4, "logprobs": True}

CONFIG = dataclasses.replace(TEXT_ALL_EXPERTS, sequence_len=128)


def completion_job(path, tokenizer=None, **defaults):
    defaults = RowDefaults(**{"sampling": SamplingOptions(seed=11), **defaults})
    return CompletionJob(Source.open(path), SimpleNamespace(config=CONFIG), tokenizer, defaults)


@pytest.fixture(scope="module")
def model(make_checkpoint, make_engine):
    tokenizer = Tokenizer.from_bytes(train_small_tokenizer(CONFIG.vocab_size), "small")
    return Model(make_engine(make_checkpoint(CONFIG)), tokenizer)


@pytest.fixture
def job(model, tmp_path):
    """Runs rows, given as what JSON says, and gives the results."""

    def job(rows, **defaults):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = completion_job(path, model.tokenizer, **defaults)
        validation = validate(job.rows(), lambda row: None, lambda count: None)
        lines = []
        progress = JobProgress()
        rows = validation.unchanged(job.rows())
        for _ in process_rows(job, model, rows, OrderedResults(lines.append), progress, threading.Event(), BATCHING):
            assert progress.done <= validation.rows
        assert progress.done == validation.rows
        return [json.loads(line) for line in lines]

    return job


def mixed_rows():
    """Lengths of 1 to the context, 1 to 64 new tokens, and every option somewhere."""
    rng = np.random.default_rng(0)
    header = [int(token) for token in rng.integers(3, 512, 60)]
    words = [
        "the",
        "answer",
        "of",
        "an",
        "old",
        "question",
        "is",
        "not",
        "what",
        "anybody",
        "would",
        "have",
        "thought",
        "at",
        "first",
    ]
    for index in range(300):
        row = {"id": index, "max_tokens": int(rng.integers(1, 65)), "temperature": float(rng.choice([0, 0.7, 1.5]))}
        kind = index % 5
        if kind == 0:
            row["prompt_token_ids"] = rng.integers(3, 512, int(rng.integers(1, 128))).tolist()
        elif kind == 1:
            row["prompt"] = " ".join(rng.choice(words, int(rng.integers(1, 20))))
        elif kind == 2:
            row["prompt"] = header[: int(rng.integers(1, 61))] + rng.integers(3, 512, int(rng.integers(1, 60))).tolist()
        elif kind == 3:
            row |= {"prompt": "word " * int(rng.integers(1, 200)), "truncate": True}
        else:
            row |= {"prompt": " ".join(rng.choice(words, 4)), "stop": ["e", "\n"], "n": int(rng.integers(1, 4))}
        row |= {"top_p": 0.8} if index % 3 == 0 else {"top_k": 20} if index % 3 == 1 else {"min_p": 0.05}
        row |= {"logprobs": 3} if index % 4 == 0 else {}
        row |= {"echo": True} if index % 7 == 0 else {}
        row |= {"ignore_eos": True} if index % 2 == 0 else {}
        row |= {"seed": index} if index % 6 == 0 else {}
        yield row


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_every_row_equals_the_same_row_alone(count, job, model):
    rows = list(mixed_rows())[:count]
    results = job(rows)
    assert [result["index"] for result in results] == list(range(count))
    lengths = set()
    for row, result in zip(rows, results, strict=True):
        assert result["id"] == row["id"]
        prompt = row.get("prompt_token_ids") or row["prompt"]
        options = {
            name: row[name] for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "stop") if name in row
        }
        assert len(result["completions"]) == row.get("n", 1)
        for sample, found in enumerate(result["completions"]):
            if sample == 0 and "seed" in row:
                assert found["seed"] == row["seed"]
            alone = model.complete(
                prompt,
                truncate=row.get("truncate", False),
                seed=found["seed"],
                logprobs=row.get("logprobs"),
                ignore_eos=row.get("ignore_eos", False),
                **options,
            )
            before = ""
            if row.get("echo"):
                before = prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
            assert found["token_ids"] == alone.tokens
            assert found["text"] == before + alone.text
            assert (found["finish_reason"], found["stop_text"]) == (alone.finish_reason, alone.stop_text)
            assert ("logprobs" in found) == ("logprobs" in row)
            for told, entry in zip(found.get("logprobs", []), alone.logprobs or [], strict=True):
                assert told["logprob"] == pytest.approx(entry.logprob, abs=1e-3)
                assert [top["token_id"] for top in told["top"]] == [token for token, _ in entry.top]
        assert result["prompt_tokens"] == len(alone.prompt_tokens)
        assert result["completion_tokens"] == sum(len(found["token_ids"]) for found in result["completions"])
        lengths.add(len(alone.prompt_tokens))
    assert min(lengths) < 5
    assert max(lengths) > 100


def test_results_do_not_depend_on_order(job):
    rows = [row | {"seed": row["id"]} for row in list(mixed_rows())[:40]]
    forwards = {result["id"]: result for result in job(rows)}
    backwards = {result["id"]: result for result in job(rows[::-1])}
    for index, result in forwards.items():
        assert result | {"index": 0} == backwards[index] | {"index": 0}


def test_bad_rows_have_a_line_each(job):
    results = job([{"prompt": "a"}, {"prompt": ""}, {"prompt": "b"}, {"id": 5}], num_samples=2)
    assert [sorted(result) for result in results[::2]] == [sorted(results[0])] * 2
    assert [len(result["completions"]) for result in results[::2]] == [2, 2]
    assert [(result["index"], result["line"], result["id"]) for result in results[1::2]] == [(1, 2, None), (3, 4, 5)]
    assert all(result["error"] for result in results[1::2])


def test_rows_that_changed_after_they_were_checked(tmp_path):
    path = tmp_path / "rows.txt"
    tokenizer = Tokenizer.from_bytes(train_small_tokenizer(CONFIG.vocab_size), "small")

    def read():
        return completion_job(path, tokenizer).rows()

    path.write_text("one\ntwo\n")
    validation = validate(read(), lambda row: None, lambda count: None)
    assert [row.index for row in validation.unchanged(read())] == [0, 1]
    for content, words in (("one\nTwo\n", "line 2"), ("one\ntwo\nthree\n", "line 3"), ("one\n", "lost 1 rows")):
        path.write_text(content)
        with pytest.raises(JobError, match=words):
            list(validation.unchanged(read()))


def test_validation_counts_the_tokens_that_rows_do_not_share(tmp_path):
    path = tmp_path / "rows.jsonl"
    ids = list(range(3, 103))
    rows = [ids, [*ids[:90], 5], [7], {"bad": 1}, [7, 8, 9]]
    path.write_text(
        "".join(json.dumps({"prompt": row, "n": 2} if isinstance(row, list) else row) + "\n" for row in rows)
    )
    bad = []
    validation = validate(completion_job(path).rows(), lambda row: bad.append(row.line), lambda count: None)
    assert (validation.rows, validation.bad, validation.sequences, bad) == (5, 1, 8, [4])
    assert validation.new_tokens == 100 + 1 + 1 + 2
    assert validation.mean_new_tokens == 104 / 4
