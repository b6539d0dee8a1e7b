"""The jobs of scoring texts, one per row or in chunks of one text, and the totals of a corpus."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import pydantic

from grok1.config import ModelConfig
from grok1.engine.occupancy import Occupancy
from grok1.errors import JobError, RequestError
from grok1.jobs.result_json import finite, json_line, logprob_values, top_objects
from grok1.jobs.rows import (
    BadRow,
    RawRow,
    checked_fields,
    given_id,
    json_object,
    rows_of,
    short_digest,
    text_line,
)
from grok1.jobs.run import Batching, Job
from grok1.jobs.source import Source, decode_utf8
from grok1.jobs.validate import shared_prefix
from grok1.request import TokenLogprobs
from grok1.text.prompt import Window, check_token_ids, required, window_stride, windows
from grok1.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from grok1.model import Model, TokenScores

RESULT_VERSION = 2
"""Version of the result lines; a journal with lines of another version cannot be resumed."""

_EXAMPLE = '{"text": "The answer is 42."} or {"prompt": "The answer is", "completion": " 42."}'


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """A text to score.

    Attributes:
        index: counted from 0, bad rows included.
        line: line number in the file, from 1.
        digest: hash of the line.
        id: the row's own id.
        tokens: token ids.
        first: index of the first scored token.
        windows: in which the text is read.
        error: why the row is bad; None for a good one.
    """

    index: int
    line: int
    digest: int
    id: str | int | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    first: int = 1
    windows: list[Window] = dataclasses.field(default_factory=list)
    error: str | None = None

    @property
    def sequences(self) -> int:
        """Number of windows."""
        return len(self.windows)

    @property
    def wants_logprobs(self) -> bool:
        """Always false: scoring has its own option."""
        return False


class _Fields(pydantic.BaseModel, extra="forbid", strict=True, frozen=True):
    """The fields of a row; null is the same as leaving a field out."""

    id: str | int | None = None
    text: str | None = None
    token_ids: list[int] | None = None
    prompt: str | None = None
    completion: str | None = None


def read_score_rows(
    source: Source, tokenizer: Tokenizer | None, config: ModelConfig, stride: int
) -> Iterator[ScoreRow]:
    """Reads all rows, bad ones included; see `rows_of` for which lines are rows.

    Args:
        source: the lines.
        tokenizer: the model's; None if all rows are token ids.
        config: of the model.
        stride: of the windows of texts longer than the context.

    Raises:
        JobError: if the source cannot be read.
        TokenizerError: if a row needs a tokenizer and there is none.
    """
    return rows_of(source, lambda raw: _read_row(raw, source.format, tokenizer, config, stride))


def _read_row(raw: RawRow, format: str, tokenizer: Tokenizer | None, config: ModelConfig, stride: int) -> ScoreRow:
    given: str | int | None = None
    try:
        if format == "txt":
            fields = _Fields(text=text_line(raw.content, unescape=False))
        else:
            value = json_object(raw.content, _EXAMPLE)
            given = given_id(value, "id")
            fields = checked_fields(_Fields, value)
        tokens, first = _tokens(fields, tokenizer)
        check_token_ids(tokens, config, at_least=2)
        parts = windows(len(tokens), first, config.sequence_len, stride)
        return ScoreRow(raw.index, raw.line.number, raw.digest, given, tokens, first, parts)
    except (BadRow, RequestError) as error:
        return ScoreRow(raw.index, raw.line.number, raw.digest, given, error=str(error))


def _tokens(fields: _Fields, tokenizer: Tokenizer | None) -> tuple[list[int], int]:
    """The tokens of a row, and the index of the first scored one."""
    kinds = [
        name
        for name, given in (
            ("text", fields.text is not None),
            ("token_ids", fields.token_ids is not None),
            ("prompt and completion", fields.prompt is not None or fields.completion is not None),
        )
        if given
    ]
    if len(kinds) != 1:
        raise BadRow(f"it has {' beside '.join(kinds) or 'no text'}: expected one such as {_EXAMPLE}")
    if fields.token_ids is not None:
        return fields.token_ids, 1
    if fields.text is not None:
        return required(tokenizer).encode(fields.text), 1
    if not fields.prompt or not fields.completion:
        lacking = "completion" if fields.prompt else "prompt"
        raise BadRow(f"it has no {lacking}: expected one such as {_EXAMPLE}")
    prompt = required(tokenizer).encode(fields.prompt)
    whole = required(tokenizer).encode(fields.prompt + fields.completion)
    # A token that spans the end of the prompt belongs to the completion.
    first = shared_prefix(prompt, whole)
    if not 0 < first < len(whole):
        raise BadRow("its prompt and completion are one token together: give a longer prompt")
    return whole, first


def chunk_rows(tokens: list[int], length: int, bos: int | None) -> Iterator[ScoreRow]:
    """Splits a text into chunks, to score the second half of each, as llama.cpp's perplexity does.

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
        first = length // 2 + 1
        yield ScoreRow(index, 1, digest, None, chunk, first, [Window(0, length, first)])


@dataclasses.dataclass(frozen=True)
class RowScore:
    """The score of a row.

    Attributes:
        logprobs: of each scored token.
        likeliest: the likeliest token at each position.
        num_bytes: number of UTF-8 bytes of the scored tokens; None without a tokenizer.
    """

    logprobs: list[TokenLogprobs]
    likeliest: list[int]
    num_bytes: int | None

    @property
    def total(self) -> float:
        """Sum of the log-probabilities."""
        return math.fsum(entry.logprob for entry in self.logprobs)


def result_line(row: ScoreRow, score: RowScore, per_token: bool, top_logprobs: int | None) -> str:
    """The line of a row's result."""
    scored = row.tokens[row.first :]
    told: dict[str, Any] = {
        "index": row.index,
        "id": row.id,
        "num_tokens": len(row.tokens),
        "num_scored": len(scored),
        "num_bytes": score.num_bytes,
        "total_logprob": finite(score.total),
        "perplexity": perplexity(score.total, len(scored)),
        "bits_per_byte": bits_per_byte(score.total, score.num_bytes),
        "total_squared_logprob": finite(math.fsum(entry.logprob**2 for entry in score.logprobs)),
        "greedy": score.likeliest == scored,
    }
    if per_token:
        told["token_ids"] = scored
        told["logprobs"] = logprob_values(score.logprobs)
    if top_logprobs is not None:
        told["top"] = top_objects(score.logprobs)
    return json_line(told)


def perplexity(total: float, count: int) -> float | None:
    """`exp` of the mean negative log-probability; None if it is not finite."""
    try:
        return finite(math.exp(-total / count))
    except OverflowError:
        return None


def bits_per_byte(total: float, num_bytes: int | None) -> float | None:
    """Negative log-probability in bits per byte; None if it is not finite or there are no bytes."""
    return finite(-total / math.log(2) / num_bytes) if num_bytes else None


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
        """Adds a line of results."""
        told = json.loads(line)
        if "error" not in told:
            self.rows += 1
            self.num_scored += told["num_scored"]
            if told["num_bytes"] is None:
                self.num_bytes = None
            elif self.num_bytes is not None:
                self.num_bytes += told["num_bytes"]
            self.totals.append((told["total_logprob"], told["total_squared_logprob"]))

    def _sum(self, which: int) -> float | None:
        values = [pair[which] for pair in self.totals]
        known = [value for value in values if value is not None]
        return math.fsum(known) if len(known) == len(values) else None  # rounded once, whatever the order

    @property
    def perplexity(self) -> float | None:
        """Over all tokens; None if there are none or it is not finite."""
        total = self._sum(0)
        return None if total is None or not self.num_scored else perplexity(total, self.num_scored)

    @property
    def bits_per_byte(self) -> float | None:
        """Over all tokens; None if they have no bytes, there is no tokenizer, or it is not finite."""
        total = self._sum(0)
        return None if total is None else bits_per_byte(total, self.num_bytes)

    @property
    def standard_error(self) -> float | None:
        """Of the perplexity, from the variance of the tokens' log-probabilities, as in llama.cpp."""
        total, squares, count, value = self._sum(0), self._sum(1), self.num_scored, self.perplexity
        if total is None or squares is None or value is None or count < 2:
            return None
        return value * math.sqrt(max(0.0, squares / count - (total / count) ** 2) / (count - 1))

    def line(self) -> str:
        """The last line of the output."""
        told = {
            "rows": self.rows,
            "num_scored": self.num_scored,
            "num_bytes": self.num_bytes,
            "total_logprob": self._sum(0),
            "perplexity": self.perplexity,
            "standard_error": self.standard_error,
            "bits_per_byte": self.bits_per_byte,
        }
        return json_line({"corpus": told})


@dataclasses.dataclass
class ScoringJob(Job[ScoreRow]):
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

    def rows(self) -> Iterator[ScoreRow]:
        """Reads all rows from the beginning, bad ones included."""
        return read_score_rows(self.source, self.tokenizer, self.checkpoint.config, self._window_stride)

    @property
    def _window_stride(self) -> int:
        return window_stride(self.stride, self.checkpoint.config.sequence_len)

    def options(self) -> dict[str, Any]:
        """The options that a result depends on, and the version of the result lines."""
        return self._common_options({"stride": self._window_stride})

    def _common_options(self, own: dict[str, Any]) -> dict[str, Any]:
        return {"result_version": RESULT_VERSION, **own, "per_token": self.per_token, "top": self.top}

    def requests(self, row: ScoreRow) -> Iterator[tuple[list[int], int]]:
        """The windows of a row, each with the index of its first scored token."""
        for window in row.windows:
            yield row.tokens[window.start : window.end], window.first - window.start

    def outputs(
        self, model: Model, requests: Iterator[tuple[list[int], int]], batching: Batching, occupancy: Occupancy
    ) -> Iterator[tuple[int, TokenScores]]:
        """Yields the scores of windows as they finish, each with the number of its request."""
        for scores in model.score_many(
            requests,
            top_logprobs=self.top or 0,
            batch_size=batching.batch_size,
            lanes=batching.lanes,
            occupancy=occupancy,
        ):
            yield scores.index, scores

    def result(self, row: ScoreRow, outputs: list[TokenScores]) -> tuple[str, int]:
        """The line of a row's score, and that no tokens were generated."""
        parts = sorted(outputs, key=attrgetter("index"))
        score = RowScore(
            [entry for part in parts for entry in part.logprobs],
            [token for part in parts for token in part.likeliest],
            None if self.tokenizer is None else self.tokenizer.count_bytes(row.tokens, row.first),
        )
        return result_line(row, score, self.per_token, self.top), 0

    def collect(self, line: str) -> None:
        """Adds a line to the corpus."""
        self.corpus.add(line)

    def tail(self, lines: Iterable[str]) -> str:
        """The line of the corpus."""
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

    def rows(self) -> Iterator[ScoreRow]:
        """Splits the text into chunks."""
        config, name = self.checkpoint.config, self.source.name
        if not 4 <= self.length <= config.sequence_len:
            raise JobError(f"--chunk is {self.length}, expected 4 to the model's context of {config.sequence_len}")
        tokens = required(self.tokenizer).encode(decode_utf8(self.source.content(), name))
        if len(tokens) < self.length:
            raise JobError(f"{name} has {len(tokens)} tokens, expected at least one chunk of {self.length}")
        return chunk_rows(tokens, self.length, config.bos_id if self.bos else None)

    def options(self) -> dict[str, Any]:
        """The options that a result depends on, and the version of the result lines."""
        return self._common_options({"chunk": self.length, "bos": self.bos})
