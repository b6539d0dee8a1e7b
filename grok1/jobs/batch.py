"""Completing a file of prompts: everything is checked, then rows go through the model and come out as lines of JSON."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from grok1.jobs.result_json import json_line, logprobs_objects
from grok1.jobs.results import Results, error_line
from grok1.jobs.rows import Row
from grok1.jobs.validate import Batching, JobProgress

if TYPE_CHECKING:
    from grok1.model import Completion, Model
    from grok1.text.prompt import Request


def complete_rows(
    model: Model,
    rows: Iterable[Row],
    results: Results,
    batching: Batching,
    progress: JobProgress,
    stopping: threading.Event,
    prompts: bool = True,
) -> Iterator[None]:
    """Completes rows that have no result yet.

    Args:
        model: what completes them.
        rows: taken one by one, when there is room for one.
        results: where they go.
        batching: how many at a time.
        progress: is kept up to date; `done` counts the rows that `results` had before, too.
        stopping: once it is set no more rows are taken; what has begun is finished.
        prompts: whether the results repeat the prompts.

    Yields:
        after each row.
    """
    unfinished: dict[int, tuple[Row, list[Completion]]] = {}
    taken = itertools.count()

    def requests() -> Iterator[Request]:
        for row in rows:
            if row.index in results:
                continue
            if row.request is None:
                results.add(row.index, error_line(row))
                progress.done += 1
                continue
            if stopping.is_set():
                return
            unfinished[next(taken)] = row, []
            yield dataclasses.replace(row.request, prompt=row.tokens)

    completions = model.complete_many(
        requests(),
        batch_size=batching.batch_size,
        lanes=batching.lanes,
        logprobs=batching.logprobs,
        occupancy=progress.occupancy,
    )
    for completion in completions:
        row, done = unfinished[completion.request_index]
        done.append(completion)
        assert row.request is not None
        if len(done) == row.request.num_samples:
            del unfinished[completion.request_index]
            done.sort(key=lambda completion: completion.sample)
            before = _prompt_text(row, model) if row.echo else ""
            results.add(row.index, result_line(row, done, before, prompts))
            progress.done += 1
            progress.tokens_in += len(row.tokens)
            progress.tokens_out += sum(len(completion.tokens) for completion in done)
            yield


def _prompt_text(row: Row, model: Model) -> str:
    assert row.request is not None
    prompt = row.request.prompt
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)


def result_line(row: Row, completions: Sequence[Completion], before: str, prompts: bool) -> str:
    """A row's line of the output; nothing in it differs from one run to the next.

    Args:
        row: the row.
        completions: of all its samples, in their order.
        before: what each text begins with.
        prompts: whether the prompt is in it.
    """
    assert row.request is not None
    told: dict[str, Any] = {"index": row.index, "id": row.id}
    if prompts:
        key = "prompt" if isinstance(row.request.prompt, str) else "prompt_token_ids"
        told[key] = row.request.prompt
    told["completions"] = [_completion_object(completion, before) for completion in completions]
    told["prompt_tokens"] = len(row.tokens)
    told["completion_tokens"] = sum(len(completion.tokens) for completion in completions)
    return json_line(told)


def _completion_object(completion: Completion, before: str) -> dict[str, Any]:
    told: dict[str, Any] = {
        "text": before + completion.text,
        "token_ids": completion.tokens,
        "finish_reason": completion.finish_reason,
        "stop_text": completion.stop_text,
        "seed": completion.seed,
    }
    if completion.logprobs is not None:
        told["logprobs"] = logprobs_objects(completion.tokens, completion.logprobs)
    return told
