"""JSON as results are written in: one line an object, no NaN, and the objects that several commands share."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from grok1.request import TokenLogprobs


def json_line(value: object) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: float) -> float | None:
    """The same number, or None for one that JSON does not have."""
    return value if math.isfinite(value) else None


def logprobs_objects(tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """What JSON says about the log-probabilities of generated tokens."""
    return [
        {"token_id": token, "logprob": finite(entry.logprob), "top": top_object(entry)}
        for token, entry in zip(tokens, logprobs, strict=True)
    ]


def top_object(entry: TokenLogprobs) -> list[dict[str, Any]]:
    """What JSON says about the likeliest tokens at one place."""
    return [{"token_id": token, "logprob": finite(logprob)} for token, logprob in entry.top]
