"""The results of a model: completions, scores, and the text of a completion while it is generated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from grok1.request import FinishReason, TokenLogprobs


@dataclasses.dataclass(frozen=True)
class Timings:
    """How long a completion took, in seconds.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated.
        prefill_seconds: reading the prompt; 0 if another sample of the same prompt has read it.
        decode_seconds: from the first token to the last.
        compile_seconds: compiling programs on the way; in neither of the two above.
        time_to_first_token: from the start to the first token, compiling included.
    """

    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    time_to_first_token: float

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Speed of reading the prompt; None if it took no time."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Speed of generating after the first token; None if there was no second."""
        steps = self.completion_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else None


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished completion.

    Attributes:
        prompt: the prompt as it was given.
        prompt_tokens: the prompt's token ids, after truncation.
        text: what follows the prompt, cut before a stop text; the space between the two is part of it.
        tokens: the generated token ids, a stop text's included, without an end-of-text token that ended it.
        finish_reason: "eos", "stop", "max_tokens" or "context".
        stop_text: the stop text that ended it.
        seed: repeats this completion.
        sample: which of the request's samples it is.
        request_index: the place of its request among those given.
        logprobs: for each of `tokens`, if asked for.
        timings: how long it took.
    """

    prompt: str | Sequence[int]
    prompt_tokens: list[int]
    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stop_text: str | None
    seed: int
    sample: int
    request_index: int
    logprobs: list[TokenLogprobs] | None
    timings: Timings


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a text is.

    Attributes:
        tokens: the text's token ids.
        logprobs: for each token but the first, natural logarithms, with the likeliest tokens in its place.
        num_bytes: number of UTF-8 bytes of all tokens but the first; None without a tokenizer.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    num_bytes: int | None

    @property
    def total(self) -> float:
        """Sum of the log-probabilities."""
        return math.fsum(entry.logprob for entry in self.logprobs)

    @property
    def perplexity(self) -> float:
        """`exp` of the mean negative log-probability."""
        return math.exp(-self.total / len(self.logprobs))

    @property
    def bits_per_byte(self) -> float | None:
        """Negative log-probability in bits per UTF-8 byte; None without a tokenizer or if there are no bytes."""
        return -self.total / math.log(2) / self.num_bytes if self.num_bytes else None


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """How likely the tokens of one of many texts are, from the first that was to be scored on.

    Attributes:
        index: the place of the text among those given.
        logprobs: for each token, natural logarithms, with the likeliest tokens in its place.
        likeliest: the likeliest token in each place.
    """

    index: int
    logprobs: list[TokenLogprobs]
    likeliest: list[int]


class CompletionStream(Iterator[str]):
    """The text of a completion, piece by piece as it is generated.

    Iterate to get the pieces; they join to `completion.text`. No piece ends inside a character.
    """

    def __init__(self, events: Iterator[tuple[str, Completion | None]]):
        self._events = events
        self._completion: Completion | None = None

    def __next__(self) -> str:
        while True:
            piece, completion = next(self._events)
            self._completion = completion
            if piece:
                return piece

    @property
    def completion(self) -> Completion:
        """The whole, once the stream has ended.

        Raises:
            RuntimeError: if it has not.
        """
        if self._completion is None:
            raise RuntimeError("the completion is known when its stream has ended")
        return self._completion
