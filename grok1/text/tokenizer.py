"""Text to tokens and back: `Tokenizer` over a SentencePiece model, and `TextStream` for text token by token.

The release's tokenizer is a byte-pair model of 131072 pieces, trained with byte fallback, so that any text has tokens:
what has no piece of its own is spelt in the 256 byte pieces. The reference puts no BOS before a prompt, and neither
does `Tokenizer.encode`.

Four properties of SentencePiece show in what users see:

- A text is encoded as if a space stood before it. Decoding takes one space off the first piece that shows anything.
- In its pieces the space is written U+2581 (`▁`), so that this character in a text comes back as a space.
- The names of control pieces (`[EOS]`) in a text are plain characters and never become control tokens. Symbols that
  the release defines as pieces of their own (digits, runs of newlines, `<|separator|>`) do become those pieces; they
  decode to the same characters.
- Bytes that form no UTF-8 character decode to U+FFFD, one for each byte.
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
"""How SentencePiece writes a space inside a piece."""

_REPLACEMENT = "\ufffd"
_MAX_FILE_BYTES = 64 << 20  # the release has 2 MB; what is larger than this is a tensor, not a tokenizer
_REMEDY = (
    "name the right file with --tokenizer FILE or $GROK1_TOKENIZER "
    "(tokenizer.model comes with the release's code, not with its weights)"
)


class Tokenizer:
    """The tokens of a text and the text of tokens, by a SentencePiece model.

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
        """Reads a SentencePiece model file.

        Raises:
            TokenizerError: if the file cannot be read or is no SentencePiece model.
        """
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            raise TokenizerError(f"there is no tokenizer at {path}: {_REMEDY}") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
            reason = error.strerror if isinstance(error, OSError) else error
            raise TokenizerError(
                f"cannot read the tokenizer {path} ({reason}), expected a SentencePiece model file: {_REMEDY}"
            ) from None
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Tokenizer:
        """Makes a tokenizer of the bytes of a SentencePiece model.

        Args:
            data: the content of a `tokenizer.model`.
            source: the file's name for messages.

        Raises:
            TokenizerError: if the bytes are no SentencePiece model.
        """
        if not data:
            raise TokenizerError(f"{source} is empty, expected a SentencePiece model: {_REMEDY}")
        if len(data) > _MAX_FILE_BYTES:
            raise TokenizerError(
                f"{source} has more than {_MAX_FILE_BYTES >> 20} MiB, expected a SentencePiece model: {_REMEDY}"
            )
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(data)
            return cls(processor, source, hashlib.sha256(data).hexdigest())
        except (RuntimeError, UnicodeDecodeError):
            # The first one's message is a line of SentencePiece's C++ code; the second is a piece that is no text.
            raise TokenizerError(
                f"{source} has {len(data)} bytes that are no SentencePiece model, or only a part of one: {_REMEDY}"
            ) from None

    def check_vocabulary(self, vocab_size: int) -> None:
        """Checks that this tokenizer's ids are those of a model.

        Args:
            vocab_size: number of rows of the model's embedding.

        Raises:
            TokenizerError: if the sizes differ, or PAD, BOS, EOS and UNK do not have the release's ids.
        """
        if self.vocab_size != vocab_size:
            raise TokenizerError(
                f"the tokenizer {self.source} has {self.vocab_size} pieces, but the model's vocabulary has "
                f"{vocab_size}: name the tokenizer that belongs to the model with --tokenizer FILE "
                "or $GROK1_TOKENIZER"
            )
        processor = self._processor
        found = (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id())
        expected = (ModelConfig.pad_id, ModelConfig.bos_id, ModelConfig.eos_id, ModelConfig.unk_id)
        if found != expected:
            raise TokenizerError(
                f"the tokenizer {self.source} has PAD, BOS, EOS and UNK at the ids {', '.join(map(str, found))}, "
                f"expected {', '.join(map(str, expected))}: name the tokenizer that belongs to the model with "
                "--tokenizer FILE or $GROK1_TOKENIZER"
            )

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without BOS; an empty text has none.

        Raises:
            RequestError: if the text holds half of a surrogate pair, which has no UTF-8 encoding.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, "
                "expected Unicode text: give it as valid UTF-8"
            ) from None
        ids: list[int] = self._processor.EncodeAsIds(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all these tokens together.

        Raises:
            RequestError: if an id is not one of this tokenizer's.
        """
        text: str = self._processor.DecodeIds(self._checked(ids))
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces as the model writes them: `▁` for a space, `<0x0A>` for a byte, `[EOS]`.

        Raises:
            RequestError: if an id is not one of this tokenizer's.
        """
        return [self._pieces[token] for token in self._checked(ids)]

    def token_bytes(self, token: int) -> bytes:
        """What a token adds in the middle of a text, in UTF-8: nothing for control pieces, a byte for byte pieces.

        Raises:
            RequestError: if the id is not one of this tokenizer's.
        """
        (token,) = self._checked([token])
        byte = self._byte(token)
        return self._written(token).replace(SPACE, " ").encode() if byte is None else byte

    def count_bytes(self, ids: Sequence[int], first: int = 0) -> int:
        """Number of UTF-8 bytes that `ids[first:]` contribute to the text of `ids`.

        Control pieces have none and byte pieces one each. The space that `encode` inserts before a text is not counted,
        as `decode` removes it.

        Args:
            ids: the tokens of a text.
            first: index of the first token that is counted.

        Raises:
            RequestError: if an id is not one of this tokenizer's.
        """
        count = sum(len(self.token_bytes(token)) for token in ids[first:])
        start = next((i for i, token in enumerate(ids) if self.token_bytes(token)), None)
        if start is not None and start >= first and self._byte(ids[start]) is None:
            count += len(self.decode([ids[start]]).encode()) - len(self.token_bytes(ids[start]))
        return count

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A stream for the text of the tokens that follow `prompt`.

        Raises:
            RequestError: if an id is not one of this tokenizer's.
        """
        return TextStream(self, prompt)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        checked = [operator.index(token) for token in ids]  # SentencePiece takes no integers of NumPy
        for token in checked:
            if not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"{token} is no token of this tokenizer, expected ids from 0 to {self.vocab_size - 1}"
                )
        return checked

    def _byte(self, token: int) -> bytes | None:
        """The byte of a byte piece, None for other pieces."""
        if not self._processor.IsByte(token):
            return None
        return bytes([int(self._pieces[token][1:-1], 16)])  # <0x0A>

    def _written(self, token: int) -> str:
        """The text of a piece other than a byte piece, with `▁` for spaces."""
        if self._processor.IsControl(token):
            return ""
        if self._processor.IsUnknown(token):
            surface: str = self._processor.DecodeIds([token])
            return surface
        return self._pieces[token]


class TextStream:
    """Text from tokens, token by token, never half a character.

    Without a prompt, the texts of all `push` calls and of `flush` together are `Tokenizer.decode` of the tokens. With a
    prompt they are what `decode` adds to the prompt's text, a leading space included. Where the prompt ends within
    a character, the stream starts with that whole character once its last byte comes; if it never comes, the stream
    is silent about the prompt's bytes, which are the prompt's text to show.

        stream = tokenizer.stream(prompt)
        for token in tokens:
            print(stream.push(token), end="")
        print(stream.flush())
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._at_start = True  # nothing shown yet, so that the next piece loses the space put before every text
        self._waiting = b""  # the beginning of a character
        self._prompt_bytes = 0  # how many of the waiting bytes are the prompt's
        for token in prompt:
            self.push(token)
        self._prompt_bytes = len(self._waiting)

    def push(self, token: int) -> str:
        """Takes the next token.

        Returns:
            The text that is certain now: "" while the bytes of a character wait for the rest of it.

        Raises:
            RequestError: if the id is not one of the tokenizer's.
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
        """What is left at the end of the tokens: U+FFFD for each byte of a character that stayed incomplete."""
        text = _REPLACEMENT * (len(self._waiting) - self._prompt_bytes)
        self._waiting = b""
        self._prompt_bytes = 0
        return text

    def _take_characters(self) -> str:
        """Takes from the waiting bytes all but the beginning of a character that can still become one."""
        text = ""
        while self._waiting:
            try:
                character = self._waiting.decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                # Python would skip the whole broken beginning; SentencePiece replaces it byte by byte.
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
    """The tokenizer file to use with a checkpoint.

    Args:
        checkpoint: folder that holds `ckpt-0`, or is it; it need not exist.
        given: the file that the caller has named, which goes before all others.

    Returns:
        `given`, or `tokenizer.model` in or beside the folder of the tensor files; None if there is none.
    """
    if given is not None:
        return given
    folders = [checkpoint / "ckpt-0", checkpoint]
    if not folders[0].is_dir():
        folders.append(checkpoint.absolute().parent)  # of a checkpoint that is `ckpt-0` itself
    return next((path for folder in folders if (path := folder / "tokenizer.model").exists()), None)
