"""The jobs of scoring texts, one per row or in chunks of one text, and the totals of a corpus."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import pydantic

from grok1.errors import JobError
from grok1.jobs.result_json import finite, json_line, row_score_object
from grok1.jobs.rows import BadRow, Row, Task, checked_fields, read_rows, short_digest
from grok1.jobs.run import Job
from grok1.jobs.source import decode_utf8
from grok1.jobs.validate import shared_prefix
from grok1.request import bits_per_byte, perplexity
from grok1.text.prompt import check_token_ids, required, window_stride, windows
from grok1.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from grok1.model import Model, TokenScores

RESULT_VERSION = 2
"""Version of the result lines; a journal with lines of another version cannot be resumed."""

_EXAMPLE = '{"text": "The answer is 42."} or {"prompt": "The answer is", "completion": " 42."}'


class _Fields(pydantic.BaseModel, extra="forbid", strict=True, frozen=True):
    """The fields of a row; null is the same as leaving a field out."""

    id: str | int | None = None
    text: str | None = None
    token_ids: list[int] | None = None
    prompt: str | None = None
    completion: str | None = None


def _encode(fields: _Fields, tokenizer: Tokenizer | None) -> tuple[list[int], int]:
    """Return the tokens of a row, and the index of the first scored one."""
    kinds = {
        "text": fields.text is not None,
        "token_ids": fields.token_ids is not None,
        "prompt and completion": fields.prompt is not None or fields.completion is not None,
    }
    if sum(kinds.values()) != 1:
        found = " and ".join(kind for kind, given in kinds.items() if given) or "no text"
        raise BadRow(f"the row has {found}, expected {_EXAMPLE}")
    if fields.token_ids is not None:
        return fields.token_ids, 1
    if fields.text is not None:
        return required(tokenizer).encode(fields.text), 1
    if not fields.prompt or not fields.completion:
        lacking = "completion" if fields.prompt else "prompt"
        raise BadRow(f"the row has no {lacking}, expected {_EXAMPLE}")
    prompt = required(tokenizer).encode(fields.prompt)
    whole = required(tokenizer).encode(fields.prompt + fields.completion)
    # A token that spans the end of the prompt belongs to the completion.
    first = shared_prefix(prompt, whole)
    if not 0 < first < len(whole):
        raise BadRow("prompt and completion are encoded as a single token; use a longer prompt")
    return whole, first


def chunk_rows(tokens: list[int], length: int, bos: int | None) -> Iterator[Row[Task]]:
    """Split a text into chunks, to score the second half of each, as llama.cpp's perplexity does.

    An incomplete chunk at the end is ignored.

    Args:
        tokens: the text.
        length: number of tokens of a chunk, at least 4.
        bos: a token to replace the first of each chunk; None replaces none.
    """
    for index in range(len(tokens) // length):
        chunk = tokens[index * length : (index + 1) * length]
        digest = short_digest(repr(chunk).encode())
        if bos is not None:
            chunk[0] = bos
        yield Row(index, 1, digest, task=Task(chunk, [(chunk, length // 2 + 1)], sequences=1, logprobs=False))


@dataclasses.dataclass
class Corpus:
    """Totals over all rows.

    Attributes:
        rows: number of scored rows.
        num_scored: number of scored tokens.
        num_bytes: number of UTF-8 bytes of these tokens; None without a tokenizer.
        totals: of each row, the sums of the log-probabilities and of their squares; None if not finite.
    """

    rows: int = 0
    num_scored: int = 0
    num_bytes: int | None = 0
    totals: list[tuple[float | None, float | None]] = dataclasses.field(default_factory=list)

    def add(self, line: str) -> None:
        """Add a line of results."""
        result = json.loads(line)
        if "error" not in result:
            self.rows += 1
            self.num_scored += result["num_scored"]
            if result["num_bytes"] is None:
                self.num_bytes = None
            elif self.num_bytes is not None:
                self.num_bytes += result["num_bytes"]
            self.totals.append((result["total_logprob"], result["total_squared_logprob"]))

    def _sum(self, which: int) -> float | None:
        values = [pair[which] for pair in self.totals]
        known = [value for value in values if value is not None]
        return math.fsum(known) if len(known) == len(values) else None  # rounded once, independent of the order

    @property
    def perplexity(self) -> float | None:
        """Over all tokens; None if there are none or it is not finite."""
        total = self._sum(0)
        return None if total is None or not self.num_scored else finite(perplexity(total, self.num_scored))

    @property
    def bits_per_byte(self) -> float | None:
        """Over all tokens; None without a tokenizer, for empty text, or if it is not finite."""
        total = self._sum(0)
        return None if total is None else finite(bits_per_byte(total, self.num_bytes))

    @property
    def standard_error(self) -> float | None:
        """Of the perplexity, from the variance of the tokens' log-probabilities, as in llama.cpp."""
        total, squares, count, value = self._sum(0), self._sum(1), self.num_scored, self.perplexity
        if total is None or squares is None or value is None or count < 2:
            return None
        return value * math.sqrt(max(0.0, squares / count - (total / count) ** 2) / (count - 1))

    def line(self) -> str:
        """Return the last line of the output."""
        totals = {
            "rows": self.rows,
            "num_scored": self.num_scored,
            "num_bytes": self.num_bytes,
            "total_logprob": self._sum(0),
            "perplexity": self.perplexity,
            "standard_error": self.standard_error,
            "bits_per_byte": self.bits_per_byte,
        }
        return json_line({"corpus": totals})


@dataclasses.dataclass
class ScoringJob(Job[Task]):
    """Scores texts, one per row.

    Attributes:
        stride: of the windows of texts longer than the context; None for half of the context.
        per_token: whether results include every token.
        top: number of likeliest tokens to report at each position; None reports none.
        corpus: totals of all rows, complete when the job has ended.
    """

    command = "score"
    stride: int | None = None
    per_token: bool = False
    top: int | None = None
    corpus: Corpus = dataclasses.field(default_factory=Corpus, init=False)

    def rows(self) -> Iterator[Row[Task]]:
        """Read all rows from the beginning, bad ones included."""
        config = self.checkpoint.config
        stride = window_stride(self.stride, config.sequence_len)

        def parse(index: int, value: str | dict[str, Any]) -> Task:
            fields = _Fields(text=value) if isinstance(value, str) else checked_fields(_Fields, value)
            tokens, first = _encode(fields, self.tokenizer)
            check_token_ids(tokens, config, at_least=2)
            requests = windows(tokens, first, config.sequence_len, stride)
            return Task(tokens, requests, len(requests), logprobs=False)

        return read_rows(self.source, parse, example=_EXAMPLE)

    def options(self) -> dict[str, Any]:
        """Return the options that a result depends on, and the version of the result lines."""
        return {
            "result_version": RESULT_VERSION,
            "stride": window_stride(self.stride, self.checkpoint.config.sequence_len),
            "per_token": self.per_token,
            "top": self.top,
        }

    def outputs(
        self, model: Model, requests: Iterator[tuple[list[int], int]], *, logprobs: bool, **batching: Any
    ) -> Iterator[TokenScores]:
        """Yield the scores of windows as they finish."""
        return model.score_many(requests, top_logprobs=self.top or 0, **batching)

    def result(self, task: Task, outputs: list[TokenScores]) -> dict[str, Any]:
        """Return the score of a row as JSON."""
        from grok1.model import Score

        outputs = sorted(outputs, key=attrgetter("request_index"))
        likeliest = [token for output in outputs for token in output.likeliest]
        score = Score.of_windows(task.tokens, outputs, self.tokenizer)
        return row_score_object(score, likeliest, per_token=self.per_token, top=self.top is not None)

    def collect(self, line: str) -> None:
        """Add a line to the corpus."""
        self.corpus.add(line)

    def tail(self, lines: Iterable[str]) -> str:
        """Return the line of the corpus."""
        for line in lines:
            self.corpus.add(line)
        return self.corpus.line()


@dataclasses.dataclass
class ChunkJob(ScoringJob):
    """Scores one text in chunks.

    Attributes:
        length: number of tokens of a chunk.
        bos: whether BOS replaces the first token of each chunk.
    """

    command = "score --chunk"
    length: int = 512
    bos: bool = False

    def rows(self) -> Iterator[Row[Task]]:
        """Split the text into chunks."""
        config, name = self.checkpoint.config, self.source.name
        if not 4 <= self.length <= config.sequence_len:
            raise JobError(f"--chunk is {self.length}, expected 4 to {config.sequence_len} (the model's context)")
        tokens = required(self.tokenizer).encode(decode_utf8(self.source.content(), name))
        if len(tokens) < self.length:
            raise JobError(
                f"{name} has {len(tokens)} tokens, expected at least {self.length} (--chunk); use a smaller --chunk"
            )
        return chunk_rows(tokens, self.length, config.bos_id if self.bos else None)

    def options(self) -> dict[str, Any]:
        """Return the options that a result depends on, and the version of the result lines."""
        options = super().options() | {"chunk": self.length, "bos": self.bos}
        del options["stride"]  # it has no effect on chunks
        return options
