"""Requests to complete a prompt, their sampling options, and log-probabilities."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal, Required, TypedDict, Unpack

from grok1.errors import RequestError, json_value

FinishReason = Literal["eos", "stop", "max_tokens", "context"]
"""Why a completion ended: end-of-text token, stop text, `max_tokens`, or a full context."""

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1


class _OptionMetadata(TypedDict, total=False):
    """Properties of a sampling option besides its type and default."""

    help: Required[str]  # for the command line
    names: tuple[str, ...]  # on the command line; by default the field's name with dashes
    metavar: str
    show_default: str  # description of the default in help, if it is not the value
    valid: Callable[[Any], bool]  # whether a value is in range; by default every value is
    expected: str  # the range, for messages
    dtype: str  # of its array on the device, if it is applied there; see `grok1.engine.sampling`
    neutral: float  # the value that has no effect


def sampling_option(default: Any, **metadata: Unpack[_OptionMetadata]) -> Any:
    """Define a field of `SamplingOptions`, from which the command-line option and the field of rows are derived."""
    return dataclasses.field(default=default, metadata=dict(metadata))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options for completing a prompt, described by the `help` of each field.

    Logits are divided by the temperature; then top-k, top-p and min-p are applied, in this order. If `seed` is None, a
    random seed is used. Sample i of several uses `seed + i`. Log-probabilities are reported unless `logprobs` is None.

    Raises:
        RequestError: on construction, if a value is out of range.
    """

    max_tokens: int = sampling_option(
        128,
        names=("-n", "--max-tokens"),
        metavar="N",
        help="Maximum number of tokens to generate.",
        valid=lambda value: value >= 1,
        expected="at least 1",
    )
    temperature: float = sampling_option(
        0.7,
        names=("-t", "--temperature", "--temp"),
        metavar="T",
        help="Sampling temperature. 0 always chooses the most likely token, 1 samples from the model's own "
        "distribution, and higher values give more varied text.",
        valid=lambda value: 0 <= value < math.inf,
        expected="a finite number, 0 or more",
        dtype="float32",
        neutral=0,
    )
    top_k: int = sampling_option(
        0,
        metavar="K",
        help="Sample only from the K most likely tokens; 0 turns this off.",
        valid=lambda value: 0 <= value < 2**31,
        expected=f"0 to {2**31 - 1}",
        dtype="int32",
        neutral=0,
    )
    top_p: float = sampling_option(
        0.95,
        metavar="P",
        help="Sample only from the smallest set of most likely tokens whose total probability is at least P, with "
        "0 < P <= 1; 1 turns this off.",
        valid=lambda value: 0 < value <= 1,
        expected="a number above 0 and at most 1",
        dtype="float32",
        neutral=1,
    )
    min_p: float = sampling_option(
        0.0,
        metavar="P",
        help="Sample only from tokens at least P times as likely as the most likely one, with 0 <= P <= 1; 0 turns "
        "this off.",
        valid=lambda value: 0 <= value <= 1,
        expected="0 to 1",
        dtype="float32",
        neutral=0,
    )
    seed: int | None = sampling_option(
        None,
        metavar="N",
        show_default="random, and reported",
        help="Random seed. The same seed gives the same completion.",
        valid=lambda value: value is None or 0 <= value <= MAX_SEED,
        expected=f"0 to {MAX_SEED}",
    )
    stop: tuple[str, ...] = sampling_option(
        (),
        metavar="TEXT",
        help="End the completion before TEXT. May be given several times.",
        valid=all,
        expected="non-empty texts",
    )
    ignore_eos: bool = sampling_option(False, help="Continue after the end-of-text token.")
    logprobs: int | None = sampling_option(
        None,
        metavar="K",
        help="Add to the JSON output the log-probabilities of each token and of the K most likely tokens at its "
        f"position, 0 to {MAX_LOGPROBS}.",
        valid=lambda value: value is None or 0 <= value <= MAX_LOGPROBS,
        expected=f"0 to {MAX_LOGPROBS}",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for field in dataclasses.fields(self):
            value, valid = getattr(self, field.name), field.metadata.get("valid")
            if valid is not None and not valid(value):
                raise RequestError(f"{field.name} is {json_value(value)}, expected {field.metadata['expected']}")


def fresh_seed() -> int:
    """Return a random 32-bit seed."""
    return secrets.randbelow(2**32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to complete.

    Attributes:
        prompt: text or token ids.
        options: the sampling options.
        num_samples: number of completions; sample i uses the seed `seed + i`.
        truncate: whether to drop the beginning of a prompt that is too long, instead of raising an error.

    Raises:
        RequestError: on construction, if `num_samples` is less than 1.
    """

    prompt: str | Sequence[int]
    options: SamplingOptions = SamplingOptions()
    num_samples: int = 1
    truncate: bool = False

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise RequestError(f"num_samples is {self.num_samples}, expected at least 1")

    @classmethod
    def of(
        cls, request: Request | str | Sequence[int], *, greedy: bool = False, truncate: bool = False, **options: Any
    ) -> Request:
        """Build a request from a prompt and keyword arguments; return a request unchanged.

        Args:
            request: a request, or a prompt as text or token ids.
            greedy: same as `temperature=0`.
            truncate: see `Request`.
            **options: fields of `SamplingOptions`.

        Raises:
            RequestError: if an option is out of range.
            TypeError: if an option is unknown, or a request comes with options.
        """
        if isinstance(request, Request):
            if greedy or truncate or options:
                raise TypeError("options cannot be passed with a Request: set them in the Request")
            return request
        if greedy:
            options["temperature"] = 0.0
        return cls(prompt=request, options=SamplingOptions(**options), truncate=truncate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedRequest(Request):
    """A request with an encoded and validated prompt; see `grok1.text.prompt.encode_request`.

    Attributes:
        tokens: the prompt's token ids, after truncation; 1 to `sequence_len - 1` of them.
    """

    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (natural logarithms) at one position of a text.

    Attributes:
        logprob: log-probability of the token at that position.
        top: (token id, log-probability) of the most likely tokens, most likely first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def perplexity(total: float, count: int) -> float:
    """Return the perplexity of `count` tokens whose log-probabilities sum to `total`; infinity on overflow."""
    try:
        return math.exp(-total / count)
    except OverflowError:
        return math.inf


def bits_per_byte(total: float, num_bytes: int | None) -> float | None:
    """Convert a total log-probability to bits per UTF-8 byte; None if the number of bytes is None or 0."""
    return -total / math.log(2) / num_bytes if num_bytes else None
