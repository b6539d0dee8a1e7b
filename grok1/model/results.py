"""Results of a model: completions, their text while it is generated, and scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

from grok1.request import FinishReason, TokenLogprobs, bits_per_byte, perplexity
from grok1.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Timings:
    """Timings of a completion, in seconds.

    Attributes:
        prompt_tokens: number of tokens of the prompt.
        completion_tokens: number of tokens generated.
        prefill_seconds: time to read the prompt; 0 if another sample of the same prompt has read it.
        decode_seconds: time from the first token to the last.
        compile_seconds: time spent compiling, which is in neither of the two above.
        time_to_first_token: time from the start to the first token, including compilation.
    """

    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    time_to_first_token: float

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prefill speed; None if it took no time."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Decoding speed after the first token; None if there was no second."""
        steps = self.completion_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else None


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished completion.

    Attributes:
        prompt: the prompt of the request.
        prompt_tokens: the prompt's token ids, after truncation.
        text: the text after the prompt, up to a stop text; it includes the space between the two.
        tokens: the generated token ids, including a stop text's, without the end-of-text token.
        finish_reason: "eos", "stop", "max_tokens" or "context".
        stop_text: the stop text that ended it.
        seed: the seed that reproduces it.
        sample: index of the sample within the request.
        request_index: index of the request among those given.
        logprobs: for each of `tokens`, if requested.
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
    """The log-probabilities of a text, natural logarithms.

    Attributes:
        tokens: the text's token ids.
        logprobs: for each scored token, with the likeliest tokens at its position: for the last tokens of the text, or
            all except the first.
        num_bytes: number of UTF-8 bytes of the scored tokens; None without a tokenizer.
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
        return perplexity(self.total, len(self.logprobs))

    @property
    def bits_per_byte(self) -> float | None:
        """Negative log-probability in bits per UTF-8 byte; None without a tokenizer or for an empty text."""
        return bits_per_byte(self.total, self.num_bytes)

    @classmethod
    def of_windows(cls, tokens: list[int], windows: Iterable[TokenScores], tokenizer: Tokenizer | None) -> Score:
        """Return the score of a text from those of its windows, in order; together they score its last tokens."""
        logprobs = [entry for window in windows for entry in window.logprobs]
        first = len(tokens) - len(logprobs)
        return cls(tokens, logprobs, None if tokenizer is None else tokenizer.count_bytes(tokens, first))


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """The log-probabilities of the scored tokens of one of many texts, natural logarithms.

    Attributes:
        request_index: index of the text among those given.
        logprobs: for each token, with the likeliest tokens at its position.
        likeliest: the likeliest token at each position.
    """

    request_index: int
    logprobs: list[TokenLogprobs]
    likeliest: list[int]


class CompletionStream(Iterator[str]):
    """Iterator over the text of a completion as it is generated.

    The pieces concatenate to `completion.text`. No piece ends inside a character.
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
        """The completion, once the stream has ended.

        Raises:
            RuntimeError: if the stream has not ended.
        """
        if self._completion is None:
            raise RuntimeError("the stream has not ended; iterate over it to the end first")
        return self._completion
