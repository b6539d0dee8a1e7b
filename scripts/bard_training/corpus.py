"""The text that `bard` is trained on: its split, its tokenizer, and batches of token ids."""

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
    """Splits off a development set: evenly spaced pieces of the text, cut at blank lines.

    Returns:
        the text to train on, and the development set.
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
    """Trains a SentencePiece unigram model that encodes and decodes every text without loss.

    One and two line ends are single tokens; characters that do not occur in the text are encoded as bytes.

    Returns:
        the content of a `tokenizer.model`.
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
    """Token ids of a text, int32 `[tokens]`."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    return np.asarray(processor.encode(text), np.int32)


def batches(tokens: np.ndarray, batch: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches, int32 `[batch, length + 1]`, of consecutive windows of a text in random order.

    Each epoch covers the text once. It has its own order, and its windows start at its own random offset.
    """
    count = (len(tokens) - 1) // length - 1  # the offset may take up to one window
    epoch, starts = 0, np.empty(0, np.int64)
    while True:
        while len(starts) < batch:
            rng = np.random.default_rng((seed, length, epoch))
            starts = np.concatenate([starts, rng.integers(length) + rng.permutation(count) * length])
            epoch += 1
        yield tokens[starts[:batch, None] + np.arange(length + 1)]
        starts = starts[batch:]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        click.ClickException: if it cannot be read as text.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise click.ClickException(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise click.ClickException(
            f"{path} has a byte that is not UTF-8 at offset {error.start}: convert it to UTF-8"
        ) from None
