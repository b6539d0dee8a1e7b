"""A prompt to complete or a text to score, and its token ids. Nothing here imports JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from grok1.config import ModelConfig
from grok1.errors import RequestError, TokenizerError
from grok1.request import SamplingOptions
from grok1.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to complete.

    Attributes:
        prompt: text, or token ids.
        options: how to continue it.
        num_samples: how many completions; sample i has the seed `seed + i`.
        truncate: whether a prompt that is too long loses its beginning, rather than being an error.

    Raises:
        RequestError: on construction, if no completion is wanted.
    """

    prompt: str | Sequence[int]
    options: SamplingOptions = SamplingOptions()  # noqa: RUF009 - frozen
    num_samples: int = 1
    truncate: bool = False

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise RequestError(f"num_samples is {self.num_samples}, expected at least 1")


def required(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer.

    Raises:
        TokenizerError: if there is none.
    """
    if tokenizer is None:
        raise TokenizerError(
            "no tokenizer.model was found in or beside the checkpoint: name one with --tokenizer FILE or "
            "$GROK1_TOKENIZER, or put the one that comes with the release's code there"
        )
    return tokenizer


def encode_prompt(request: Request, tokenizer: Tokenizer | None, config: ModelConfig) -> list[int]:
    """The token ids of a request's prompt, cut to the model's context if it may be.

    Raises:
        RequestError: if the prompt is empty or too long, or an id is none of the model's.
        TokenizerError: if there is no tokenizer, and the prompt is a text or there are stop texts.
    """
    prompt = request.prompt
    if request.options.stop:
        required(tokenizer)  # to find stop texts in
    ids = required(tokenizer).encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        advice = ": give at least one character" if isinstance(prompt, str) else ""
        raise RequestError(f"the prompt is empty{advice}")
    context = config.sequence_len
    fit = context - 1  # and one to generate
    if len(ids) > fit:
        if not request.truncate:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, but {fit} fit in the model's context of {context}: "
                "shorten it, or keep its last ones with --truncate"
            )
        # Leave room for what is to be generated, but never for more than half of the context.
        ids = ids[-max(context - request.options.max_tokens, context // 2) :][-fit:]
    return check_token_ids(ids, config, at_least=1, at_most=fit)


def encode_scored(text: str | Sequence[int], tokenizer: Tokenizer | None, config: ModelConfig) -> list[int]:
    """The token ids of a text to score.

    Raises:
        RequestError: if it has fewer than two tokens, or an id is none of the model's.
        TokenizerError: if it is a text and there is no tokenizer.
    """
    ids = required(tokenizer).encode(text) if isinstance(text, str) else text
    return check_token_ids(ids, config, at_least=2)


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a text that is read by itself.

    Attributes:
        start: index of its first token in the text.
        end: index after its last token.
        first: index of the first token that is scored; the others were scored in an earlier window, or never are.
    """

    start: int
    end: int
    first: int


def window_stride(stride: int | None, context: int) -> int:
    """How far apart windows begin: half of the context, unless somebody chose.

    Raises:
        RequestError: if it is not 1 to `context`.
    """
    if stride is None:
        return max(1, context // 2)
    if not 1 <= stride <= context:
        raise RequestError(f"stride is {stride}, expected 1 to the model's context of {context}")
    return stride


def windows(length: int, first: int, context: int, stride: int) -> list[Window]:
    """The windows in which every token from `first` on is scored once, with as much before it as they leave.

    A text that fits is one window. Of a longer one each window starts `stride` tokens after the one before and scores
    what is new in it, so that a token has at least `context - stride` tokens before it, or all there are.

    Args:
        length: tokens of the text, more than `first`.
        first: index of the first token to be scored, at least 1.
        context: the most tokens that a model reads; the last token of a window is scored without being read.
        stride: 1 to `context`.
    """
    found = []
    start, next_first = 0, first
    while next_first < length:
        end = min(length, start + context + 1)
        if end > next_first:
            found.append(Window(start, end, next_first))
            next_first = end
        start += stride
    return found


def check_token_ids(
    tokens: Sequence[int], config: ModelConfig, *, at_least: int, at_most: int | None = None
) -> list[int]:
    """The same ids as integers.

    Raises:
        RequestError: if there are too few or too many, or one is none of the model's.
    """
    ids = [int(token) for token in tokens]
    if len(ids) < at_least or (at_most is not None and len(ids) > at_most):
        expected = f"at least {at_least}" if at_most is None else f"{at_least} to {at_most}"
        raise RequestError(f"the text has {len(ids)} tokens, expected {expected}")
    wrong = next((i for i in ids if not 0 <= i < config.vocab_size), None)
    if wrong is not None:
        raise RequestError(f"token id {wrong} is none of the model's: expected 0 to {config.vocab_size - 1}")
    return ids
