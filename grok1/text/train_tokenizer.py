"""Trains tokenizers, such as those of small random-weight models on a text that comes with the package.

The latter are of the release's kind: byte pairs with byte fallback, no normalization, and the same ids 0 to 324 (PAD,
BOS, EOS, UNK, user-defined symbols, 256 bytes). Only the merges after them differ.
"""

from __future__ import annotations

import importlib.resources
import io
import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import sentencepiece

from grok1.config import ModelConfig
from grok1.errors import TokenizerError

_SYMBOLS = (
    *("\n" * n for n in range(1, 11)),
    *"0123456789",
    *("\t" * n for n in range(1, 9)),
    *(" " * n for n in range(2, 17)),
    "<|separator|>",
    "<|mask|>",
    *(f"<|control{n}|>" for n in range(1, 21)),
)
"""The release's user-defined symbols, in its order."""

_FIXED_PIECES = 4 + len(_SYMBOLS) + 256

SMALLEST = 400
"""The smallest vocabulary that can be trained: the fixed pieces, some letters and some merges."""

LARGEST = 32768
"""The largest vocabulary that can be trained. A model that needs more is better served by the release's tokenizer."""

_CORPUS_WEIGHT = 4  # repetitions of the corpus, so that its merges come before those of made-up words
_MERGES_OF_CORPUS = 1024  # merges that the corpus is certain to have


def train_small_tokenizer(vocab_size: int) -> bytes:
    """Train a tokenizer with exactly `vocab_size` pieces.

    Args:
        vocab_size: `SMALLEST` to `LARGEST`.

    Returns:
        The content of a `tokenizer.model`, which depends only on `vocab_size` and the version of SentencePiece.

    Raises:
        TokenizerError: if no tokenizer of that size can be trained.
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise TokenizerError(
            f"cannot train a tokenizer of {vocab_size} pieces, expected {SMALLEST} to {LARGEST}; "
            "choose a vocab_size in that range or pass a tokenizer"
        )
    return train_sentencepiece(
        _training_text(vocab_size),
        vocab_size,
        model_type="bpe",
        user_defined_symbols=list(_SYMBOLS),
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
    )


def train_sentencepiece(lines: Iterable[str], vocab_size: int, **options: Any) -> bytes:
    """Train a SentencePiece model with the release's special pieces, byte fallback and no normalization.

    Args:
        lines: the text; every character in it becomes a piece.
        vocab_size: number of pieces.
        **options: further options of `SentencePieceTrainer`.

    Returns:
        The content of a `tokenizer.model`; the same bytes each time.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=ModelConfig.pad_id,
        bos_id=ModelConfig.bos_id,
        eos_id=ModelConfig.eos_id,
        unk_id=ModelConfig.unk_id,
        pad_piece="[PAD]",
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        unk_surface="[UNK]",
        num_threads=1,
        minloglevel=2,  # errors only
        **options,
    )
    return model.getvalue()


def _training_text(vocab_size: int) -> list[str]:
    """Lines with few enough distinct characters for the vocabulary, and enough distinct words for the merges."""
    corpus = importlib.resources.files("grok1").joinpath("text", "corpus.txt").read_text("utf-8")
    counts = Counter(corpus)
    # Up to half of the pieces that are not fixed are characters; rarer ones are encoded as bytes.
    common = sorted(counts, key=lambda character: (-counts[character], character))
    kept = {*common[: (vocab_size - _FIXED_PIECES) // 2], " ", "\n"}
    lines = "".join(character if character in kept else " " for character in corpus).splitlines()
    words = _made_up_words(max(0, vocab_size - _FIXED_PIECES - _MERGES_OF_CORPUS))
    return lines * _CORPUS_WEIGHT + [" ".join(words[i : i + 50]) for i in range(0, len(words), 50)]


def _made_up_words(count: int) -> list[str]:
    """Distinct pronounceable words, such as `balo` and `tremika`."""
    onsets = [*"bdfghklmnprstvwz", "br", "dr", "fl", "gr", "kl", "pr", "sk", "st", "tr"]
    syllables = [onset + vowel for onset in onsets for vowel in "aeiou"]
    two = ("".join(pair) for pair in itertools.product(syllables, repeat=2))
    three = ("".join(triple) for triple in itertools.product(syllables, repeat=3))
    return list(itertools.islice(itertools.chain(two, three), count))
