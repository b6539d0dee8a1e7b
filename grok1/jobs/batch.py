"""The job of completing a file of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from grok1.jobs.result_json import completion_object
from grok1.jobs.rows import EXAMPLE, CompletionTask, Row, RowDefaults, completion_task, read_rows
from grok1.jobs.run import Job
from grok1.request import Request
from grok1.text.prompt import required

if TYPE_CHECKING:
    from grok1.model import Completion, Model


@dataclasses.dataclass
class CompletionJob(Job[CompletionTask]):
    """Completes prompts, one per row.

    Attributes:
        defaults: options for rows that do not have their own; the seed is not None.
        prompts: whether results repeat the prompts.
    """

    command = "batch"
    defaults: RowDefaults
    prompts: bool = True

    def rows(self) -> Iterator[Row[CompletionTask]]:
        """Read all rows from the beginning, bad ones included."""
        config = self.checkpoint.config
        parse = partial(completion_task, defaults=self.defaults, tokenizer=self.tokenizer, config=config)
        return read_rows(self.source, parse, example=EXAMPLE, unescape=self.defaults.unescape)

    def options(self) -> dict[str, Any]:
        """Return the options that a result depends on, by name."""
        options = dataclasses.asdict(self.defaults)
        return {**options.pop("sampling"), **options, "no_prompt": not self.prompts}

    def outputs(
        self, model: Model, requests: Iterator[Request], *, logprobs: bool, **batching: Any
    ) -> Iterator[Completion]:
        """Yield completions as they finish."""
        return model.complete_many(requests, logprobs=logprobs, **batching)

    def result(self, task: CompletionTask, outputs: list[Completion]) -> dict[str, Any]:
        """Return the completions of a row as JSON."""
        prompt, echo = task.request.prompt, ""
        if task.echo:
            echo = prompt if isinstance(prompt, str) else required(self.tokenizer).decode(prompt)
        samples = sorted(outputs, key=attrgetter("sample"))
        return {
            **({"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt} if self.prompts else {}),
            "completions": [completion_object(completion, echo=echo) for completion in samples],
            "prompt_tokens": len(task.tokens),
            "completion_tokens": sum(len(completion.tokens) for completion in samples),
        }
