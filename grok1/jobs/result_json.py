"""The JSON form of results, shared by the command line and output files: one object per line, without NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grok1.jobs.validate import JobRow
from grok1.request import TokenLogprobs

if TYPE_CHECKING:
    from grok1.model import Completion, Score


def json_line(value: object) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: float) -> float | None:
    """The number itself, or None if JSON cannot represent it."""
    return value if math.isfinite(value) else None


def completion_object(completion: Completion, *, echo: str = "", alone: bool = False) -> dict[str, Any]:
    """A completion.

    Args:
        completion: the completion.
        echo: text to put before that of the completion.
        alone: whether the object is a result of its own rather than a part of a row's; it then includes the prompt, the
            number of the sample, and timings in seconds.
    """
    told: dict[str, Any] = {}
    if alone:
        told |= {"prompt": completion.prompt, "prompt_token_ids": completion.prompt_tokens}
    told |= {
        "text": echo + completion.text,
        "token_ids": completion.tokens,
        "finish_reason": completion.finish_reason,
        "stop_text": completion.stop_text,
        "seed": completion.seed,
    }
    if alone:
        told["sample"] = completion.sample
    if completion.logprobs is not None:
        told["logprobs"] = [
            {"token_id": token, "logprob": finite(entry.logprob), "top": _top_object(entry)}
            for token, entry in zip(completion.tokens, completion.logprobs, strict=True)
        ]
    if alone:
        timings = completion.timings
        told |= {
            "prefill_seconds": timings.prefill_seconds,
            "decode_seconds": timings.decode_seconds,
            "compile_seconds": timings.compile_seconds,
            "time_to_first_token_seconds": timings.time_to_first_token,
            "prefill_tokens_per_second": timings.prefill_tokens_per_second,
            "decode_tokens_per_second": timings.decode_tokens_per_second,
        }
    return told


def score_object(score: Score, pieces: Sequence[str] | None, top_logprobs: int | None) -> dict[str, Any]:
    """The score of a text.

    Args:
        score: the score.
        pieces: of its tokens; None without a tokenizer.
        top_logprobs: number of likeliest tokens to report at each position; None reports none.
    """
    told: dict[str, Any] = {
        "token_ids": score.tokens,
        "pieces": pieces,
        "logprobs": [None, *logprob_values(score.logprobs)],
    }
    if top_logprobs is not None:
        told["top"] = [None, *top_objects(score.logprobs)]
    return told | {
        "total_logprob": finite(score.total),
        "perplexity": finite(score.perplexity),
        "bits_per_byte": None if score.bits_per_byte is None else finite(score.bits_per_byte),
        "num_tokens": len(score.tokens),
    }


def logprob_values(entries: Sequence[TokenLogprobs]) -> list[float | None]:
    """The log-probability of each token; None if it is not finite."""
    return [finite(entry.logprob) for entry in entries]


def top_objects(entries: Sequence[TokenLogprobs]) -> list[list[dict[str, Any]]]:
    """The likeliest tokens at the position of each token."""
    return [_top_object(entry) for entry in entries]


def _top_object(entry: TokenLogprobs) -> list[dict[str, Any]]:
    return [{"token_id": token, "logprob": finite(logprob)} for token, logprob in entry.top]


def error_object(row: JobRow) -> dict[str, Any]:
    """A bad row."""
    return {"index": row.index, "id": row.id, "line": row.line, "error": row.error}
