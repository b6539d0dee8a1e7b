"""Text to tokens and back: `Tokenizer` over a SentencePiece model, and `TextStream` for text token by token.

The release's tokenizer is a byte-pair model of 131072 pieces with byte fallback: characters without a piece are encoded
as bytes. As in the release's code, prompts have no BOS.

Properties of SentencePiece that users see:

- A space is inserted before a text when it is encoded, and one is removed from the first visible piece when it is
  decoded.
- Pieces write a space as U+2581 (`▁`), so this character decodes to a space.
- The names of control pieces (`[EOS]`) in a text are plain characters. User-defined symbols (digits, runs of newlines,
  `<|separator|>`) are encoded as their own pieces and decode to the same characters.
- Bytes that are not valid UTF-8 decode to U+FFFD, one for each byte.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from grok1.config import ModelConfig
from grok1.errors import RequestError, TokenizerError

SPACE = "\u2581"
"""A space in a SentencePiece piece."""

_REPLACEMENT = "\ufffd"
_MAX_FILE_BYTES = 64 << 20  # the release's has 2 MB; a larger file is a tensor, not a tokenizer
_REMEDY = (
    "set the path with --tokenizer FILE or $GROK1_TOKENIZER "
    "(tokenizer.model is in the release's code repository, not with its weights)"
)


class Tokenizer:
    """A SentencePiece model.

        tokenizer = Tokenizer.read(Path("tokenizer.model"))
        tokenizer.decode(tokenizer.encode("The answer"))

    Attributes:
        vocab_size: number of pieces; ids run from 0 to one less.
        source: the file's name, for messages.
        sha256: of the file, hexadecimal.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, source: str, sha256: str) -> None:
        self._processor = processor
        self.sha256 = sha256
        self.vocab_size: int = processor.GetPieceSize()
        self.source = source
        self._pieces: list[str] = processor.IdToPiece(list(range(self.vocab_size)))

    @classmethod
    def read(cls, path: Path) -> Tokenizer:
        """Read a SentencePiece model file.

        Raises:
            TokenizerError: if the file cannot be read or is not a SentencePiece model.
        """
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            raise TokenizerError(f"tokenizer {path} does not exist; {_REMEDY}") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
            reason = error.strerror if isinstance(error, OSError) else error
            raise TokenizerError(f"cannot read tokenizer {path}: {reason}; {_REMEDY}") from None
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Tokenizer:
        """Read the content of a SentencePiece model file; `source` is its name, for messages.

        Raises:
            TokenizerError: if it is not a SentencePiece model.
        """
        if not data:
            raise TokenizerError(f"{source} is empty, expected a SentencePiece model; {_REMEDY}")
        if len(data) > _MAX_FILE_BYTES:
            raise TokenizerError(
                f"{source} is larger than {_MAX_FILE_BYTES >> 20} MiB, expected a SentencePiece model; {_REMEDY}"
            )
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(data)
            return cls(processor, source, hashlib.sha256(data).hexdigest())
        except (RuntimeError, UnicodeDecodeError):
            # The message of the first is a line of SentencePiece's C++ code; the second is a piece that is not UTF-8.
            raise TokenizerError(
                f"{source} ({len(data)} bytes) is not a valid SentencePiece model; {_REMEDY}"
            ) from None

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that the tokenizer fits a model with `vocab_size` token ids.

        Raises:
            TokenizerError: if it has another number of pieces, or PAD, BOS, EOS and UNK do not have the release's ids.
        """
        if self.vocab_size != vocab_size:
            raise TokenizerError(
                f"tokenizer {self.source} has {self.vocab_size} pieces, expected {vocab_size} (the model's "
                "vocabulary); "
                "set the model's tokenizer with --tokenizer FILE or $GROK1_TOKENIZER"
            )
        processor = self._processor
        found = (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id())
        expected = (ModelConfig.pad_id, ModelConfig.bos_id, ModelConfig.eos_id, ModelConfig.unk_id)
        if found != expected:
            raise TokenizerError(
                f"tokenizer {self.source} has PAD, BOS, EOS and UNK at ids {', '.join(map(str, found))}, "
                f"expected {', '.join(map(str, expected))}; set the model's tokenizer with --tokenizer FILE "
                "or $GROK1_TOKENIZER"
            )

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without BOS; an empty text has none.

        Raises:
            RequestError: if the text has a lone surrogate, which has no UTF-8 encoding.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, "
                "expected valid Unicode; encode the text as UTF-8"
            ) from None
        ids: list[int] = self._processor.EncodeAsIds(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens.

        Raises:
            RequestError: if an id is out of range.
        """
        text: str = self._processor.DecodeIds(self._checked(ids))
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the pieces of tokens, with `▁` for a space and `<0x0A>` for a byte, such as `▁the` and `[EOS]`.

        Raises:
            RequestError: if an id is out of range.
        """
        return [self._pieces[token] for token in self._checked(ids)]

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes that a token adds to a text, except at its start; a control piece adds none.

        Raises:
            RequestError: if the id is out of range.
        """
        (token,) = self._checked([token])
        byte = self._byte(token)
        return self._written(token).replace(SPACE, " ").encode() if byte is None else byte

    def count_bytes(self, ids: Sequence[int], first: int = 0) -> int:
        """Number of UTF-8 bytes that `ids[first:]` add to the text of `ids`.

        The space that `encode` inserts before a text is not counted.

        Raises:
            RequestError: if an id is out of range.
        """
        count = sum(len(self.token_bytes(token)) for token in ids[first:])
        start = next((i for i, token in enumerate(ids) if self.token_bytes(token)), None)
        if start is not None and start >= first and self._byte(ids[start]) is None:
            count += len(self.decode([ids[start]]).encode()) - len(self.token_bytes(ids[start]))
        return count

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A stream of the text of tokens that follow `prompt`.

        Raises:
            RequestError: if an id is out of range.
        """
        return TextStream(self, prompt)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        checked = [operator.index(token) for token in ids]  # SentencePiece does not accept NumPy integers
        for token in checked:
            if not 0 <= token < self.vocab_size:
                raise RequestError(f"token id {token} is out of range (0 to {self.vocab_size - 1})")
        return checked

    def _byte(self, token: int) -> bytes | None:
        """Return the byte of a byte piece, None for other pieces."""
        if not self._processor.IsByte(token):
            return None
        return bytes([int(self._pieces[token][1:-1], 16)])  # <0x0A>

    def _written(self, token: int) -> str:
        """Return the text of a piece other than a byte piece, with `▁` for spaces."""
        if self._processor.IsControl(token):
            return ""
        if self._processor.IsUnknown(token):
            surface: str = self._processor.DecodeIds([token])
            return surface
        return self._pieces[token]


class TextStream:
    """Decodes token by token, in whole characters.

    The texts of all `push` calls and of `flush` concatenate to `Tokenizer.decode` of the tokens; with a prompt, to what
    the tokens add to the prompt's text. If the prompt ends inside a character, the stream starts with that character
    once it is complete; if it is never completed, the stream skips the prompt's bytes of it.

        stream = tokenizer.stream(prompt)
        for token in tokens:
            print(stream.push(token), end="")
        print(stream.flush())
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._at_start = True  # no text yet: the inserted space is removed from the next piece
        self._waiting = b""  # the first bytes of a character
        self._prompt_bytes = 0  # number of waiting bytes that belong to the prompt
        for token in prompt:
            self.push(token)
        self._prompt_bytes = len(self._waiting)

    def push(self, token: int) -> str:
        """Take the next token.

        Returns:
            Its text, or "" until a character is complete.

        Raises:
            RequestError: if the id is out of range.
        """
        (token,) = self._tokenizer._checked([token])
        byte = self._tokenizer._byte(token)
        if byte is not None:
            self._waiting += byte
            self._at_start = False
            return self._take_characters()
        text = self.flush()
        written = self._tokenizer._written(token)
        if self._at_start and written:
            self._at_start = False
            written = written.removeprefix(SPACE)
        return text + written.replace(SPACE, " ")

    def flush(self) -> str:
        """End the text: returns U+FFFD for each byte of an incomplete character."""
        text = _REPLACEMENT * (len(self._waiting) - self._prompt_bytes)
        self._waiting = b""
        self._prompt_bytes = 0
        return text

    def _take_characters(self) -> str:
        """Decode the waiting bytes, except the first bytes of a character that can still be completed."""
        text = ""
        while self._waiting:
            try:
                character = self._waiting.decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                # Python would replace all bytes of the invalid sequence at once; SentencePiece replaces each.
                self._waiting = self._waiting[1:]
                if self._prompt_bytes:
                    self._prompt_bytes -= 1
                else:
                    text += _REPLACEMENT
            else:
                text += character
                self._waiting = b""
                self._prompt_bytes = 0
        return text


def find_tokenizer(checkpoint: Path, given: Path | None = None) -> Path | None:
    """Return the tokenizer file to use with a checkpoint: `given`, or `tokenizer.model` in or beside its tensor files.

    Args:
        checkpoint: directory with the tensor files or with `ckpt-0`; it need not exist.
        given: the file that the caller named.

    Returns:
        the path; None if no file is found.
    """
    if given is not None:
        return given
    folders = [checkpoint / "ckpt-0", checkpoint]
    if not folders[0].is_dir():
        folders.append(checkpoint.absolute().parent)  # of a checkpoint that is `ckpt-0` itself
    return next((path for folder in folders if (path := folder / "tokenizer.model").exists()), None)
