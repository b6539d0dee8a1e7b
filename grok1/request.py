"""Requests to complete a prompt, their sampling options, and log-probabilities. Nothing here imports JAX."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Sequence
from typing import Any, Literal

from grok1.errors import RequestError

FinishReason = Literal["eos", "stop", "max_tokens", "context"]
"""Why a completion ended: end-of-text token, stop text, `max_tokens`, or a full context."""

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1


def _on_device(default: float, dtype: str, neutral: float) -> Any:
    """A sampling option that is applied on the device; with the value `neutral` it has no effect.

    See `grok1.engine.sampling`, which has an array of `dtype` for each of them.
    """
    return dataclasses.field(default=default, metadata={"dtype": dtype, "neutral": neutral})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to continue a prompt.

    Logits are divided by the temperature; then top-k, top-p and min-p apply, in this order.

    Attributes:
        max_tokens: maximum number of tokens to generate.
        temperature: 0 is greedy; 1 samples from the model's own distribution.
        top_k: sample from this many of the likeliest tokens; 0 is off.
        top_p: sample from the smallest set of likeliest tokens with at least this probability; 1 is off.
        min_p: sample from tokens with at least this fraction of the likeliest token's probability; 0 is off.
        seed: of the random stream; None draws one. Sample i of several uses `seed + i`.
        stop: the completion ends before the first of these texts.
        ignore_eos: whether to continue after the end-of-text token.
        logprobs: how many of the likeliest tokens to report at each position, with the log-probability of the chosen
            one; None reports nothing.

    Raises:
        RequestError: on construction, if a value is out of range.
    """

    max_tokens: int = 128
    temperature: float = _on_device(0.7, "float32", neutral=0)
    top_k: int = _on_device(0, "int32", neutral=0)
    top_p: float = _on_device(0.95, "float32", neutral=1)
    min_p: float = _on_device(0.0, "float32", neutral=0)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 (off) or more")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        _check("seed", self.seed, self.seed is None or 0 <= self.seed <= MAX_SEED, f"0 to {MAX_SEED}")
        _check("stop", self.stop, all(self.stop), "texts that are not empty")
        wanted = self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS
        _check("logprobs", self.logprobs, wanted, f"0 to {MAX_LOGPROBS}")


def fresh_seed() -> int:
    """A random seed of 32 bits, for requests without one."""
    return secrets.randbelow(2**32)


def _check(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise RequestError(f"{name} is {value!r}, expected {expected}")


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
