"""Prompts of every length, read in chunks of a few fixed lengths."""

import jax
import numpy as np
import pytest

from grok1.engine.chunks import LANE_TOKENS, PrefillChunk
from grok1.model import Model
from grok1.request import SamplingOptions

LENGTHS = [1, 2, 15, 16, 17, 32, 33, 100, 255, 256, 257, 511, 512, 513, 1024, 1040, 1099]


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 64, 1100)


@pytest.fixture(scope="module")
def whole(long_folder, tokens, make_reference):
    """float64 logits at every place, which are those of every beginning too."""
    return make_reference(long_folder)(tokens)[0]


def test_logits_of_a_full_context(long_folder, tokens, whole, make_engine, relative_error):
    found = Model(make_engine(long_folder), None).logits(tokens)
    assert found.shape == (1100, 64)
    assert found.dtype == np.float32
    errors = [relative_error(*pair) for pair in zip(found, whole, strict=True)]
    assert max(errors) < 5e-5


def read_prompt(engine, state, slot, tokens, lanes=1):
    """Reads a prompt in as few steps as it takes; the batch and the 20 likeliest first tokens."""
    size = engine.max_chunk if lanes == 1 else LANE_TOKENS
    ending = SamplingOptions(temperature=0), 0
    parts = [
        PrefillChunk(slot, tokens[start : start + size], start, ending if start + size >= len(tokens) else None)
        for start in range(0, len(tokens), size)
    ]
    for start in range(0, len(parts), lanes):
        state, first, places = engine.prefill(state, parts[start : start + lanes], lanes, logprobs=True)
    return state, jax.tree.map(lambda array: np.asarray(array)[places[-1]], first)


def check(first, logits):
    """That first tokens with their log-probabilities are those of float64 logits."""
    exact = logits - np.log(np.sum(np.exp(logits)))
    assert first.tokens == np.argmax(exact)
    np.testing.assert_allclose(first.logprobs, exact.max(), atol=5e-4)
    np.testing.assert_allclose(first.top_logprobs, np.sort(exact)[:-21:-1], atol=5e-4)


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_is_read_to_its_last_token(length, lanes, long_folder, tokens, whole, make_engine):
    engine = make_engine(long_folder)
    _, first = read_prompt(engine, engine.new_batch(2), 1, tokens[:length], lanes)
    check(first, whole[length - 1])


def test_parts_of_several_prompts_in_one_step(long_folder, tokens, whole, make_engine):
    engine = make_engine(long_folder)
    ending = SamplingOptions(temperature=0), 0
    parts = [
        PrefillChunk(2, tokens[:16], 0, None),
        PrefillChunk(0, tokens[:5], 0, ending),
        PrefillChunk(2, tokens[16:32], 16, None),  # of one prompt, another between them
        PrefillChunk(2, tokens[32:39], 32, ending),
        PrefillChunk(1, tokens[:16], 0, ending),
    ]
    _, first, places = engine.prefill(engine.new_batch(3), parts, 8, logprobs=True)
    for part, place in zip(parts, places, strict=True):
        if part.sampling:
            end = part.start + len(part.tokens)
            check(jax.tree.map(lambda array, place=place: np.asarray(array)[place], first), whole[end - 1])


def test_a_copied_beginning_is_as_good_as_one_read(long_folder, tokens, whole, make_engine):
    engine = make_engine(long_folder)
    for shared in (16, 256, 272, 1024):
        state, _ = read_prompt(engine, engine.new_batch(3), 2, tokens[: shared + 1])
        state = engine.copy_prefix(state, 2, 0, shared)
        parts = [PrefillChunk(0, tokens[shared : shared + 20], shared, (SamplingOptions(temperature=0), 0))]
        _, first, [place] = engine.prefill(state, parts, logprobs=True)
        check(jax.tree.map(lambda array, place=place: np.asarray(array)[place], first), whole[shared + 19])


def test_only_a_few_lengths_are_compiled(long_folder, make_engine):
    engine = make_engine(long_folder)
    lengths = {engine.chunk_bucket(count) for count in range(1, engine.max_chunk + 1)}
    assert len(lengths) <= 6
    assert all(count <= engine.chunk_bucket(count) <= max(16, 2 * count) for count in range(1, 513))


def test_data_rows_read_prompts_of_their_own(make_checkpoint, small_config, make_engine, make_reference):
    folder = make_checkpoint(small_config)
    engine = make_engine(folder, (2, 2))
    prompts = {1: [5, 6, 7], 2: [9, 8, 7, 6, 5], 3: [11]}
    ending = SamplingOptions(temperature=0), 0
    parts = [PrefillChunk(slot, np.asarray(prompt), 0, ending) for slot, prompt in prompts.items()]
    _, first, places = engine.prefill(engine.new_batch(4), parts, 2, logprobs=True)
    for part, place in zip(parts, places, strict=True):
        logits = make_reference(folder)(part.tokens)[0][-1]
        check(jax.tree.map(lambda array, place=place: np.asarray(array)[place], first), logits)


def test_parts_that_do_not_fit_a_step_are_refused(long_folder, tokens, make_engine):
    engine = make_engine(long_folder)
    with pytest.raises(ValueError, match="2 chunks"):
        engine.prefill(engine.new_batch(2), [PrefillChunk(i, tokens[:3], 0, None) for i in range(2)])
    with pytest.raises(ValueError, match="17 tokens"):
        engine.prefill(engine.new_batch(2), [PrefillChunk(0, tokens[:17], 0, None)], lanes=2)
