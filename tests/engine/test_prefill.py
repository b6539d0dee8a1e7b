"""Prefill of prompts of every length, in chunks of a few fixed lengths."""

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
    """float64 logits at every position; those of a prefix are the same."""
    return make_reference(long_folder)(tokens)[0]


def test_logits_of_a_full_context(long_folder, tokens, whole, make_engine, relative_error):
    found = Model(make_engine(long_folder), None).logits(tokens)
    assert found.shape == (1100, 64)
    assert found.dtype == np.float32
    errors = [relative_error(*pair) for pair in zip(found, whole, strict=True)]
    assert max(errors) < 5e-5


def prefill(engine, state, slot, tokens, lanes=1):
    """Process a prompt in as few steps as possible; return the batch and the 20 most likely first tokens."""
    size = engine.max_chunk if lanes == 1 else LANE_TOKENS
    ending = SamplingOptions(temperature=0), 0
    chunks = [
        PrefillChunk(slot, tokens[start : start + size], start, ending if start + size >= len(tokens) else None)
        for start in range(0, len(tokens), size)
    ]
    for start in range(0, len(chunks), lanes):
        state, first, rows = engine.prefill(state, chunks[start : start + lanes], lanes, logprobs=True)
    return state, jax.tree.map(lambda array: np.asarray(array)[rows[-1]], first)


def check(first, logits):
    """Check first tokens and their log-probabilities against float64 logits."""
    exact = logits - np.log(np.sum(np.exp(logits)))
    assert first.tokens == np.argmax(exact)
    np.testing.assert_allclose(first.logprobs, exact.max(), atol=5e-4)
    np.testing.assert_allclose(first.top_logprobs, np.sort(exact)[:-21:-1], atol=5e-4)


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("length", LENGTHS)
def test_first_tokens_match_float64(length, lanes, long_folder, tokens, whole, make_engine):
    engine = make_engine(long_folder)
    _, first = prefill(engine, engine.new_batch(2), 1, tokens[:length], lanes)
    check(first, whole[length - 1])


def test_chunks_of_several_prompts_in_one_step(long_folder, tokens, whole, make_engine):
    engine = make_engine(long_folder)
    ending = SamplingOptions(temperature=0), 0
    chunks = [
        PrefillChunk(2, tokens[:16], 0, None),
        PrefillChunk(0, tokens[:5], 0, ending),
        PrefillChunk(2, tokens[16:32], 16, None),  # continues the first chunk, after one of another prompt
        PrefillChunk(2, tokens[32:39], 32, ending),
        PrefillChunk(1, tokens[:16], 0, ending),
    ]
    _, first, rows = engine.prefill(engine.new_batch(3), chunks, 8, logprobs=True)
    for chunk, row in zip(chunks, rows, strict=True):
        if chunk.sampling:
            end = chunk.start + len(chunk.tokens)
            check(jax.tree.map(lambda array, row=row: np.asarray(array)[row], first), whole[end - 1])


def test_a_copied_prefix_equals_a_processed_one(long_folder, tokens, whole, make_engine):
    engine = make_engine(long_folder)
    for shared in (16, 256, 272, 1024):
        state, _ = prefill(engine, engine.new_batch(3), 2, tokens[: shared + 1])
        state = engine.copy_prefix(state, 2, 0, shared)
        chunks = [PrefillChunk(0, tokens[shared : shared + 20], shared, (SamplingOptions(temperature=0), 0))]
        _, first, [row] = engine.prefill(state, chunks, logprobs=True)
        check(jax.tree.map(lambda array, row=row: np.asarray(array)[row], first), whole[shared + 19])


def test_only_a_few_lengths_are_compiled(long_folder, make_engine):
    engine = make_engine(long_folder)
    lengths = {engine.chunk_bucket(count) for count in range(1, engine.max_chunk + 1)}
    assert len(lengths) <= 6
    assert all(count <= engine.chunk_bucket(count) <= max(16, 2 * count) for count in range(1, 513))


def test_each_data_row_processes_its_own_prompts(make_checkpoint, small_config, make_engine, make_reference):
    folder = make_checkpoint(small_config)
    engine = make_engine(folder, (2, 2))
    prompts = {1: [5, 6, 7], 2: [9, 8, 7, 6, 5], 3: [11]}
    ending = SamplingOptions(temperature=0), 0
    chunks = [PrefillChunk(slot, np.asarray(prompt), 0, ending) for slot, prompt in prompts.items()]
    _, first, rows = engine.prefill(engine.new_batch(4), chunks, 2, logprobs=True)
    for chunk, row in zip(chunks, rows, strict=True):
        logits = make_reference(folder)(chunk.tokens)[0][-1]
        check(jax.tree.map(lambda array, row=row: np.asarray(array)[row], first), logits)


def test_chunks_that_do_not_fit_in_a_step_are_rejected(long_folder, tokens, make_engine):
    engine = make_engine(long_folder)
    with pytest.raises(ValueError, match="2 chunks"):
        engine.prefill(engine.new_batch(2), [PrefillChunk(i, tokens[:3], 0, None) for i in range(2)])
    with pytest.raises(ValueError, match="17 tokens"):
        engine.prefill(engine.new_batch(2), [PrefillChunk(0, tokens[:17], 0, None)], lanes=2)
