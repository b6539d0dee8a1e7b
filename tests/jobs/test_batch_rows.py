"""Rows of a job give what each of them gives alone, and the same bytes however the job runs."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from grok1.engine.generate import Occupancy
from grok1.engine.request import SamplingOptions
from grok1.errors import JobError
from grok1.jobs.batch import BatchOptions, BatchProgress, Survey, complete_rows
from grok1.jobs.results import OrderedResults
from grok1.jobs.rows import RowDefaults, read_rows, row_seed
from grok1.jobs.source import Source
from grok1.model import Model

DEFAULTS = RowDefaults(SamplingOptions(max_tokens=5, seed=11))


@pytest.fixture(scope="module")
def model(config, tokenizer, make_checkpoint, make_engine):
    return Model(make_engine(make_checkpoint(config)), tokenizer)


def job(model, tokenizer, path, size, defaults=DEFAULTS, lanes=4, stop_after=None, results=None):
    """Runs a file of rows; what it wrote, and how."""
    source = Source.open(path)
    bad, lines = [], []
    survey = Survey.of(read_rows(source, defaults, tokenizer, model.config), bad.append, lambda _: None)
    progress, occupancy, stopping = BatchProgress(survey.rows), Occupancy(), threading.Event()
    rows = survey.unchanged(read_rows(source, defaults, tokenizer, model.config))
    results = OrderedResults(lines.append) if results is None else results
    options = BatchOptions(size, lanes, survey.logprobs)
    for done, _ in enumerate(complete_rows(model, rows, results, options, progress, occupancy, stopping), 1):
        if done == stop_after:
            stopping.set()
    return SimpleNamespace(lines=lines, survey=survey, bad=bad, progress=progress, occupancy=occupancy)


def mixed_rows(count, config, tokenizer, options=True):
    """Rows of all lengths and options; ids and text, with beginnings in common now and then."""
    rng = np.random.default_rng(4)
    words = ["the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "with", "as", "be", "at"]
    header = rng.integers(4, config.vocab_size, 70).tolist()
    for i in range(count):
        row = {"id": f"row-{i}", "max_tokens": int(rng.integers(1, 65)), "logprobs": [None, 0, 4][i % 3]}
        if i % 4 == 0:
            row["prompt"] = " ".join(rng.choice(words, int(rng.integers(1, 20)))) + " ñ東"
        else:
            length = int(rng.integers(1, config.sequence_len))
            row["prompt_token_ids"] = (header * (i % 4 == 1) + rng.integers(4, config.vocab_size, length).tolist())[
                : 60 if i % 4 == 1 else None
            ]
        if i % 7 == 0:
            row |= {"prompt_token_ids": rng.integers(4, config.vocab_size, 150).tolist(), "truncate": True}
            row.pop("prompt", None)
        row["temperature"] = [0, 0.7, 1.5][i % 3]
        row |= [{}, {"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.1}, {"seed": 1000 + i}][i % 5]
        if i % 6 == 0:
            row["stop"] = ["e", "th"]
        if i % 10 == 3:
            row["n"] = 3
        row |= {"echo": i % 8 == 1, "ignore_eos": i % 2 == 0}
        yield row


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def mixed(config, tokenizer):
    return list(mixed_rows(300, config, tokenizer))


def test_a_mixed_job_gives_what_each_row_gives_alone(model, tokenizer, mixed, write):
    done = job(model, tokenizer, write("rows.jsonl", jsonl(mixed)), 16)
    results = [json.loads(line) for line in done.lines]
    assert [result["index"] for result in results] == list(range(300))
    assert not done.bad
    reasons = set()
    for row, result in zip(mixed, results, strict=True):
        prompt = row.get("prompt", row.get("prompt_token_ids"))
        assert (result["id"], result.get("prompt", result.get("prompt_token_ids"))) == (row["id"], prompt)
        assert len(result["completions"]) == row.get("n", 1)
        options = {
            key: row[key]
            for key in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "logprobs", "ignore_eos")
            if key in row
        }
        seed = row.get("seed", row_seed(11, result["index"]))
        for sample, completion in enumerate(result["completions"]):
            alone = model.complete(prompt, truncate=row.get("truncate", False), seed=seed + sample, **options)
            before = "" if not row["echo"] else prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            assert completion["token_ids"] == alone.tokens
            assert completion["text"] == before + alone.text
            assert (completion["finish_reason"], completion["stop_text"]) == (alone.finish_reason, alone.stop_text)
            assert completion["seed"] == alone.seed == seed + sample
            assert result["prompt_tokens"] == len(alone.prompt_tokens)
            reasons.add(alone.finish_reason)
            assert ("logprobs" in completion) == (alone.logprobs is not None)
            for found, expected in zip(completion.get("logprobs", []), alone.logprobs or [], strict=True):
                assert found["logprob"] == pytest.approx(expected.logprob, abs=1e-4)
                assert [top["logprob"] for top in found["top"]] == pytest.approx([p for _, p in expected.top], abs=1e-4)
            tokens = [entry["token_id"] for entry in completion.get("logprobs", [])]
            assert not tokens or tokens == alone.tokens
        assert result["completion_tokens"] == sum(len(each["token_ids"]) for each in result["completions"])
    assert reasons >= {"max_tokens", "stop", "context", "eos"}
    assert (done.progress.done, done.progress.failed) == (300, 0)
    assert done.progress.prompt_tokens == done.survey.prompt_tokens == sum(row["prompt_tokens"] for row in results)
    assert done.occupancy.generated_tokens >= done.progress.completion_tokens
    assert done.occupancy.slots == 16
    assert done.occupancy.mean_use > 0.8


def test_the_batch_size_and_the_neighbours_do_not_show(model, tokenizer, mixed, write):
    rows = [row | {"seed": 50 + i, "logprobs": None} for i, row in enumerate(mixed[:60])]
    whole = job(model, tokenizer, write("rows.jsonl", jsonl(rows)), 16).lines
    assert job(model, tokenizer, write("rows.jsonl", jsonl(rows)), 5).lines == whole
    backwards = [json.loads(line) for line in job(model, tokenizer, write("b.jsonl", jsonl(rows[::-1])), 16).lines]
    for forth, back in zip(map(json.loads, whole), backwards[::-1], strict=True):
        assert forth["completions"] == back["completions"]


def test_a_job_that_stops_goes_on_to_the_same_bytes(model, tokenizer, mixed, write):
    path = write("rows.jsonl", jsonl(mixed[:80]))
    whole = job(model, tokenizer, path, 8).lines

    class Kept(dict):
        add = dict.__setitem__

    kept = Kept()
    done = 0
    for stop_after in (1, 20, 20, None):
        run = job(model, tokenizer, path, 8, stop_after=stop_after, results=kept)
        done += run.progress.done
        assert run.progress.done <= 80 if stop_after is None else stop_after <= run.progress.done <= stop_after + 8
        assert len(kept) == done
    assert [kept[index] for index in range(80)] == whole


def test_bad_rows_are_results_too(model, tokenizer, write):
    done = job(model, tokenizer, write("rows.jsonl", b'{"prompt": 3, "id": 7}\n\n{"prompt": "a"}\nx\n'), 4)
    first, second, third = map(json.loads, done.lines)
    assert first == {
        "index": 0,
        "id": 7,
        "line": 1,
        "error": "prompt is 3: expected one text, or one list of token ids",
    }
    assert (second["index"], second["prompt"], len(second["completions"])) == (1, "a", 1)
    assert (third["index"], third["id"], third["line"]) == (2, None, 4)
    assert [row.index for row in done.bad] == [0, 2]
    assert (done.survey.rows, done.survey.bad, done.survey.completions) == (3, 2, 1)
    assert (done.progress.done, done.progress.failed) == (3, 2)


def test_what_a_survey_counts(model, tokenizer, write, config):
    rows = [
        {"prompt": [5] * 40, "n": 3},
        {"prompt": [5] * 40 + [6] * 20, "max_tokens": 30, "logprobs": 0},
        {"prompt": [7] * 10, "max_tokens": 1},
    ]
    source = Source.open(write("rows.jsonl", jsonl(rows)))
    survey = Survey.of(read_rows(source, DEFAULTS, tokenizer, config), pytest.fail, lambda _: None)
    assert (survey.rows, survey.bad, survey.completions) == (3, 0, 5)
    assert (survey.prompt_tokens, survey.new_tokens, survey.longest) == (110, 70, 90)
    assert survey.logprobs
    assert survey.mean_new_tokens == pytest.approx(70 / 3)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (b"a\nB\nc\n", "line 2 of the input changed while its rows were completed: put it back"),
        (b"a\nb\nc\nd\n", "line 4 of the input changed"),
        (b"a\n", "the input lost 2 rows while they were completed: put them back"),
    ],
)
def test_an_input_that_changes_while_it_is_worked_on(changed, words, tokenizer, config, write):
    source = Source.open(write("rows.txt", b"a\nb\nc\n"))
    survey = Survey.of(read_rows(source, DEFAULTS, tokenizer, config), pytest.fail, lambda _: None)
    assert len(list(survey.unchanged(read_rows(source, DEFAULTS, tokenizer, config)))) == 3
    write("rows.txt", changed)
    with pytest.raises(JobError, match=words):
        list(survey.unchanged(read_rows(source, DEFAULTS, tokenizer, config)))


def test_rows_are_taken_only_when_there_is_room(model, tokenizer, config, write):
    """A file of any length is read beside its completion, not before."""
    taken = 0

    def rows():
        nonlocal taken
        for row in read_rows(Source.open(write("rows.txt", b"word\n" * 50)), DEFAULTS, tokenizer, config):
            taken += 1
            yield row

    progress, stopping = BatchProgress(50), threading.Event()
    results = OrderedResults(lambda _: None)
    for _ in complete_rows(model, rows(), results, BatchOptions(4, 4, False), progress, Occupancy(), stopping):
        assert taken <= progress.done + 4
    assert (taken, progress.done) == (50, 50)
