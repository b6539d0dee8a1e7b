"""Batched scores, compared with the float64 reference."""

import numpy as np
import pytest

from grok1.engine.engine import Engine
from grok1.engine.occupancy import Occupancy
from grok1.engine.score import ScoringRequest, score


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 64, 1101)


@pytest.fixture(scope="module")
def log_probabilities(long_folder, make_reference):
    """Function that returns float64 log-probabilities `[T, vocab]` of the token after each position."""

    def log_probabilities(tokens):
        logits = make_reference(long_folder)(tokens)[0]
        return logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))

    return log_probabilities


def check(sequence, exact, first, ids):
    """Compare the scores of `ids[first:]` with log-probabilities `[T, vocab]`."""
    expected = exact[first - 1 : len(ids) - 1]
    scored = sequence.scored
    np.testing.assert_array_equal(scored.tokens, ids[first:])
    np.testing.assert_allclose(scored.logprobs, expected[np.arange(len(ids) - first), ids[first:]], atol=5e-4)
    best = -np.sort(-expected, axis=1)[:, : scored.top_logprobs.shape[1]]
    np.testing.assert_allclose(scored.top_logprobs, best, atol=5e-4)
    np.testing.assert_array_equal(scored.top_tokens[:, 0], np.argmax(expected, axis=1))


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize(
    ("length", "first"), [(600, 1), (600, 400), (1100, 1099), (1101, 1), (2, 1), (17, 16), (18, 1)]
)
def test_one_text(length, first, lanes, long_folder, tokens, log_probabilities, make_engine):
    ids = tokens[:length]
    request = ScoringRequest(tokens=ids.tolist(), first=first)
    [done] = score(make_engine(long_folder), [request], 1, lanes=lanes, logprobs=True)
    assert done.request is request
    assert done.scored.top_tokens.shape == (length - first, 20)
    check(done, log_probabilities(ids[:1100]), first, ids)


@pytest.mark.parametrize(("mesh", "slots", "lanes"), [((1, 1), 3, 1), ((1, 1), 4, 4), ((2, 2), 4, 3)])
def test_many_texts_with_a_shared_prefix(
    mesh, slots, lanes, long_folder, tokens, log_probabilities, make_engine, monkeypatch
):
    rng = np.random.default_rng(1)
    texts = [np.concatenate([tokens[:150], rng.integers(0, 64, int(rng.integers(1, 40)))]) for _ in range(12)]
    texts += [rng.integers(0, 64, int(rng.integers(2, 90))) for _ in range(6)]
    firsts = [150] * 12 + [1] * 6
    occupancy = Occupancy()
    requests = [ScoringRequest(tokens=ids.tolist(), first=first) for ids, first in zip(texts, firsts, strict=True)]
    done = list(score(make_engine(long_folder, mesh), requests, slots, lanes=lanes, occupancy=occupancy))
    assert sorted(sequence.request_index for sequence in done) == list(range(18))
    for sequence in done:
        ids = texts[sequence.request_index]
        assert sequence.scored.top_tokens.shape[1] == 1
        check(sequence, log_probabilities(ids), firsts[sequence.request_index], ids)
    rows = mesh[0]
    read = sum(len(ids) - 1 for ids in texts)
    assert occupancy.read_tokens + occupancy.copied_tokens == read
    assert occupancy.copied_tokens == (12 - rows) * 144  # 149 tokens need no score, 144 of them in whole lanes


def test_scores_are_bitwise_independent_of_the_batch(long_folder, make_engine):
    rng = np.random.default_rng(2)
    header = rng.integers(0, 64, 50).tolist()
    requests = [
        ScoringRequest(tokens=header + rng.integers(0, 64, int(rng.integers(1, 60))).tolist(), first=50)
        for _ in range(9)
    ]
    together = {done.request_index: done.scored for done in score(make_engine(long_folder), requests, 3, lanes=4)}
    for i, request in enumerate(requests):
        [alone] = score(make_engine(long_folder), [request], 3, lanes=4)
        for found, expected in zip(
            (together[i].logprobs, together[i].top_logprobs),
            (alone.scored.logprobs, alone.scored.top_logprobs),
            strict=True,
        ):
            np.testing.assert_array_equal(found, expected)


def test_the_next_step_is_dispatched_before_scores_are_fetched(long_folder, tokens, make_engine, monkeypatch):
    steps = []
    step = Engine.score
    monkeypatch.setattr(Engine, "score", lambda self, *rest: steps.append(1) or step(self, *rest))
    texts = (ScoringRequest(tokens=tokens[i : i + 9].tolist()) for i in range(5))
    taken = score(make_engine(long_folder), texts, 1)
    for count in range(1, 5):
        assert next(taken).request_index == count - 1
        assert len(steps) == count + 1
    assert next(taken).request_index == 4


def test_invalid_requests_are_rejected(long_folder, make_engine):
    for ids, first in [([1], 1), ([1, 2], 0), ([1, 2], 2), ([1] * 1102, 1)]:
        with pytest.raises(ValueError, match="cannot score"):
            list(score(make_engine(long_folder), [ScoringRequest(tokens=ids, first=first)], 1))
