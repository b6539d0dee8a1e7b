"""The jobs of `grok1 score` over files: rows of texts, and one text in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from grok1.cli.file_job import FileJob
from grok1.cli.text_input import decoded
from grok1.errors import JobError
from grok1.jobs.results import Results
from grok1.jobs.score import RESULT_VERSION, Corpus, ScoreRow, chunk_rows, read_score_rows, score_rows
from grok1.jobs.validate import Batching
from grok1.text.prompt import required, window_stride

if TYPE_CHECKING:
    from grok1.model import Model


class ScoreJob(FileJob[ScoreRow]):
    """Scores texts, a row each.

    Attributes:
        stride: of the windows of long texts; None for half of the context. Set before `check`, as the others are.
        per_token: whether the results tell of every token.
        top: how many of the likeliest tokens they tell.
        corpus: what the rows come to together, when all have been written.
    """

    command = "score"
    stride: int | None = None
    per_token = False
    top: int | None = None

    def __init__(self, *arguments: Any):
        """As the base class."""
        super().__init__(*arguments)
        self.corpus = Corpus()

    @property
    def _window_stride(self) -> int:
        return window_stride(self.stride, self.checkpoint.config.sequence_len)

    def rows(self) -> Iterator[ScoreRow]:
        """Reads all rows, from the first on."""
        return read_score_rows(self.source, self.tokenizer, self.checkpoint.config, self._window_stride)

    def options(self) -> dict[str, Any]:
        """The options that a result depends on, and the version of the result lines."""
        return {
            "result_version": RESULT_VERSION,
            "stride": self._window_stride,
            "per_token": self.per_token,
            "top": self.top,
        }

    def work(self, model: Model, rows: Iterator[ScoreRow], results: Results, batching: Batching) -> Iterator[None]:
        """Scores rows that have no result yet."""
        stopping = self.stopping.requested
        return score_rows(
            model, self.tokenizer, rows, results, batching, self.progress, stopping, self.per_token, self.top
        )

    def write_line(self, line: str) -> None:
        """Writes a row's line to stdout."""
        self.corpus.add(line)
        super().write_line(line)

    def tail(self) -> str:
        """The line of the corpus."""
        for line in self.journal.lines() if self.journal is not None else ():
            self.corpus.add(line)
        return self.corpus.line()


class ChunkJob(ScoreJob):
    """Scores one text in chunks.

    Attributes:
        length: tokens of a chunk.
        bos: whether BOS takes the place of each chunk's first token.
        as_json: whether stdout gets JSON rather than the running perplexity.
    """

    command = "score --chunk"
    length = 512
    bos = False
    as_json = False

    def rows(self) -> Iterator[ScoreRow]:
        """Cuts the text into chunks."""
        config = self.checkpoint.config
        if not 4 <= self.length <= config.sequence_len:
            raise JobError(f"--chunk is {self.length}, expected 4 to the model's context of {config.sequence_len}")
        self.terminal.show_status("reading the text")
        text = decoded(self.source.content(), self.source.name)
        tokens = required(self.tokenizer).encode(text)
        if len(tokens) < self.length:
            raise JobError(f"{self.source.name} has {len(tokens)} tokens, expected at least one chunk of {self.length}")
        return chunk_rows(tokens, self.length, config.bos_id if self.bos else None)

    def options(self) -> dict[str, Any]:
        """The options that a result depends on, and the version of the result lines."""
        return {
            "result_version": RESULT_VERSION,
            "chunk": self.length,
            "bos": self.bos,
            "per_token": self.per_token,
            "top": self.top,
        }

    def write_line(self, line: str) -> None:
        """Writes a row's line to stdout, or what it means for the perplexity so far."""
        if self.as_json:
            super().write_line(line)
        else:
            self.corpus.add(line)
            value = self.corpus.perplexity
            self.terminal.write(f"[{self.corpus.rows}]{'inf' if value is None else f'{value:.4f}'},")

    def tail(self) -> str:
        """The line of the corpus, or the perplexity and bits per byte of all chunks."""
        if self.as_json or self.journal is not None:
            return super().tail()
        corpus = self.corpus
        value, error = corpus.perplexity, corpus.standard_error
        told = "infinite" if value is None else f"{value:.4f}" + ("" if error is None else f" +/- {error:.5f}")
        if corpus.bits_per_byte is not None:
            told += f", bits per byte {corpus.bits_per_byte:.4f}"
        return f"\nperplexity {told}, {corpus.num_scored} tokens of {corpus.rows} chunks\n"
