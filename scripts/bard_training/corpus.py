"""Training data of `bard`: reading and splitting the text, the tokenizer, and batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import sentencepiece

from grok1.text.train_tokenizer import train_sentencepiece

DEV_PIECES = 5
DEV_PIECE_CHARACTERS = 16_000


def split_text(text: str) -> tuple[str, str]:
    """Split a text at blank lines into a training set and a development set of evenly spaced pieces.

    Returns:
        The training set and the development set.
    """
    train, dev, end = [], [], 0
    for number in range(DEV_PIECES):
        target = (2 * number + 1) * len(text) // (2 * DEV_PIECES)
        start = _after_blank_line(text, target)
        train.append(text[end:start])
        end = _after_blank_line(text, min(start + DEV_PIECE_CHARACTERS, start + len(text) // (4 * DEV_PIECES)))
        dev.append(text[start:end])
    train.append(text[end:])
    return "".join(train), "".join(dev)


def _after_blank_line(text: str, position: int) -> int:
    found = text.find("\n\n", position)
    return len(text) if found < 0 else found + 2


def train_tokenizer(text: str, vocab_size: int) -> bytes:
    """Train a lossless SentencePiece unigram tokenizer.

    A newline and a blank line are single tokens. Characters that do not occur in the text are encoded as bytes.

    Returns:
        The content of a `tokenizer.model` file.
    """
    return train_sentencepiece(
        text.splitlines(),
        vocab_size,
        model_type="unigram",
        user_defined_symbols=["\n", "\n\n"],
        add_dummy_prefix=False,
        max_sentence_length=1 << 20,
        input_sentence_size=0,
    )


def encode(tokenizer: bytes, text: str) -> np.ndarray:
    """Return the token ids of a text, int32 `[tokens]`."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    return np.asarray(processor.encode(text), np.int32)


def batches(tokens: np.ndarray, batch: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Yield batches of windows of a text, int32 `[batch, length + 1]`, without end.

    Each epoch covers the text once, with windows in random order that start at a random offset.
    """
    count = (len(tokens) - 1) // length - 1  # the offset skips up to one window
    epoch, starts = 0, np.empty(0, np.int64)
    while True:
        while len(starts) < batch:
            rng = np.random.default_rng((seed, length, epoch))
            starts = np.concatenate([starts, rng.integers(length) + rng.permutation(count) * length])
            epoch += 1
        yield tokens[starts[:batch, None] + np.arange(length + 1)]
        starts = starts[batch:]


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        click.ClickException: if the file cannot be read or is not valid UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise click.ClickException(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{path} is not valid UTF-8 at offset {error.start}; convert it to UTF-8") from None
