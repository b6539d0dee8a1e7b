"""Parse and validate the rows of an input file, and turn rows of prompts into requests."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar, get_origin, get_type_hints

import pydantic
from pydantic_core import PydanticCustomError, from_json

from grok1.config import ModelConfig
from grok1.errors import RequestError
from grok1.jobs.source import MAX_LINE_BYTES, Source
from grok1.request import MAX_SEED, EncodedRequest, Request, SamplingOptions
from grok1.text.prompt import encode_request
from grok1.text.tokenizer import Tokenizer

Fields = TypeVar("Fields", bound=pydantic.BaseModel)
AnyTask = TypeVar("AnyTask", bound="Task")

MAX_SAMPLES = 1024
"""Maximum number of completions of a row."""

_ESCAPE = re.compile(r"\\(.?)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


class BadRow(Exception):
    """A line is not a valid row; the message describes the fault, without the file and the line."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The work of a valid row.

    Attributes:
        tokens: token ids to read.
        requests: for `Model.complete_many` or `Model.score_many`.
        sequences: number of outputs of all requests: samples to generate, or windows to score.
        logprobs: whether log-probabilities of the most likely tokens are requested.
    """

    tokens: list[int]
    requests: Sequence[Any]
    sequences: int
    logprobs: bool


@dataclasses.dataclass(frozen=True)
class Row(Generic[AnyTask]):
    """A row of an input.

    Attributes:
        index: counted from 0, bad rows included.
        line: line number in the file, from 1.
        digest: hash of the line, to detect changes between the two readings.
        id: the row's own id.
        task: None for a bad row.
        error: why the row is bad; None for a valid one.
    """

    index: int
    line: int
    digest: int
    id: str | int | None = None
    task: AnyTask | None = None
    error: str | None = None


def read_rows(
    source: Source,
    parse: Callable[[int, str | dict[str, Any]], AnyTask],
    *,
    example: str,
    unescape: bool = False,
) -> Iterator[Row[AnyTask]]:
    """Read all rows, including bad ones. A blank line is a row in .txt and is ignored in .jsonl.

    Args:
        source: the lines.
        parse: takes a row's index and its text or JSON object; returns its task, or raises BadRow or RequestError.
        example: of a JSON object, for messages.
        unescape: whether to interpret backslash escapes in lines of .txt.

    Raises:
        JobError: if the source cannot be read.
    """
    lines = (
        (number, line)
        for number, line in enumerate(source.lines(), 1)
        if source.format == "txt" or line is None or line.strip()
    )
    for index, (number, line) in enumerate(lines):
        row: Row[AnyTask] = Row(index, number, short_digest(line or b""))
        try:
            if line is None:
                raise BadRow(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB; put each row on its own line")
            if source.format == "txt":
                value: str | dict[str, Any] = _text(line, unescape)
            else:
                value = _json_object(line, example)
                ids = (value.get("id"), value.get("custom_id"))
                row = dataclasses.replace(row, id=next((id for id in ids if type(id) in (str, int)), None))
            row = dataclasses.replace(row, task=parse(index, value))
        except (BadRow, RequestError) as error:
            row = dataclasses.replace(row, error=str(error))
        yield row


def short_digest(content: bytes) -> int:
    """Return a 64-bit hash."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class RowDefaults:
    """Options of rows that do not set their own.

    Attributes:
        sampling: sampling options; the seeds of rows are derived from its seed.
        num_samples: number of completions of each row.
        echo: whether the text of completions includes the prompt.
        truncate: whether to drop the beginning of a prompt that is too long.
        unescape: whether to interpret backslash escapes in lines of .txt.
    """

    sampling: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    num_samples: int = 1
    echo: bool = False
    truncate: bool = False
    unescape: bool = False


def row_seed(seed: int, index: int) -> int:
    """Return the seed of a row that sets none: 62 bits of the SHA-256 of the job's seed and the row's index.

    Sample i of the row has this seed plus i.
    """
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


@dataclasses.dataclass(frozen=True)
class CompletionTask(Task):
    """A prompt to complete.

    Attributes:
        request: the prompt and its options; the only one of `requests`.
        echo: whether the text of completions includes the prompt.
    """

    request: EncodedRequest
    echo: bool


def completion_task(
    index: int,
    value: str | dict[str, Any],
    defaults: RowDefaults,
    tokenizer: Tokenizer | None,
    config: ModelConfig,
) -> CompletionTask:
    """Return the task of row `index`, whose `value` is a prompt or a JSON object.

    Raises:
        BadRow: if a field is unknown, missing or invalid.
        RequestError: if an option is out of range, or the prompt is too long or has an invalid token id.
        TokenizerError: if a tokenizer is needed and there is none.
    """
    fields = _Fields(prompt=value) if isinstance(value, str) else _json_fields(value)
    request = encode_request(fields.request(index, defaults), tokenizer, config)
    logprobs = request.options.logprobs is not None
    echo = defaults.echo if fields.echo is None else fields.echo
    return CompletionTask(request.tokens, [request], request.num_samples, logprobs, request, echo)


def _text(content: bytes, unescape: bool) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise BadRow(
            f"invalid UTF-8: byte {content[error.start]:#04x} at offset {error.start} of the line; convert the "
            "file to UTF-8"
        ) from None
    return _ESCAPE.sub(_unescaped, text) if unescape else text


def _unescaped(match: re.Match[str]) -> str:
    try:
        return _ESCAPED[match[1]]
    except KeyError:
        raise BadRow(
            f"unknown escape {match[0]} at character {match.start()}, expected \\n, \\t, \\r or \\\\"
        ) from None


def _json_object(content: bytes, example: str) -> dict[str, Any]:
    try:
        value = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise BadRow(f"invalid JSON: {error}; use --format txt for plain text") from None
    if not isinstance(value, dict):
        raise BadRow(f"expected a JSON object such as {example}, not {_JSON_TYPES[type(value)]}")
    return value


_JSON_TYPES = {
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}

EXAMPLE = '{"prompt": "The answer is", "max_tokens": 8}'
"""A row of a prompt."""


def _text_or_ids(value: object) -> str | list[int] | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    raise PydanticCustomError("prompt", "expected a string or a list of token ids")


def _texts(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return tuple(value)
    raise PydanticCustomError("stop", "expected a string or a list of strings")


def _row_type(hint: Any) -> Any:
    """Return the type of a row's field for a sampling option of type `hint`."""
    return Annotated[Any, pydantic.PlainValidator(_texts)] if get_origin(hint) is tuple else hint | None


_SAMPLING_FIELDS: dict[str, Any] = {
    name: (_row_type(hint), None) for name, hint in get_type_hints(SamplingOptions).items()
}
_STRICT = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)
_SamplingFields: Any = pydantic.create_model("_SamplingFields", __config__=_STRICT, **_SAMPLING_FIELDS)


class _Fields(_SamplingFields):
    """The fields of a row: sampling options and the following; null is the same as omitting a field."""

    prompt: Annotated[Any, pydantic.PlainValidator(_text_or_ids)] = None
    prompt_token_ids: list[int] | None = None
    n: int | None = None
    echo: bool | None = None
    truncate: bool | None = None

    def request(self, index: int, defaults: RowDefaults) -> Request:
        """Return the request of row `index`.

        Raises:
            BadRow: if the row does not have exactly one prompt, or `n` or the last seed is out of range.
            RequestError: if another option is out of range.
        """
        if (self.prompt is None) == (self.prompt_token_ids is None):
            found = "no prompt" if self.prompt is None else "both prompt and prompt_token_ids"
            raise BadRow(f"the row has {found}, expected one prompt, such as {EXAMPLE}")
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if "seed" not in given and defaults.sampling.seed is not None:
            given["seed"] = row_seed(defaults.sampling.seed, index)
        samples = defaults.num_samples if self.n is None else self.n
        if not 1 <= samples <= MAX_SAMPLES:
            raise BadRow(f"n is {samples}, expected 1 to {MAX_SAMPLES}")
        options = dataclasses.replace(defaults.sampling, **given)
        if options.seed is not None and options.seed > MAX_SEED - (samples - 1):
            raise BadRow(f"seed is {options.seed}, expected at most {MAX_SEED - samples + 1} with {samples} samples")
        return Request(
            prompt=(self.prompt_token_ids or []) if self.prompt is None else self.prompt,
            options=options,
            num_samples=samples,
            truncate=defaults.truncate if self.truncate is None else self.truncate,
        )


class _Row(_Fields):
    """A row in grok1's own format."""

    id: str | int | None = None


class _OpenAIBody(_Fields):
    """A completion request of the OpenAI API; options that grok1 does not support must be off."""

    model: str | None = None
    user: str | None = None
    stream: Literal[False] | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None
    frequency_penalty: float | None = pydantic.Field(None, ge=0, le=0)
    presence_penalty: float | None = pydantic.Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = pydantic.Field(None, max_length=0)

    @pydantic.model_validator(mode="after")
    def _check_best_of(self) -> _OpenAIBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise PydanticCustomError("best_of", "best_of differs from n, which is not supported; remove it")
        return self


class _OpenAIRow(pydantic.BaseModel, extra="forbid", strict=True):
    """A line of an OpenAI batch file."""

    custom_id: str
    method: Literal["POST"] | None = None
    url: Literal["/v1/completions"] | None = None
    body: _OpenAIBody


def _json_fields(value: dict[str, Any]) -> _Fields:
    if "custom_id" in value or "body" in value:
        return checked_fields(_OpenAIRow, value).body
    return checked_fields(_Row, value)


def checked_fields(kind: type[Fields], value: dict[str, Any]) -> Fields:
    """Validate a JSON object.

    Raises:
        BadRow: if a field is unknown or its value is invalid.
    """
    try:
        return kind.model_validate(value)
    except pydantic.ValidationError as error:
        faults = list(dict.fromkeys(_fault(fault) for fault in error.errors(include_url=False)))
        more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
        raise BadRow("; ".join(faults[:_MAX_FAULTS]) + more) from None


_MAX_FAULTS = 5  # to report per row
_EXPECTED = {
    "less_than_equal": "expected 0",
    "greater_than_equal": "expected 0",
    "too_long": "expected an empty object",
    "bool_type": "expected true or false",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "string_type": "expected a string",
}
"""Replacements of messages of pydantic."""


def _fault(fault: Any) -> str:
    field = ".".join(str(part) for part in fault["loc"] if part not in ("str", "int"))
    if fault["type"] == "extra_forbidden":
        return f'unknown field "{field}"'
    if fault["type"] == "missing":
        return f"missing {field}"
    if fault["type"] == "best_of":
        return f"{field}.{fault['msg']}"
    message = _EXPECTED.get(fault["type"]) or fault["msg"].replace("Input should be", "expected").replace(
        "False", "false"
    )
    found = json.dumps(fault["input"], ensure_ascii=False)
    return f"{field} is {found if len(found) <= 60 else found[:57] + '...'}, {message[:1].lower() + message[1:]}"
