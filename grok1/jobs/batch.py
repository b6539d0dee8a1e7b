"""Completing a file of prompts: everything is checked, then rows go through the model and come out as lines of JSON."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from grok1.errors import JobError
from grok1.jobs.results import Results
from grok1.jobs.rows import Row
from grok1.json_text import json_line, logprobs_object

if TYPE_CHECKING:
    from grok1.engine.prompt_slots import Occupancy
    from grok1.model import Completion, Model
    from grok1.prompt import Request


@dataclasses.dataclass
class Survey:
    """What a file of prompts asks for.

    Attributes:
        rows: how many there are, bad ones too.
        bad: how many are no rows.
        completions: how many are asked for.
        prompt_tokens: tokens of all prompts.
        new_tokens: of these, those that a prompt does not have in common with the beginning of the one before it.
        longest: the most tokens that a prompt and its completion can have.
        logprobs: whether a row wants log-probabilities.
        digests: of each row's line.
    """

    rows: int = 0
    bad: int = 0
    completions: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    longest: int = 0
    logprobs: bool = False
    digests: array[int] = dataclasses.field(default_factory=lambda: array("Q"))

    @classmethod
    def of(cls, rows: Iterable[Row], on_bad: Callable[[Row], None], progress: Callable[[int], None]) -> Survey:
        """Reads all rows.

        Args:
            rows: all of them.
            on_bad: is called with each that is none.
            progress: is called with the number of rows read, now and then.
        """
        survey = cls()
        before: list[int] = []
        for row in rows:
            survey.rows += 1
            survey.digests.append(row.digest)
            if survey.rows % 1000 == 0:
                progress(survey.rows)
            if row.request is None:
                survey.bad += 1
                on_bad(row)
                continue
            tokens, options = row.tokens, row.request.options
            survey.completions += row.request.num_samples
            survey.prompt_tokens += len(tokens)
            survey.new_tokens += len(tokens) - _common(before, tokens)
            survey.longest = max(survey.longest, len(tokens) + options.max_tokens)
            survey.logprobs |= options.logprobs is not None
            before = tokens
        return survey

    def unchanged(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows, read again.

        Raises:
            JobError: if one is another than it was.
        """
        count = 0
        for row in rows:
            if row.index >= self.rows or row.digest != self.digests[row.index]:
                raise JobError(f"line {row.line} of the input changed while its rows were completed: put it back")
            count += 1
            yield row
        if count != self.rows:
            raise JobError(f"the input lost {self.rows - count} rows while they were completed: put them back")

    @property
    def mean_new_tokens(self) -> float:
        """Mean of the tokens of a prompt that have to be read for it alone, about."""
        return self.new_tokens / max(1, self.rows - self.bad)


def _common(before: list[int], tokens: list[int]) -> int:
    length = min(len(before), len(tokens))
    return next((i for i in range(length) if before[i] != tokens[i]), length)


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """How a job runs.

    Attributes:
        batch_size: completions that go on at a time.
        lanes: parts of prompts that a step reads, see `grok1.engine.generate.generate`.
        logprobs: whether log-probabilities are computed for all rows.
        prompts: whether the results repeat the prompts.
    """

    batch_size: int
    lanes: int
    logprobs: bool
    prompts: bool = True


@dataclasses.dataclass
class BatchProgress:
    """How far a job is.

    Attributes:
        total: rows.
        done: rows that have a result, failed ones too.
        failed: rows whose result is an error.
        prompt_tokens: tokens of the prompts that this run has finished.
        completion_tokens: tokens that this run's finished completions have.
    """

    total: int
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def complete_rows(
    model: Model,
    rows: Iterable[Row],
    results: Results,
    options: BatchOptions,
    progress: BatchProgress,
    occupancy: Occupancy,
    stopping: threading.Event,
) -> Iterator[None]:
    """Completes rows that have no result yet.

    Args:
        model: what completes them.
        rows: taken one by one, when there is room for one.
        results: where they go.
        options: how.
        progress: is kept up to date; `done` counts the rows that `results` had before, too.
        occupancy: is kept up to date.
        stopping: once it is set no more rows are taken; what has begun is finished.

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
                progress.failed += 1
                continue
            if stopping.is_set():
                return
            unfinished[next(taken)] = row, []
            yield dataclasses.replace(row.request, prompt=row.tokens)

    completions = model.complete_many(
        requests(),
        batch_size=options.batch_size,
        lanes=options.lanes,
        logprobs=options.logprobs,
        occupancy=occupancy,
    )
    for completion in completions:
        row, done = unfinished[completion.request_index]
        done.append(completion)
        assert row.request is not None
        if len(done) == row.request.num_samples:
            del unfinished[completion.request_index]
            done.sort(key=lambda completion: completion.sample)
            before = _prompt_text(row, model) if row.echo else ""
            results.add(row.index, result_line(row, done, before, options.prompts))
            progress.done += 1
            progress.prompt_tokens += len(row.tokens)
            progress.completion_tokens += sum(len(completion.tokens) for completion in done)
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
        told["logprobs"] = [
            {"token_id": token} | logprobs_object(entry)
            for token, entry in zip(completion.tokens, completion.logprobs, strict=True)
        ]
    return told


def error_line(row: Row) -> str:
    """The line of the output for a bad row."""
    return json_line({"index": row.index, "id": row.id, "line": row.line, "error": row.error})
