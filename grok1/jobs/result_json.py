"""The JSON form of results, shared by the command line and output files: one object per line, without NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grok1.request import TokenLogprobs

if TYPE_CHECKING:
    from grok1.model import Completion, Score


def json_line(value: object) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: float | None) -> float | None:
    """Return the number itself, or None if JSON cannot represent it."""
    return value if value is not None and math.isfinite(value) else None


def completion_object(completion: Completion, *, echo: str = "", alone: bool = False) -> dict[str, Any]:
    """A completion.

    Args:
        completion: the completion.
        echo: text to put before that of the completion.
        alone: whether the object is a result of its own rather than a part of a row's; it then includes the prompt, the
            number of the sample, and timings in seconds.
    """
    result: dict[str, Any] = {}
    if alone:
        result |= {"prompt": completion.prompt, "prompt_token_ids": completion.prompt_tokens}
    result |= {
        "text": echo + completion.text,
        "token_ids": completion.tokens,
        "finish_reason": completion.finish_reason,
        "stop_text": completion.stop_text,
        "seed": completion.seed,
    }
    if alone:
        result["sample"] = completion.sample
    if completion.logprobs is not None:
        result["logprobs"] = [
            {"token_id": token, "logprob": finite(entry.logprob), "top": _top(entry)}
            for token, entry in zip(completion.tokens, completion.logprobs, strict=True)
        ]
    if alone:
        timings = completion.timings
        result |= {
            "prefill_seconds": timings.prefill_seconds,
            "decode_seconds": timings.decode_seconds,
            "compile_seconds": timings.compile_seconds,
            "time_to_first_token_seconds": timings.time_to_first_token,
            "prefill_tokens_per_second": timings.prefill_tokens_per_second,
            "decode_tokens_per_second": timings.decode_tokens_per_second,
        }
    return result


def score_object(score: Score, pieces: Sequence[str] | None, *, top: bool) -> dict[str, Any]:
    """Return the score of a text, token by token.

    Args:
        score: of all tokens except the first.
        pieces: of its tokens; None without a tokenizer.
        top: whether to report the likeliest tokens at each position.
    """
    return {
        "token_ids": score.tokens,
        "pieces": pieces,
        "logprobs": [None, *(finite(entry.logprob) for entry in score.logprobs)],
        **({"top": [None, *map(_top, score.logprobs)]} if top else {}),
        **_totals(score),
        "num_tokens": len(score.tokens),
    }


def row_score_object(score: Score, likeliest: list[int], *, per_token: bool, top: bool) -> dict[str, Any]:
    """Return the score of a row.

    Args:
        score: the score.
        likeliest: the likeliest token at each scored position.
        per_token: whether to report each scored token.
        top: whether to report the likeliest tokens at each scored position.
    """
    scored = score.tokens[-len(score.logprobs) :]
    result: dict[str, Any] = {
        "num_tokens": len(score.tokens),
        "num_scored": len(scored),
        "num_bytes": score.num_bytes,
        **_totals(score),
        "total_squared_logprob": finite(math.fsum(entry.logprob**2 for entry in score.logprobs)),
        "greedy": likeliest == scored,
    }
    if per_token:
        result |= {"token_ids": scored, "logprobs": [finite(entry.logprob) for entry in score.logprobs]}
    if top:
        result["top"] = list(map(_top, score.logprobs))
    return result


def _totals(score: Score) -> dict[str, float | None]:
    return {
        "total_logprob": finite(score.total),
        "perplexity": finite(score.perplexity),
        "bits_per_byte": finite(score.bits_per_byte),
    }


def _top(entry: TokenLogprobs) -> list[dict[str, Any]]:
    return [{"token_id": token, "logprob": finite(logprob)} for token, logprob in entry.top]
