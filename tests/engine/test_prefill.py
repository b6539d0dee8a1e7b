"""Prompts of every length, read in chunks of a few fixed lengths."""

import dataclasses

import numpy as np
import pytest

from grok1.model import Model

LENGTHS = [1, 2, 15, 16, 17, 32, 33, 100, 255, 256, 257, 511, 512, 513, 1024, 1040, 1099]


@pytest.fixture(scope="module")
def long_folder(make_checkpoint, small_config):
    """A context longer than two chunks; all experts are selected, so that no rounding changes which."""
    return make_checkpoint(dataclasses.replace(small_config, sequence_len=1100, num_experts=2))


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


@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_is_read_to_its_last_token(length, long_folder, tokens, whole, make_engine, relative_error):
    engine = make_engine(long_folder)
    prompt = engine.prefill(tokens[:length])
    assert prompt.length == length
    assert relative_error(prompt.logits[0], whole[length - 1]) < 5e-5


def test_only_a_few_lengths_are_compiled(long_folder, make_engine):
    engine = make_engine(long_folder)
    lengths = {engine.chunk_length(count) for count in range(1, engine.max_chunk + 1)}
    assert len(lengths) <= 7
    assert all(count <= engine.chunk_length(count) <= max(16, 2 * count) for count in range(1, 513))


def test_scores_are_the_log_probabilities_of_the_given_tokens(long_folder, tokens, whole, make_engine):
    scored = make_engine(long_folder).score(tokens[:600])
    exact = whole[:599] - np.log(np.sum(np.exp(whole[:599]), axis=1, keepdims=True))
    np.testing.assert_array_equal(scored.tokens, tokens[1:600])
    np.testing.assert_allclose(scored.logprobs, exact[np.arange(599), tokens[1:600]], atol=5e-4)
    np.testing.assert_allclose(scored.top_logprobs, -np.sort(-exact, axis=1)[:, :20], atol=5e-4)


def test_every_data_row_reads_the_prompt(make_checkpoint, small_config, make_engine, make_reference, relative_error):
    folder = make_checkpoint(small_config)
    prompt = make_engine(folder, (2, 2)).prefill([5, 6, 7])
    expected = make_reference(folder)([5, 6, 7])[0][-1]
    for row in range(2):
        assert relative_error(prompt.logits[row], expected) < 5e-5
