"""Encoding prompts to complete and texts to score, and the windows of long texts. Nothing here imports JAX."""

from __future__ import annotations

from collections.abc import Sequence

from grok1.config import ModelConfig
from grok1.errors import RequestError, TokenizerError
from grok1.request import EncodedRequest, Request
from grok1.text.tokenizer import Tokenizer


def required(tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer.

    Raises:
        TokenizerError: if it is None.
    """
    if tokenizer is None:
        raise TokenizerError(
            "no tokenizer.model in or next to the checkpoint; copy it from the release's code repository, pass "
            "--tokenizer FILE, or set $GROK1_TOKENIZER"
        )
    return tokenizer


def encode_request(request: Request, tokenizer: Tokenizer | None, config: ModelConfig) -> EncodedRequest:
    """Encode and check a request's prompt, truncated to the model's context if the request allows that.

    An encoded request is returned unchanged.

    Raises:
        RequestError: if the prompt is empty or too long, or a token id is out of range.
        TokenizerError: if `tokenizer` is None, and the prompt is text or the request has stop texts.
    """
    if isinstance(request, EncodedRequest):
        return request
    prompt = request.prompt
    if request.options.stop:
        required(tokenizer)  # to find stop texts in
    ids = required(tokenizer).encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        unit = "character" if isinstance(prompt, str) else "token id"
        raise RequestError(f"the prompt is empty, expected at least one {unit}")
    context = config.sequence_len
    fit = context - 1  # and one to generate
    if len(ids) > fit:
        if not request.truncate:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, expected at most {fit} (the model's context is {context}); "
                "shorten it or drop its beginning with --truncate"
            )
        # Leave room for the completion, but never more than half of the context.
        ids = ids[-max(context - request.options.max_tokens, context // 2) :][-fit:]
    tokens = check_token_ids(ids, config, at_least=1, at_most=fit)
    return EncodedRequest(**vars(request), tokens=tokens)


def encode_scored(text: str | Sequence[int], tokenizer: Tokenizer | None, config: ModelConfig) -> list[int]:
    """Encode a text to score.

    Raises:
        RequestError: if it has fewer than two tokens, or a token id is out of range.
        TokenizerError: if it is a text and `tokenizer` is None.
    """
    ids = required(tokenizer).encode(text) if isinstance(text, str) else text
    return check_token_ids(ids, config, at_least=2)


def window_stride(stride: int | None, context: int) -> int:
    """Distance between the starts of windows, half of the context by default.

    Raises:
        RequestError: if `stride` is not in 1 to `context`.
    """
    if stride is None:
        return max(1, context // 2)
    if not 1 <= stride <= context:
        raise RequestError(f"stride is {stride}, expected 1 to {context} (the model's context)")
    return stride


def windows(tokens: list[int], first: int, context: int, stride: int) -> list[tuple[list[int], int]]:
    """Split a text into windows that together score every token from `first` on exactly once.

    A text that fits is one window. In a longer text each window starts `stride` tokens after the previous one and
    scores the tokens that are new in it, so that each has at least `context - stride` tokens before it, or all there
    are.

    Args:
        tokens: the text.
        first: index of the first token to score, at least 1.
        context: maximum number of tokens in the cache; the last token of a window is scored without being read.
        stride: 1 to `context`.

    Returns:
        for each window its tokens, and the index in it of the first token to score.
    """
    found = []
    start = 0
    while first < len(tokens):
        end = min(len(tokens), start + context + 1)
        if end > first:
            found.append((tokens[start:end], first - start))
            first = end
        start += stride
    return found


def check_token_ids(
    tokens: Sequence[int], config: ModelConfig, *, at_least: int, at_most: int | None = None
) -> list[int]:
    """Convert token ids to a list of integers and check them.

    Raises:
        RequestError: if there are too few or too many, or one is out of range.
    """
    ids = [int(token) for token in tokens]
    if len(ids) < at_least or (at_most is not None and len(ids) > at_most):
        expected = f"at least {at_least}" if at_most is None else f"{at_least} to {at_most}"
        raise RequestError(f"the text has {len(ids)} tokens, expected {expected}")
    wrong = next((i for i in ids if not 0 <= i < config.vocab_size), None)
    if wrong is not None:
        raise RequestError(f"token id {wrong} is out of range (0 to {config.vocab_size - 1})")
    return ids
