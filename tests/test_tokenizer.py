from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from grok1.config import PRESETS, ModelConfig
from grok1.errors import RequestError, TokenizerError
from grok1.text.tokenizer import Tokenizer
from grok1.text.train_tokenizer import LARGEST, SMALLEST, train_small_tokenizer

RELEASE = Path(__file__).parents[1].parent / "shared" / "release" / "tokenizer.model"
SMALL_BYTES = train_small_tokenizer(1024)

TOKENIZERS = {"small": Tokenizer.from_bytes(SMALL_BYTES, "small")}
if RELEASE.exists():
    TOKENIZERS["release"] = Tokenizer.read(RELEASE)

both = pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(
            TOKENIZERS.get(name),
            id=name,
            marks=pytest.mark.skipif(name not in TOKENIZERS, reason="the release's tokenizer is not here"),
        )
        for name in ("small", "release")
    ],
)

FIRST_BYTE = 69  # the id of <0x00>; the small tokenizer has the release's layout up to 325
ALONE = ModelConfig.eos_id, ModelConfig.unk_id, ModelConfig.bos_id, ModelConfig.pad_id

# Bytes around the borders of UTF-8: leads, continuations, over-long forms, surrogates, past the last code point.
awkward_bytes = st.sampled_from(
    bytes.fromhex("00 20 41 7F 80 81 82 8F 90 96 9F A0 AC BD BF C0 C1 C3 E0 E2 ED EF F0 F4 F5 FF")
)
# The start of a text, the symbols of its own, spaces, and the rest of the vocabulary as shares of its size.
ids_of_share = st.one_of(
    awkward_bytes.map(lambda byte: FIRST_BYTE + byte),
    st.sampled_from(ALONE),
    st.integers(0, 330),
    st.floats(0, 1, exclude_max=True),
    st.just("▁"),
)
sequences = st.lists(ids_of_share, max_size=12)

# Text with much white space, digits and symbols, where tokenizers differ from plain lookup.
awkward_text = st.one_of(
    st.text(),
    st.text(st.sampled_from(" \n\t\r0a\u00a0é漢\U0001f600\u0301\u200d\ufeff\ufffd\0")),
    st.lists(st.sampled_from(["[EOS]", "[BOS]", "<|separator|>", "<0x41>", " ", "\n", "lighthouse", "7"])).map("".join),
).map(lambda text: text.replace("▁", ""))


def resolve(tokenizer: Tokenizer, shares: list[float | int | str]) -> list[int]:
    """Ids of one tokenizer from the parts that `sequences` draws for any."""
    space = tokenizer.encode("\n")[0]
    assert tokenizer.pieces([space]) == ["▁"]
    return [
        space if share == "▁" else int(share * tokenizer.vocab_size) if isinstance(share, float) else share
        for share in shares
    ]


def byte_pieces(*values: int) -> list[int]:
    return [FIRST_BYTE + value for value in values]


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> str:
    stream = tokenizer.stream(prompt or [])
    return "".join([stream.push(token) for token in ids]) + stream.flush()


def decode_by_sentencepiece(data: bytes, ids: list[int]) -> str:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(data)
    return processor.DecodeIds(ids)


# --- texts and tokens


def test_the_release_encodes_its_example_as_published():
    if "release" not in TOKENIZERS:
        pytest.skip("the release's tokenizer is not here")
    tokenizer = TOKENIZERS["release"]
    tokenizer.check_vocabulary(PRESETS["grok-1"].vocab_size)
    text = "The answer to life the universe and everything is of course"
    ids = [422, 3033, 356, 1180, 333, 9072, 360, 2175, 391, 359, 1805]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.pieces(ids)[:3] == ["▁The", "▁answer", "▁to"]


@both
@given(text=awkward_text)
@example(text="")
@example(text=" ")
@example(text="a\0b\0")
@example(text="\n\n \t\t\tif x:\n        return  1\r\n")
@example(text="👩‍👩‍👧 Zoë e\u0301 \U0010ffff")
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@both
def test_sentencepiece_takes_its_mark_for_a_space(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a▁b")) == "a b"


@both
@pytest.mark.parametrize("name", ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "<s>", "</s>", "<unk>", "<0x41>"])
def test_names_of_pieces_in_a_text_are_plain_characters(tokenizer, name):
    ids = tokenizer.encode(f"{name} a{name}")
    assert not set(ids) & set(ALONE)
    assert tokenizer.decode(ids) == f"{name} a{name}"
    assert tokenizer.token_bytes(tokenizer.encode("<0x41>")[-1]) == b">"


@both
def test_an_empty_text_has_no_tokens_and_no_bos_is_added(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    assert ModelConfig.bos_id not in tokenizer.encode("The")


@both
def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(RequestError, match=r"lone surrogate U\+D83D at character 2"):
        tokenizer.encode("a \ud83d")


@both
@pytest.mark.parametrize("token", [-1, 131072, 2**31, 2**70])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, token):
    sentence = rf"^token id {token} is out of range \(0 to {tokenizer.vocab_size - 1}\)$"
    for use in (tokenizer.decode, tokenizer.pieces, tokenizer.stream):
        with pytest.raises(RequestError, match=sentence):
            use([5, token])
    for use in (tokenizer.token_bytes, tokenizer.stream().push):
        with pytest.raises(RequestError, match=sentence):
            use(token)


@both
def test_numpy_integers_are_tokens_and_fractions_are_not(tokenizer):
    ids = tokenizer.encode("the light")
    assert tokenizer.decode(np.array(ids, np.int32)) == "the light"
    with pytest.raises(TypeError):
        tokenizer.decode([4.5])


@both
def test_token_bytes_are_what_a_token_adds_within_a_text(tokenizer):
    assert [tokenizer.token_bytes(token) for token in ALONE] == [b"", b"[UNK]", b"", b""]
    assert tokenizer.token_bytes(FIRST_BYTE + 0xE2) == b"\xe2"
    assert tokenizer.token_bytes(4) == b"\n"
    assert tokenizer.token_bytes(tokenizer.encode("the")[0]).startswith(b" ")
    before = tokenizer.encode("x")
    for token in range(325, tokenizer.vocab_size, tokenizer.vocab_size // 200):
        assert tokenizer.decode([*before, token]) == "x" + tokenizer.token_bytes(token).decode()


@both
@given(text=awkward_text, share=st.floats(0, 1))
@example(text="ʘ \n 漢\U0001f600", share=0.3)
@example(text=" the", share=0.5)
def test_the_bytes_of_a_text_are_counted_token_by_token(tokenizer, text, share):
    ids = tokenizer.encode(text)
    first = int(share * len(ids))
    assert tokenizer.count_bytes(ids) == len(text.encode())
    assert tokenizer.count_bytes(ids[:first]) + tokenizer.count_bytes(ids, first) == len(text.encode())
    assert tokenizer.count_bytes([ModelConfig.bos_id, *ids, ModelConfig.eos_id], 1) == len(text.encode())


@both
def test_pieces_that_are_no_text_are_counted_as_they_are_decoded(tokenizer):
    assert tokenizer.count_bytes([]) == tokenizer.count_bytes([1, 2, 0]) == 0
    assert tokenizer.count_bytes(byte_pieces(0xE2, 0x82, 0xAC)) == 3
    assert tokenizer.count_bytes(byte_pieces(0xE2, 0x82, 0xAC), 2) == 1
    assert tokenizer.count_bytes(byte_pieces(0xFF)) == 1
    assert tokenizer.count_bytes([3]) == len(b"[UNK]")
    (word,) = tokenizer.encode("the")
    assert [tokenizer.count_bytes(ids, 1) for ids in ([1, word], [3, word], [word, word])] == [3, 4, 4]


def test_a_space_is_counted_if_the_tokenizer_adds_none():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["one river and two rivers"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=275,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = Tokenizer.from_bytes(model.getvalue(), "no prefix")
    for text in ("river", " river", "  é river"):
        assert tokenizer.count_bytes(tokenizer.encode(text)) == len(text.encode())


# --- streams


@both
@given(shares=sequences)
@example(shares=[*byte_pieces(0xE2, 0x82, 0xAC)])
@example(shares=["▁", 1, "▁", 0.5])
@example(shares=[1, 2, "▁"])
@example(shares=[3, "▁"])
def test_a_stream_shows_what_decoding_at_once_shows(tokenizer, shares):
    ids = resolve(tokenizer, shares)
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@given(text=st.text(min_size=1).map(lambda text: text.replace("▁", "")))
def test_a_stream_never_shows_half_a_character(text):
    tokenizer = TOKENIZERS["small"]
    stream = tokenizer.stream()
    shown = ""
    for token in byte_pieces(*text.encode()):
        shown += stream.push(token)
        assert text.startswith(shown)  # a whole character at its last byte, and no U+FFFD for its first
    assert shown == text
    assert stream.flush() == ""


@both
@given(prompt=sequences, shares=sequences)
@example(prompt=[], shares=["▁"])
@example(prompt=[1], shares=["▁"])
@example(prompt=["▁"], shares=["▁", "▁"])
def test_a_stream_continues_its_prompt(tokenizer, prompt, shares):
    # A control piece ends any character that the prompt began, and shows nothing itself.
    before, after = resolve(tokenizer, [*prompt, ModelConfig.bos_id]), resolve(tokenizer, shares)
    assert tokenizer.decode(before) + streamed(tokenizer, after, before) == tokenizer.decode(before + after)


@both
def test_a_continuation_keeps_its_leading_space(tokenizer):
    prompt, word = tokenizer.encode("The"), tokenizer.encode("light")
    assert streamed(tokenizer, word) == "light"
    assert streamed(tokenizer, word, prompt) == " light"


@both
@pytest.mark.parametrize(
    ("prompt", "after", "shown"),
    [
        ([0xE2, 0x82], [0xAC, 0x41], "€A"),  # the character that the prompt began, whole
        ([0xE2, 0x82], [0x41], "A"),  # never completed: the prompt's text shows U+FFFD for its bytes
        ([0xE2, 0x82], [], ""),
        ([0xF0, 0x9F], [0x98], "\ufffd"),  # only the continuation's own byte
        ([0xF0, 0x9F], [0x98, 0x41, 0xC3], "\ufffdA\ufffd"),
        ([0xE2, 0x82], [0xC3, 0xA9], "é"),
    ],
)
def test_a_stream_completes_a_character_that_its_prompt_began(tokenizer, prompt, after, shown):
    assert streamed(tokenizer, byte_pieces(*after), byte_pieces(*prompt)) == shown


@given(prompt=st.lists(awkward_bytes, max_size=5), after=st.lists(awkward_bytes, max_size=5))
def test_a_stream_after_a_broken_prompt_repeats_none_of_it(prompt, after):
    tokenizer = TOKENIZERS["small"]
    before, rest = byte_pieces(*prompt), byte_pieces(*after)
    shown, whole = streamed(tokenizer, rest, before), tokenizer.decode(before + rest)
    prompt_text = tokenizer.decode(before)
    # Where the prompt's last bytes became a character, it stands in place of their up to three U+FFFD.
    assert whole in [prompt_text + shown] + [
        prompt_text[:-n] + shown for n in (1, 2, 3) if prompt_text.endswith("\ufffd" * n)
    ]


@both
def test_flush_ends_what_waits_and_the_stream_can_go_on(tokenizer):
    stream = tokenizer.stream()
    assert [stream.push(token) for token in byte_pieces(0xF0, 0x9F)] == ["", ""]
    assert stream.flush() == "\ufffd\ufffd"
    assert stream.flush() == ""
    assert [stream.push(token) for token in byte_pieces(0x98, 0x41)] == ["\ufffd", "A"]


# --- files


def test_read_gives_the_tokenizer_of_the_file(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(SMALL_BYTES)
    tokenizer = Tokenizer.read(path)
    assert (tokenizer.vocab_size, tokenizer.source) == (1024, str(path))
    ids = tokenizer.encode("A lighthouse keeper")
    assert tokenizer.decode(ids) == decode_by_sentencepiece(SMALL_BYTES, ids) == "A lighthouse keeper"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is empty"),
        (b"no model at all\n", r"\(16 bytes\) is not a valid SentencePiece model"),
        (bytes(1000), r"\(1000 bytes\) is not a valid SentencePiece model"),
        (b"\x80\x04\x95" + bytes(range(256)), r"\(259 bytes\) is not a valid SentencePiece model"),
        (SMALL_BYTES[: len(SMALL_BYTES) // 2], "is not a valid SentencePiece model"),
        (SMALL_BYTES.replace("▁light".encode(), b"\xff\x96\x81light"), "not a valid SentencePiece model"),
        (SMALL_BYTES.replace(b"<0x1E>", b"\xff0x1E>"), "not a valid SentencePiece model"),
    ],
    ids=["empty", "text", "zeros", "pickle", "cut", "piece not UTF-8", "byte piece not UTF-8"],
)
def test_files_that_are_no_tokenizer_are_refused_in_one_sentence(tmp_path, capfd, content, found):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    assert content != SMALL_BYTES
    with pytest.raises(TokenizerError, match=found) as error:
        Tokenizer.read(path)
    assert str(error.value).startswith(str(path))
    assert "--tokenizer FILE or $GROK1_TOKENIZER" in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_paths_that_cannot_be_read_are_refused_in_one_sentence(tmp_path):
    for path, found in [
        (tmp_path / "absent", "absent does not exist"),
        (tmp_path, "Is a directory"),
        (tmp_path / "nul\0", "null"),
        (tmp_path / ("x" * 300), "too long"),
    ]:
        with pytest.raises(TokenizerError, match=found) as error:
            Tokenizer.read(path)
        assert "--tokenizer FILE" in str(error.value)


def test_a_file_too_large_for_a_tokenizer_is_refused_unread(tmp_path):
    path = tmp_path / "tensor00000_000"
    with path.open("wb") as file:
        file.truncate(300 << 20)  # takes no room on the disk
    with pytest.raises(TokenizerError, match="larger than 64 MiB"):
        Tokenizer.read(path)


def test_a_tokenizer_of_another_vocabulary_is_refused():
    tokenizer = TOKENIZERS["small"]
    tokenizer.check_vocabulary(1024)
    with pytest.raises(TokenizerError, match=r"small has 1024 pieces, expected 131072 .*--tokenizer FILE"):
        tokenizer.check_vocabulary(131072)


def test_a_tokenizer_with_other_special_ids_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["one river and two rivers"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=275,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = Tokenizer.from_bytes(model.getvalue(), "llama.model")
    with pytest.raises(TokenizerError, match=r"llama\.model .* at ids -1, 1, 2, 0, expected 0, 1, 2, 3"):
        tokenizer.check_vocabulary(tokenizer.vocab_size)


# --- small tokenizers


@pytest.mark.parametrize("size", [SMALLEST, 401, 512, 767, 1349, 1350, 2048, 8192, 16384, LARGEST])
def test_small_tokenizers_have_exactly_the_size_asked_for(size):
    tokenizer = Tokenizer.from_bytes(train_small_tokenizer(size), "small")
    tokenizer.check_vocabulary(size)
    assert tokenizer.pieces([0, 1, 2, 3, FIRST_BYTE, 324]) == ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "<0x00>", "<0xFF>"]
    text = "The river, 42 灯 \U0001f6a2\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("size", [-1, 0, SMALLEST - 1, LARGEST + 1])
def test_sizes_out_of_reach_are_refused_with_those_in_reach(size):
    with pytest.raises(TokenizerError, match=f"{size} pieces, expected {SMALLEST} to {LARGEST}"):
        train_small_tokenizer(size)


def test_the_small_tokenizer_has_the_release_s_ids_up_to_the_first_merge():
    if "release" not in TOKENIZERS:
        pytest.skip("the release's tokenizer is not here")
    ids = range(FIRST_BYTE + 256)
    assert TOKENIZERS["small"].pieces(ids) == TOKENIZERS["release"].pieces(ids)


def test_training_is_quiet_and_gives_the_same_bytes_in_every_process(tmp_path):
    code = (
        "import hashlib; from grok1.text.train_tokenizer import train_small_tokenizer as train;"
        "print(hashlib.sha256(train(1024)).hexdigest())"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "17"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.split() == [hashlib.sha256(SMALL_BYTES).hexdigest()]
    assert done.stderr == ""
    assert train_small_tokenizer(1024) == SMALL_BYTES


def test_the_small_tokenizer_has_words_of_its_text_and_reads_rare_letters_by_bytes():
    tokenizer = TOKENIZERS["small"]
    assert tokenizer.pieces(tokenizer.encode("the river")) == ["▁the", "▁river"]
    assert tokenizer.pieces(tokenizer.encode("ʘ"))[1:] == ["<0xCA>", "<0x98>"]


def test_importing_the_package_does_not_import_sentencepiece():
    code = "import sys, grok1; sys.exit('sentencepiece' in sys.modules)"
    root = str(Path(__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
