"""Continuous batching: results do not depend on the other sequences of the batch."""

import itertools

import numpy as np
import pytest
from letters import Letters

from grok1.config import ModelConfig
from grok1.model import Model, Request
from grok1.request import SamplingOptions

PROMPTS = [
    [int(token) for token in np.random.default_rng(i).integers(3, 64, length)]
    for i, length in enumerate([1, 5, 16, 17, 2, 30, 9])
]
LIMITS = [9, 1, 4, 12, 7, 3, 6]


def requests(**options):
    """Return a request for each prompt, each with a different limit and seed."""
    return [
        Request(prompt=prompt, options=SamplingOptions(max_tokens=limit, ignore_eos=True, seed=70 + i, **options))
        for i, (prompt, limit) in enumerate(zip(PROMPTS, LIMITS, strict=True))
    ]


def tokens_by_request(completions):
    ended = list(completions)
    assert sorted(done.request_index for done in ended) == list(range(len(ended)))
    return [done.tokens for done in sorted(ended, key=lambda done: done.request_index)]


@pytest.fixture(scope="module")
def float64_greedy(make_checkpoint, make_reference, small_config):
    """Greedy completions by the float64 reference, with a full forward pass for each token."""
    forward = make_reference(make_checkpoint(small_config))
    continuations = []
    for prompt, limit in zip(PROMPTS, LIMITS, strict=True):
        tokens = list(prompt)
        for _ in range(limit):
            tokens.append(int(np.argmax(forward(tokens)[0][-1])))
        continuations.append(tokens[len(prompt) :])
    return continuations


@pytest.mark.parametrize(("mesh", "slots"), [((1, 1), 1), ((1, 1), 3), ((1, 1), 8), ((2, 2), 3)])
def test_greedy_tokens_match_float64(mesh, slots, small_model, float64_greedy):
    model = small_model(mesh)
    found = tokens_by_request(model.complete_many(requests(temperature=0), batch_size=slots))
    assert found == float64_greedy


def test_sampled_results_do_not_depend_on_the_batch(small_model):
    alone = tokens_by_request(small_model().complete_many(requests(temperature=1.5), batch_size=1))
    assert alone != tokens_by_request(small_model().complete_many(requests(temperature=0), batch_size=1))
    for mesh, slots in [((1, 1), 3), ((1, 1), 8), ((2, 2), 3)]:
        found = small_model(mesh).complete_many(requests(temperature=1.5), batch_size=slots)
        assert tokens_by_request(found) == alone


def test_options_apply_to_their_own_sequence_only(small_model, float64_greedy):
    mixed = [
        Request(
            prompt=prompt,
            options=SamplingOptions(
                max_tokens=limit, ignore_eos=True, temperature=2.0 * (i % 2), logprobs=3 if i % 3 == 0 else None, seed=i
            ),
        )
        for i, (prompt, limit) in enumerate(zip(PROMPTS, LIMITS, strict=True))
    ]
    done = sorted(small_model().complete_many(mixed, batch_size=3), key=lambda done: done.request_index)
    for i in range(0, len(PROMPTS), 2):
        assert done[i].tokens == float64_greedy[i]
    for i, completion in enumerate(done):
        if i % 3:
            assert completion.logprobs is None
        else:
            assert [len(entry.top) for entry in completion.logprobs] == [3] * len(completion.tokens)


def test_samples_have_consecutive_seeds(small_model):
    options = SamplingOptions(max_tokens=6, temperature=1.5, seed=2**32 - 2, ignore_eos=True)
    request = Request(prompt=PROMPTS[1], options=options, num_samples=5)
    samples = sorted(small_model().complete_many([request], batch_size=3), key=lambda done: done.sample)
    assert [done.sample for done in samples] == list(range(5))
    assert [done.seed for done in samples] == [2**32 - 2 + i for i in range(5)]
    for done in samples:
        again = small_model().complete(PROMPTS[1], max_tokens=6, temperature=1.5, seed=done.seed, ignore_eos=True)
        assert again.tokens == done.tokens
    assert len({tuple(done.tokens) for done in samples}) == 5


def test_more_requests_than_slots_of_one_token_each(small_model):
    many = [
        Request(prompt=[3 + i], options=SamplingOptions(max_tokens=1, temperature=0, ignore_eos=True))
        for i in range(11)
    ]
    done = list(small_model().complete_many(many, batch_size=3))
    assert sorted(completion.request_index for completion in done) == list(range(11))
    assert all(len(completion.tokens) == 1 for completion in done)
    assert {completion.finish_reason for completion in done} == {"max_tokens"}


def test_no_requests_give_no_completions(small_model):
    assert list(small_model().complete_many([])) == []


def test_requests_are_consumed_when_a_slot_is_free(small_model):
    taken = itertools.count()

    def endless():
        while True:
            next(taken)
            yield Request(prompt=[7], options=SamplingOptions(max_tokens=2, temperature=0, ignore_eos=True))

    completions = small_model().complete_many(endless(), batch_size=3)
    assert len(list(itertools.islice(completions, 5))) == 5
    completions.close()
    assert next(taken) <= 5 + 3


def test_a_failing_iterable_leaves_the_model_usable(small_model, float64_greedy):
    def failing():
        yield Request(prompt=[7], options=SamplingOptions(max_tokens=30, ignore_eos=True))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(small_model().complete_many(failing(), batch_size=3))
    found = tokens_by_request(small_model().complete_many(requests(temperature=0), batch_size=3))
    assert found == float64_greedy


def test_the_end_of_text_token_ends_a_sequence(small_model, float64_greedy, monkeypatch):
    prompt, tokens = PROMPTS[3], float64_greedy[3]
    for eos in dict.fromkeys(tokens):
        monkeypatch.setattr(ModelConfig, "eos_id", eos)
        done = small_model().complete(prompt, max_tokens=12, greedy=True)
        assert done.tokens == tokens[: tokens.index(eos)]
        assert done.finish_reason == "eos"
        ignored = small_model().complete(prompt, max_tokens=12, greedy=True, ignore_eos=True)
        assert ignored.tokens == tokens
        assert ignored.finish_reason == "max_tokens"


def test_slots_of_finished_sequences_are_reused(small_model, float64_greedy, monkeypatch):
    """Sequences reach the end of text in different steps, when their next step is already dispatched."""
    monkeypatch.setattr(ModelConfig, "eos_id", float64_greedy[3][2])
    wanted = [
        Request(prompt=prompt, options=SamplingOptions(max_tokens=limit, temperature=0))
        for prompt, limit in zip(PROMPTS, LIMITS, strict=True)
    ]
    found = tokens_by_request(small_model().complete_many(wanted * 3, batch_size=3))
    cut = [list(itertools.takewhile(lambda t: t != ModelConfig.eos_id, tokens)) for tokens in float64_greedy]
    assert found == cut * 3
    assert cut != float64_greedy


def test_sequences_end_at_the_end_of_the_context(small_model, small_config):
    room = 5
    prompt = [int(token) for token in np.random.default_rng(0).integers(3, 64, small_config.sequence_len - room)]
    options = SamplingOptions(max_tokens=100, ignore_eos=True, temperature=0, logprobs=0)
    [done] = small_model().complete_many([Request(prompt=prompt, options=options)], batch_size=3)
    assert (len(done.tokens), done.finish_reason) == (room, "context")
    exact = small_model().complete(prompt, max_tokens=room, ignore_eos=True, greedy=True)
    assert (exact.tokens, exact.finish_reason) == (done.tokens, "max_tokens")
    score = small_model().score(prompt + done.tokens)  # the last position is computed correctly
    np.testing.assert_allclose(
        [entry.logprob for entry in done.logprobs],
        [entry.logprob for entry in score.logprobs[-room:]],
        atol=1e-4,
    )


def test_data_rows_reach_the_end_of_the_context(small_model, small_config):
    prompt = [int(token) for token in np.random.default_rng(1).integers(3, 64, small_config.sequence_len - 1)]
    options = SamplingOptions(max_tokens=3, temperature=0, ignore_eos=True)
    done = list(small_model((2, 2)).complete_many([Request(prompt=prompt, options=options)] * 3, batch_size=3))
    best = int(np.argmax(small_model().logits(prompt)[-1]))
    assert [(c.tokens, c.finish_reason) for c in done] == [([best], "context")] * 3


def test_an_abandoned_completion_leaves_the_model_usable(small_model, float64_greedy):
    model = Model(small_model().engine, Letters())
    stream = model.stream(PROMPTS[0], max_tokens=9, greedy=True, ignore_eos=True)
    assert next(stream) == chr(float64_greedy[0][0] + 48)
    completions = model.complete_many(requests(temperature=0), batch_size=3)
    next(completions)
    assert model.complete(PROMPTS[3], max_tokens=12, greedy=True, ignore_eos=True).tokens == float64_greedy[3]
    # The two interrupted iterators resume.
    assert "".join(stream) == "".join(chr(token + 48) for token in float64_greedy[0][1:])
    assert len(list(completions)) == len(PROMPTS) - 1
