import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from grok1.ops.sampling import filter_logits

jitted = jax.jit(filter_logits)
VOCAB = 24


def kept(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Return the tokens of one row that the filters keep, and check that their logits are unchanged."""
    logits = np.asarray(logits, np.float32)[None]
    options = (np.asarray([top_k], np.int32), np.asarray([top_p], np.float32), np.asarray([min_p], np.float32))
    filtered = np.asarray(jitted(logits, *options))[0]
    stays = filtered > -np.inf
    np.testing.assert_array_equal(filtered[stays], logits[0][stays])
    return set(np.flatnonzero(stays).tolist())


def expected(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Compute `kept` in float64, one filter after the other; None if rounding could change the result."""
    logits = np.asarray(logits, np.float64)
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k:
        ranked = ranked[:top_k]
    masses = np.exp(logits[ranked] - logits[ranked[0]])
    masses /= masses.sum()
    if top_p < 1:
        sums = np.cumsum(masses)
        if np.min(np.abs(sums - top_p)) < 1e-5:
            return None
        ranked = ranked[: int(np.argmax(sums >= top_p)) + 1]
    if min_p and np.min(np.abs(masses - min_p * masses[0])) < 1e-6 * masses[0]:
        return None
    return {token for token, mass in zip(ranked, masses, strict=False) if mass >= min_p * masses[0]}


# Multiples of 1/2, so that many logits are equal.
some_logits = st.lists(st.integers(-12, 12).map(lambda n: n / 2), min_size=VOCAB, max_size=VOCAB)
shares = st.floats(0.01, 0.99)


@settings(max_examples=150, deadline=None)
@given(some_logits, shares)
def test_top_p_keeps_the_smallest_set_with_probability_p(logits, top_p):
    tokens = expected(logits, top_p=top_p)
    assume(tokens is not None)
    assert kept(logits, top_p=top_p) == tokens


@settings(max_examples=50, deadline=None)
@given(some_logits, st.integers(1, VOCAB + 5))
def test_top_k_keeps_the_first_k_most_likely_tokens(logits, top_k):
    assert kept(logits, top_k=top_k) == expected(logits, top_k=top_k)


@settings(max_examples=50, deadline=None)
@given(some_logits, shares)
def test_min_p_is_relative_to_the_most_likely_token(logits, min_p):
    tokens = expected(logits, min_p=min_p)
    assume(tokens is not None)
    assert kept(logits, min_p=min_p) == tokens


@settings(max_examples=150, deadline=None)
@given(some_logits, st.integers(0, VOCAB), shares, st.just(0.0) | shares)
def test_filters_apply_in_order(logits, top_k, top_p, min_p):
    tokens = expected(logits, top_k, top_p, min_p)
    assume(tokens is not None)
    assert kept(logits, top_k, top_p, min_p) == tokens


def test_disabled_filters_keep_everything():
    logits = [-1e4, 5.0, *[0.0] * (VOCAB - 2)]
    assert kept(logits) == set(range(VOCAB))
    assert kept(logits, top_k=VOCAB) == set(range(VOCAB))


def test_a_probability_of_exactly_p_is_enough():
    logits = [0.0] * 16 + [-1e4] * (VOCAB - 16)  # probabilities of 1/16, exact in float32
    assert kept(logits, top_p=0.5) == set(range(8))
    assert kept(logits, top_p=0.25) == set(range(4))


def test_the_most_likely_token_is_always_kept():
    logits = np.linspace(0, 1, VOCAB)
    assert kept(logits, top_p=1e-6) == {VOCAB - 1}
    assert kept(logits, top_p=1e-50) == {VOCAB - 1}  # 0 in float32
    assert kept(logits, min_p=1.0) == {VOCAB - 1}
    assert kept([2.0] * VOCAB, min_p=1.0) == set(range(VOCAB))  # all are equally likely


def test_each_row_has_its_own_options():
    logits = np.asarray(jax.random.normal(jax.random.key(0), (4, VOCAB)))
    options = [(3, 1.0, 0.0), (0, 0.4, 0.0), (0, 1.0, 0.3), (0, 1.0, 0.0)]
    top_k, top_p, min_p = (np.asarray(column, np.float32) for column in zip(*options, strict=True))
    together = np.asarray(jitted(logits, top_k.astype(np.int32), top_p, min_p))
    for row, option in enumerate(options):
        assert set(np.flatnonzero(together[row] > -np.inf).tolist()) == expected(logits[row], *option)


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_top_p_over_the_releases_vocabulary(spread):
    """The float32 sum of 131072 probabilities is accurate enough for top-p."""
    logits = spread * np.random.default_rng(0).standard_normal(131072).astype(np.float32)
    tokens = kept(logits, top_p=0.95)
    masses = np.sort(np.exp(logits.astype(np.float64)))[::-1]
    sums = np.cumsum(masses) / masses.sum()
    assert abs(sums[len(tokens) - 1] - 0.95) < 2e-5
