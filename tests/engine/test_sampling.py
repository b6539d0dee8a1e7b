import functools

import jax
import numpy as np
import pytest

from grok1.engine.sampling import SamplingState, sample, token_logprobs
from grok1.request import SamplingOptions

draw = functools.partial(jax.jit, static_argnums=3)(sample)
DRAWS = 20000


def states(options, seeds):
    """Return the sampling state of a sequence for each of the options and seeds."""
    state = SamplingState.empty(len(options))
    for row, (option, seed) in enumerate(zip(options, seeds, strict=True)):
        state.put(row, option, seed)
    return state


def draw_many(logits, options, seeds, positions):
    """Draw a token from the same logits for each of the seeds and positions."""
    logits = np.tile(np.asarray(logits, np.float32), (len(positions), 1))
    return np.asarray(draw(logits, states([options] * len(seeds), seeds), np.asarray(positions, np.int32), 0).tokens)


def distribution(logits, temperature):
    logits = np.asarray(logits, np.float64) / temperature
    masses = np.exp(logits - logits.max())
    return masses / masses.sum()


def assert_drawn_from(tokens, probabilities):
    """Pearson's chi-squared test. Seeds are fixed, so that the outcome is deterministic."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * len(tokens)
    assert expected.min() > 5  # required for the test to be valid
    statistic = np.sum((counts[possible] - expected) ** 2 / expected)
    freedom = possible.sum() - 1
    # Wilson-Hilferty approximation of the 99.9th percentile.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3


LOGITS = [1.0, 0.0, -1.0, 2.0, 0.5, 0.5, -0.5, 1.5]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_samples_follow_the_softmax_at_each_temperature(temperature, over):
    options = SamplingOptions(temperature=temperature, top_p=1)
    rows = range(DRAWS)
    seeds, positions = (rows, [17] * DRAWS) if over == "seeds" else ([5] * DRAWS, rows)
    tokens = draw_many(LOGITS, options, seeds, positions)
    assert_drawn_from(tokens, distribution(LOGITS, temperature))


@pytest.mark.parametrize(
    ("filters", "stays"),
    [
        ({"top_k": 3, "top_p": 1}, [3, 7, 0]),
        ({"top_p": 0.75}, [3, 7, 0, 4]),
        ({"top_p": 1, "min_p": 0.2}, [3, 7, 0, 4, 5]),
        ({"top_k": 5, "top_p": 0.7, "min_p": 0.5}, [3, 7]),
    ],
)
def test_samples_follow_the_filtered_distribution(filters, stays):
    tokens = draw_many(LOGITS, SamplingOptions(temperature=1, **filters), range(DRAWS), [3] * DRAWS)
    left = np.zeros(len(LOGITS))
    left[stays] = distribution(LOGITS, 1)[stays]
    assert_drawn_from(tokens, left / left.sum())


def test_temperature_is_applied_before_filters():
    """The two most likely tokens have more than three quarters of the mass at 0.5, but not at 1."""
    logits = [1.0, 0.5, 0.0, -0.5]
    assert distribution(logits, 1)[:2].sum() < 0.75 < distribution(logits, 0.5)[:2].sum()
    options = SamplingOptions(temperature=0.5, top_p=0.75)
    assert set(draw_many(logits, options, range(1000), [0] * 1000).tolist()) == {0, 1}


def test_tokens_at_successive_positions_are_independent():
    tokens = draw_many([0.0, 0.0, 0.0, 0.0], SamplingOptions(temperature=1, top_p=1), [9] * DRAWS, range(DRAWS))
    assert_drawn_from(tokens[:-1] * 4 + tokens[1:], np.full(16, 1 / 16))


def test_successive_seeds_are_independent():
    tokens = draw_many([0.0, 0.0, 0.0, 0.0], SamplingOptions(temperature=1, top_p=1), range(DRAWS), [9] * DRAWS)
    assert_drawn_from(tokens[:-1] * 4 + tokens[1:], np.full(16, 1 / 16))


def test_temperature_0_selects_the_first_of_the_most_likely_tokens():
    logits = np.asarray([[0.0, 3.0, 3.0, 1.0], [2.0, 1.0, 0.0, 2.0]], np.float32)
    options = [SamplingOptions(temperature=0, top_p=0.5, top_k=3), SamplingOptions(temperature=0)]
    state = states(options, [1, 1])
    assert draw(logits, state, np.asarray([4, 5], np.int32), 0).tokens.tolist() == [1, 0]


def test_a_tiny_temperature_is_greedy():
    assert draw_many(LOGITS, SamplingOptions(temperature=1e-30), range(50), range(50)).tolist() == [3] * 50


def test_a_token_depends_only_on_its_own_seed_position_and_options():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((8, 64)).astype(np.float32)
    options = [
        SamplingOptions(temperature=1, top_p=1),
        SamplingOptions(temperature=0),
        SamplingOptions(temperature=1.3, top_k=20),
        SamplingOptions(temperature=0.9, top_p=0.8),
        SamplingOptions(temperature=2, top_p=1, min_p=0.1),
        SamplingOptions(temperature=1, top_p=1),
        SamplingOptions(temperature=1, top_p=1),
        SamplingOptions(temperature=3, top_p=0.999),
    ]
    rows = [states([option], [100 + i]) for i, option in enumerate(options)]
    positions = np.arange(8, dtype=np.int32) * 7
    together = draw(logits, jax.tree.map(lambda *r: np.concatenate(r), *rows), positions, 0).tokens
    alone = [draw(logits[i : i + 1], rows[i], positions[i : i + 1], 0).tokens[0] for i in range(8)]
    assert together.tolist() == [int(token) for token in alone]
    order = np.asarray([3, 1, 7, 5, 0, 2, 6, 4])
    moved = draw(logits[order], jax.tree.map(lambda *r: np.concatenate(r)[order], *rows), positions[order], 0)
    assert moved.tokens.tolist() == [int(alone[i]) for i in order]


@pytest.mark.parametrize("other", [1, 2**32, 2**40, 2**62 + 7])
def test_every_bit_of_a_seed_matters(other):
    options = SamplingOptions(temperature=1, top_p=1)
    logits, positions = np.zeros(64), range(50)
    first, again = (draw_many(logits, options, [7] * 50, positions).tolist() for _ in range(2))
    assert first == again
    second = draw_many(logits, options, [7 ^ other] * 50, positions)
    # With 64 equally likely tokens, one draw in 64 agrees by chance.
    assert np.sum(second == first) < 8


def test_log_probabilities_use_the_unmodified_logits():
    logits = 3 * np.random.default_rng(1).standard_normal((5, 200)).astype(np.float32)
    state = states([SamplingOptions(temperature=1.7, top_k=50)] * 5, [3] * 5)
    found = jax.device_get(draw(logits, state, np.arange(5, dtype=np.int32), 20))
    wide = logits.astype(np.float64)
    exact = wide - np.log(np.sum(np.exp(wide), axis=1, keepdims=True))
    rows = np.arange(5)
    np.testing.assert_allclose(found.logprobs, exact[rows, found.tokens], atol=1e-5)
    np.testing.assert_array_equal(found.top_tokens, np.argsort(-exact, axis=1)[:, :20])
    np.testing.assert_allclose(found.top_logprobs, -np.sort(-exact, axis=1)[:, :20], atol=1e-5)


def test_equally_likely_tokens_are_reported_in_order_of_id():
    found = token_logprobs(np.zeros((1, 30), np.float32), np.asarray([4]), 20)
    assert found.top_tokens[0].tolist() == list(range(20))
    np.testing.assert_allclose(found.logprobs, -np.log(30), atol=1e-6)
