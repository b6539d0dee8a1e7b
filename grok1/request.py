"""Requests to complete a prompt, their sampling options, and log-probabilities."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal, Required, TypedDict, Unpack

from grok1.errors import RequestError

FinishReason = Literal["eos", "stop", "max_tokens", "context"]
"""Why a completion ended: end-of-text token, stop text, `max_tokens`, or a full context."""

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1


class _OptionMetadata(TypedDict, total=False):
    """What is known about a sampling option besides its type and default."""

    help: Required[str]  # on the command line
    names: tuple[str, ...]  # on the command line; by default the field's name with dashes
    metavar: str
    valid: Callable[[Any], bool]  # whether a value is in range; without it every value is
    expected: str  # the range, for messages
    dtype: str  # of its array on the device, if it is applied there: see `grok1.engine.sampling`
    neutral: float  # the value that has no effect there


def sampling_option(default: Any, **metadata: Unpack[_OptionMetadata]) -> Any:
    """A field of `SamplingOptions`; the command line's option and the field of a batch's rows derive from it."""
    return dataclasses.field(default=default, metadata=dict(metadata))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to continue a prompt; the `help` of each option describes it.

    Logits are divided by the temperature; then top-k, top-p and min-p apply, in this order. A seed of None draws one.
    Sample i of several uses `seed + i`. Log-probabilities are reported unless `logprobs` is None.

    Raises:
        RequestError: on construction, if a value is out of range.
    """

    max_tokens: int = sampling_option(
        128,
        names=("-n", "--max-tokens"),
        metavar="N",
        help="Generate at most this many tokens.",
        valid=lambda value: value >= 1,
        expected="at least 1",
    )
    temperature: float = sampling_option(
        0.7,
        names=("-t", "--temperature", "--temp"),
        metavar="T",
        help="Divide the logits by this before sampling: 0 always takes the likeliest token, 1 draws from the model's "
        "own distribution, more is more varied.",
        valid=lambda value: 0 <= value < math.inf,
        expected="0 or more",
        dtype="float32",
        neutral=0,
    )
    top_k: int = sampling_option(
        0,
        metavar="K",
        help="Draw from the K likeliest tokens; 0 is off.",
        valid=lambda value: 0 <= value < 2**31,
        expected="0 (off) or more",
        dtype="int32",
        neutral=0,
    )
    top_p: float = sampling_option(
        0.95,
        metavar="P",
        help="Draw from the smallest set of likeliest tokens whose probability reaches P, above 0 and at most 1; "
        "1 is off.",
        valid=lambda value: 0 < value <= 1,
        expected="above 0 and at most 1",
        dtype="float32",
        neutral=1,
    )
    min_p: float = sampling_option(
        0.0,
        metavar="P",
        help="Draw from tokens that are at least P times as likely as the likeliest, 0 to 1; 0 is off.",
        valid=lambda value: 0 <= value <= 1,
        expected="0 to 1",
        dtype="float32",
        neutral=0,
    )
    seed: int | None = sampling_option(
        None,
        metavar="N",
        help="Start the random stream here, to repeat a completion.  [default: a fresh one, which is reported]",
        valid=lambda value: value is None or 0 <= value <= MAX_SEED,
        expected=f"0 to {MAX_SEED}",
    )
    stop: tuple[str, ...] = sampling_option(
        (),
        metavar="TEXT",
        help="End a completion before this text; give the option again for more texts.",
        valid=all,
        expected="texts that are not empty",
    )
    ignore_eos: bool = sampling_option(False, help="Go on after the model's end-of-text token.")
    logprobs: int | None = sampling_option(
        None,
        metavar="K",
        help="Report, in JSON, the log-probability of each token and of the K likeliest in its place, 0 to "
        f"{MAX_LOGPROBS}.",
        valid=lambda value: value is None or 0 <= value <= MAX_LOGPROBS,
        expected=f"0 to {MAX_LOGPROBS}",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for field in dataclasses.fields(self):
            value, valid = getattr(self, field.name), field.metadata.get("valid")
            if valid is not None and not valid(value):
                raise RequestError(f"{field.name} is {value!r}, expected {field.metadata['expected']}")


def fresh_seed() -> int:
    """A random seed of 32 bits, for requests without one."""
    return secrets.randbelow(2**32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to complete.

    Attributes:
        prompt: text or token ids.
        options: how to continue it.
        num_samples: number of completions; sample i uses the seed `seed + i`.
        truncate: whether to drop the beginning of a prompt that is too long instead of raising an error.

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
            greedy: the same as `temperature=0`.
            truncate: see `Request`.
            **options: fields of `SamplingOptions`.

        Raises:
            RequestError: if an option is out of range.
            TypeError: if an option is unknown, or a request comes with options.
        """
        if isinstance(request, Request):
            if greedy or truncate or options:
                raise TypeError("a Request has its own options: pass a prompt, or no options")
            return request
        if greedy:
            options["temperature"] = 0.0
        return cls(prompt=request, options=SamplingOptions(**options), truncate=truncate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedRequest(Request):
    """A request with its prompt encoded and checked: see `grok1.text.prompt.encode_request`.

    Attributes:
        tokens: the prompt's token ids, after truncation; 1 to `sequence_len - 1` of them.
    """

    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position of a text, natural logarithms.

    Attributes:
        logprob: of the token at that position.
        top: the likeliest tokens with their log-probabilities, likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def perplexity(total: float, count: int) -> float:
    """`exp` of the mean negative log-probability of `count` tokens with the sum `total`."""
    try:
        return math.exp(-total / count)
    except OverflowError:
        return math.inf


def bits_per_byte(total: float, num_bytes: int | None) -> float | None:
    """Negative log-probability in bits per UTF-8 byte; None without a tokenizer or if there are no bytes."""
    return -total / math.log(2) / num_bytes if num_bytes else None
