"""The job of `grok1 batch`."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from grok1.cli.file_job import FileJob
from grok1.jobs.batch import complete_rows
from grok1.jobs.results import Results
from grok1.jobs.rows import Row, RowDefaults, read_rows
from grok1.jobs.validate import Batching

if TYPE_CHECKING:
    from grok1.model import Model


class CompletionJob(FileJob[Row]):
    """Completes prompts.

    Attributes:
        defaults: what holds for rows that say nothing else; set before `check`.
        prompts: whether the results repeat the prompts.
    """

    command = "batch"
    defaults = RowDefaults()
    prompts = True

    @property
    def seed(self) -> int | None:
        """What the seeds of rows are made from; known after `check`."""
        return self.defaults.sampling.seed

    def rows(self) -> Iterator[Row]:
        """Reads all rows, from the first on."""
        return read_rows(self.source, self.defaults, self.tokenizer, self.checkpoint.config)

    def options(self) -> dict[str, Any]:
        """The options that a result depends on, and settles the seed."""
        begun = self.begun.get("seed")
        if self.seed is None:
            seed = secrets.randbelow(2**32) if begun is None else begun
            sampling = dataclasses.replace(self.defaults.sampling, seed=seed)
            self.defaults = dataclasses.replace(self.defaults, sampling=sampling)
        return {
            **dataclasses.asdict(self.defaults.sampling),
            "stop": list(self.defaults.sampling.stop),
            "num_samples": self.defaults.num_samples,
            "echo": self.defaults.echo,
            "truncate": self.defaults.truncate,
            "unescape": self.defaults.unescape,
            "no_prompt": not self.prompts,
        }

    def work(self, model: Model, rows: Iterator[Row], results: Results, batching: Batching) -> Iterator[None]:
        """Completes rows that have no result yet."""
        return complete_rows(model, rows, results, batching, self.progress, self.stopping.requested, self.prompts)
