"""The runner of jobs, with a model and a reporter of the test's own."""

import contextlib
import dataclasses
import importlib.metadata
import json
import threading
from types import SimpleNamespace

import pytest
from configs import TEXT

from grok1.checkpoint.audit.fingerprint import fingerprint
from grok1.checkpoint.reader import Checkpoint
from grok1.checkpoint.writer import write_checkpoint
from grok1.config import VERSION
from grok1.errors import JobError
from grok1.jobs.batch import CompletionJob
from grok1.jobs.journal import Journal
from grok1.jobs.rows import RowDefaults
from grok1.jobs.run import JobRunner, JobStopped
from grok1.jobs.score import ScoringJob
from grok1.jobs.source import Source
from grok1.request import SamplingOptions, TokenLogprobs

CONFIG = dataclasses.replace(TEXT, sequence_len=16)


class Log:
    """A reporter that keeps what is reported."""

    def __init__(self):
        self.messages = []
        self.results = []

    def status(self, text):
        self.messages.append(("status", text))

    def note(self, text):
        self.messages.append(("note", text))

    def bad_row(self, text):
        self.messages.append(("bad", text))

    def result(self, line):
        self.results += [json.loads(line)] if line else []

    @contextlib.contextmanager
    def processing(self, describe):
        yield
        self.messages.append(("progress", describe()))


class EchoModel:
    """Generates as many tokens as its samples have numbers, and finishes the last request first."""

    mesh_shape = (1, 1)
    kernels = "xla"
    max_sequences = None
    engine = SimpleNamespace(
        data_rows=1,
        dtype=SimpleNamespace(name="float32"),
        mesh=SimpleNamespace(devices=SimpleNamespace(flat=[SimpleNamespace(device_kind="cpu")])),
        lanes_for=lambda mean_new_tokens: 2,
    )

    def __init__(self, after_first=lambda: None):
        self.after_first = after_first

    def best_batch_size(self):
        return 4

    def complete_many(self, requests, batch_size, **batching):
        for index, request in enumerate(requests):
            for sample in reversed(range(request.num_samples)):
                yield SimpleNamespace(
                    request_index=index,
                    sample=sample,
                    tokens=[*request.prompt, sample],
                    text=f" {sample}",
                    finish_reason="max_tokens",
                    stop_text=None,
                    seed=request.options.seed + sample,
                    logprobs=None,
                )
            self.after_first()

    def score_many(self, texts, **batching):
        scores = [
            SimpleNamespace(
                request_index=index,
                logprobs=[TokenLogprobs(-float(token)) for token in tokens[first:]],
                likeliest=tokens[first:],
            )
            for index, (tokens, first) in enumerate(texts)
        ]
        yield from reversed(scores)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    write_checkpoint(folder, CONFIG)
    return Checkpoint.open(folder)


@pytest.fixture
def completion_job(write, checkpoint):
    rows = [{"prompt": [5, 6], "n": 2}, {"prompt": 7}, {"prompt": [8]}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    source = Source.open(write("rows.jsonl", content.encode()))
    return CompletionJob(source, checkpoint, None, RowDefaults(SamplingOptions(seed=3)))


def run(job, reporter, model, journal=None, stop=None, **options):
    runner = JobRunner(job, journal, reporter, lambda mesh, dtype: model, stop or threading.Event(), **options)
    return runner.run(skip_bad=True)


def test_rows_are_reported_in_order(completion_job):
    log = Log()
    outcome = run(completion_job, log, EchoModel())
    first, bad, last = log.results
    assert [sample["text"] for sample in first["completions"]] == [" 0", " 1"]
    assert first["completions"][1]["seed"] == first["completions"][0]["seed"] + 1
    assert (bad["index"], bad["line"]) == (1, 2)
    assert (last["index"], last["completion_tokens"]) == (2, 2)
    assert (outcome["rows"], outcome["failed"]) == (3, 1)
    assert (outcome["tokens_in"], outcome["tokens_out"]) == (3, 8)
    kinds = [kind for kind, _ in log.messages]
    assert kinds == ["status", "bad", "progress"]
    assert log.messages[-1][1].startswith("3 of 3 rows · 1 failed · ")


def test_windows_of_a_row_are_joined_in_order(write, checkpoint):
    rows = [{"token_ids": list(range(3, 43))}, {"token_ids": [5, 6]}]
    source = Source.open(write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()))
    log = Log()
    run(ScoringJob(source, checkpoint, None, per_token=True), log, EchoModel())
    first, second, last = log.results
    assert first["logprobs"] == [-float(token) for token in range(4, 43)]
    assert second["logprobs"] == [-6.0]
    assert last["corpus"]["total_logprob"] == sum(first["logprobs"]) - 6


def test_a_stopped_job_resumes(completion_job, tmp_path):
    output, log, stop = tmp_path / "out.jsonl", Log(), threading.Event()
    with Journal.open(output, restart=False) as journal, pytest.raises(JobStopped):
        run(completion_job, log, EchoModel(stop.set), journal, stop)
    assert ("note", "2 of 3 rows are done; run the same command to resume") in log.messages
    assert not output.exists()
    with Journal.open(output, restart=False) as journal:
        outcome = run(completion_job, log, EchoModel(), journal)
    assert (outcome["resumed_rows"], outcome["tokens_in"]) == (2, 1)
    whole = Log()
    run(completion_job, whole, EchoModel())
    assert [json.loads(line) for line in output.read_text().splitlines()] == whole.results
    assert log.results == []


def test_a_journal_of_version_0_1_is_resumed_unless_it_differs(completion_job, checkpoint, tmp_path):
    """The first line as 0.1.0 has written it from the start."""
    list(completion_job.rows())
    header = {
        "command": "batch",
        "input": completion_job.source.sha256,
        "checkpoint": fingerprint(checkpoint),
        "tokenizer": None,
        "grok1": VERSION,
        "jax": importlib.metadata.version("jax"),
        "format": "jsonl",
        "max_tokens": 128,
        "temperature": 0.7,
        "top_p": 0.95,
        "top_k": 0,
        "min_p": 0.0,
        "seed": 3,
        "stop": [],
        "ignore_eos": False,
        "logprobs": None,
        "num_samples": 1,
        "echo": False,
        "truncate": False,
        "unescape": False,
        "no_prompt": False,
        "mesh": [1, 1],
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 3,
        "lanes": 2,
    }
    output = tmp_path / "out.jsonl"
    with Journal.open(output, restart=False) as journal:
        journal.begin(header)
        journal.add(0, '{"index": 0, "kept": true}\n')
    with (
        Journal.open(output, restart=False) as journal,
        pytest.raises(JobError, match="--batch-size was 3 and is now 4"),
    ):
        run(completion_job, Log(), EchoModel(), journal, batch_size=4)
    with Journal.open(output, restart=False) as journal:
        assert run(completion_job, Log(), EchoModel(), journal)["resumed_rows"] == 1
    assert json.loads(output.read_text().splitlines()[0]) == {"index": 0, "kept": True}
