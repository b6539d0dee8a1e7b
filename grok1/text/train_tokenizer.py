"""Trains the tokenizers of small random-weight models on a text that comes with the package.

Such a tokenizer has the release's kind and layout: byte pairs with byte fallback, no normalisation, and ids 0 to 324
the same (PAD, BOS, EOS, UNK, the symbols defined by its makers, the 256 bytes). Only the merges after them are its own.
"""

from __future__ import annotations

import importlib.resources
import io
import itertools
from collections import Counter

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
"""The smallest vocabulary that can be trained: the pieces that are always there, some letters and some merges."""

LARGEST = 32768
"""The largest vocabulary that can be trained. A model that needs more is better served by the release's tokenizer."""

_CORPUS_WEIGHT = 4  # how often the real text counts against once for each made-up word: its merges come first
_MERGES_OF_CORPUS = 1024  # what the real text surely has, and a little less than what it has


def train_small_tokenizer(vocab_size: int) -> bytes:
    """Trains a tokenizer with exactly so many pieces.

    The result depends on `vocab_size` (and the version of SentencePiece) alone: the same bytes each time.

    Args:
        vocab_size: number of pieces, from `SMALLEST` to `LARGEST`.

    Returns:
        The content of a `tokenizer.model`.

    Raises:
        TokenizerError: if no tokenizer of that size can be trained.
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise TokenizerError(
            f"cannot train a tokenizer of {vocab_size} pieces, expected {SMALLEST} to {LARGEST}: "
            "choose a vocab_size in that range, or name a tokenizer of your own"
        )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(_training_text(vocab_size)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=list(_SYMBOLS),
        character_coverage=1.0,  # _training_text has left out the characters that are too many
        normalization_rule_name="identity",
        add_dummy_prefix=True,
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
        minloglevel=2,  # errors only: the trainer reports each step on stderr
    )
    return model.getvalue()


def _training_text(vocab_size: int) -> list[str]:
    """Lines with no more distinct characters than fit, and with enough distinct words for the merges."""
    corpus = importlib.resources.files("grok1").joinpath("text", "corpus.txt").read_text("utf-8")
    counts = Counter(corpus)
    # Half of what is not fixed may be single characters; the rest of them is spelt in bytes.
    common = sorted(counts, key=lambda character: (-counts[character], character))
    kept = {*common[: (vocab_size - _FIXED_PIECES) // 2], " ", "\n"}
    lines = "".join(character if character in kept else " " for character in corpus).splitlines()
    words = _made_up_words(max(0, vocab_size - _FIXED_PIECES - _MERGES_OF_CORPUS))
    return lines * _CORPUS_WEIGHT + [" ".join(words[i : i + 50]) for i in range(0, len(words), 50)]


def _made_up_words(count: int) -> list[str]:
    """So many distinct pronounceable words, such as `balo` and `tremika`."""
    onsets = [*"bdfghklmnprstvwz", "br", "dr", "fl", "gr", "kl", "pr", "sk", "st", "tr"]
    syllables = [onset + vowel for onset in onsets for vowel in "aeiou"]
    two = ("".join(pair) for pair in itertools.product(syllables, repeat=2))
    three = ("".join(triple) for triple in itertools.product(syllables, repeat=3))
    return list(itertools.islice(itertools.chain(two, three), count))
