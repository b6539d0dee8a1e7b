"""What a caller asks of the engine, in token ids, and what comes back. Nothing here imports JAX."""

from __future__ import annotations

import dataclasses
import math
import secrets
from typing import Literal

from grok1.errors import RequestError

FinishReason = Literal["eos", "stop", "max_tokens", "context"]
"""Why a completion ended: the end-of-text token, a stop text, the limit asked for, or the end of the context."""

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to continue a prompt.

    The temperature divides the logits first; then the filters apply in the order top-k, top-p, min-p.

    Attributes:
        max_tokens: the most tokens to generate.
        temperature: 0 always takes the likeliest token; 1 draws from the model's own distribution.
        top_p: draw from the smallest set of likeliest tokens whose mass reaches this; 1 is off.
        top_k: draw from this many likeliest tokens; 0 is off.
        min_p: draw from tokens at least this times as likely as the likeliest; 0 is off.
        seed: of the random stream; None draws a fresh one. Sample i of several has the seed `seed + i`.
        stop: texts before which the completion is cut.
        ignore_eos: go on after the end-of-text token.
        logprobs: report log-probabilities, with this many of the likeliest tokens at each place; None reports none.

    Raises:
        RequestError: on construction, if a value is out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
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

    def with_seed(self) -> SamplingOptions:
        """The same options with a seed, a fresh one if there was none."""
        return self if self.seed is not None else dataclasses.replace(self, seed=secrets.randbelow(2**32))


def _check(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise RequestError(f"{name} is {value!r}, expected {expected}")


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one place of a text, natural logarithm.

    Attributes:
        logprob: of the token that stands there.
        top: the likeliest tokens there with theirs, likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
