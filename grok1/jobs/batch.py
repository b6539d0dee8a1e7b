"""The job of completing a file of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from grok1.engine.occupancy import Occupancy
from grok1.jobs.result_json import completion_object, json_line
from grok1.jobs.rows import Row, RowDefaults, read_rows
from grok1.jobs.run import Batching, Job
from grok1.request import EncodedRequest
from grok1.text.prompt import required

if TYPE_CHECKING:
    from grok1.model import Completion, Model


@dataclasses.dataclass
class CompletionJob(Job[Row]):
    """Completes prompts, one per row.

    Attributes:
        defaults: options for rows that do not have their own; the seed is not None.
        prompts: whether results repeat the prompts.
    """

    command = "batch"
    defaults: RowDefaults
    prompts: bool = True

    def rows(self) -> Iterator[Row]:
        """Reads all rows from the beginning, bad ones included."""
        return read_rows(self.source, self.defaults, self.tokenizer, self.checkpoint.config)

    def options(self) -> dict[str, Any]:
        """The options that a result depends on, by name."""
        return {
            **dataclasses.asdict(self.defaults.sampling),
            "stop": list(self.defaults.sampling.stop),
            "num_samples": self.defaults.num_samples,
            "echo": self.defaults.echo,
            "truncate": self.defaults.truncate,
            "unescape": self.defaults.unescape,
            "no_prompt": not self.prompts,
        }

    def requests(self, row: Row) -> list[EncodedRequest]:
        """The request of a row."""
        assert row.request is not None
        return [row.request]

    def outputs(
        self, model: Model, requests: Iterator[EncodedRequest], batching: Batching, occupancy: Occupancy
    ) -> Iterator[tuple[int, Completion]]:
        """Yields completions as they finish, each with the number of its request."""
        for completion in model.complete_many(
            requests,
            batch_size=batching.batch_size,
            lanes=batching.lanes,
            logprobs=batching.logprobs,
            occupancy=occupancy,
        ):
            yield completion.request_index, completion

    def result(self, row: Row, outputs: list[Completion]) -> tuple[str, int]:
        """The line of a row's completions, and the number of generated tokens."""
        assert row.request is not None
        prompt = row.request.prompt
        echo = ""
        if row.echo:
            echo = prompt if isinstance(prompt, str) else required(self.tokenizer).decode(prompt)
        generated = sum(len(completion.tokens) for completion in outputs)
        told: dict[str, Any] = {"index": row.index, "id": row.id}
        if self.prompts:
            told["prompt" if isinstance(prompt, str) else "prompt_token_ids"] = prompt
        samples = sorted(outputs, key=attrgetter("sample"))
        told["completions"] = [completion_object(completion, echo=echo) for completion in samples]
        told["prompt_tokens"] = len(row.tokens)
        told["completion_tokens"] = generated
        return json_line(told), generated
