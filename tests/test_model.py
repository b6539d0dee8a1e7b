"""The Python face: requests, text, stop texts, logits and scores."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from letters import Letters

import grok1
from grok1.errors import RequestError, TokenizerError
from grok1.model import Model, Request
from grok1.request import MAX_SEED, SamplingOptions, TokenLogprobs

PROMPT = "Hello"


@pytest.fixture(scope="module")
def model(small_model):
    return Model(small_model().engine, Letters())


@pytest.fixture(scope="module")
def text(model):
    """What greedily follows the prompt."""
    prompt = [ord(character) - 48 for character in PROMPT]
    for _ in range(20):
        prompt.append(int(np.argmax(model.logits(prompt)[-1])))
    return "".join(chr(token + 48) for token in prompt[len(PROMPT) :])


def complete(model, **options):
    return model.complete(PROMPT, max_tokens=20, greedy=True, ignore_eos=True, **options)


def test_a_completion_tells_what_was_asked_and_what_came(model, text):
    done = complete(model, seed=5)
    assert done.text == text
    assert done.tokens == [ord(character) - 48 for character in text]
    assert done.prompt == PROMPT
    assert done.prompt_tokens == [24, 53, 60, 60, 63]
    assert (done.finish_reason, done.stop_text, done.logprobs) == ("max_tokens", None, None)
    assert (done.seed, done.sample, done.request_index) == (5, 0, 0)
    assert (done.timings.prompt_tokens, done.timings.completion_tokens) == (5, 20)


def test_a_stream_gives_the_text_in_pieces(model, text):
    stream = model.stream(PROMPT, max_tokens=20, greedy=True, ignore_eos=True)
    first = next(stream)
    with pytest.raises(RuntimeError, match="ended"):
        _ = stream.completion
    pieces = [first, *stream]
    assert len(pieces) == 20
    assert "".join(pieces) == text == stream.completion.text


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 2), (3, 1), (4, 3), (17, 3)])
def test_a_stop_text_cuts_the_completion_before_it(start, length, model, text):
    stop = text[start : start + length]
    first = text.index(stop)
    done = complete(model, stop=("~never~", stop))
    assert done.text == text[:first]
    assert (done.finish_reason, done.stop_text) == ("stop", stop)
    assert len(done.tokens) == first + length


def test_a_stop_text_that_does_not_complete_is_text(model, text):
    done = complete(model, stop=(text[-3:] + "~",))
    assert done.text == text
    assert done.finish_reason == "max_tokens"


def test_of_many_samples_each_stops_for_itself(model):
    options = SamplingOptions(max_tokens=12, temperature=2, top_p=1, seed=1, ignore_eos=True)
    free = list(model.complete_many([Request(prompt=PROMPT, options=options, num_samples=6)], batch_size=3))
    stop = max(free, key=lambda done: done.sample).text[4]
    options = SamplingOptions(max_tokens=12, temperature=2, top_p=1, seed=1, ignore_eos=True, stop=(stop,))
    stopped = list(model.complete_many([Request(prompt=PROMPT, options=options, num_samples=6)], batch_size=3))
    expected = {done.seed: done.text.partition(stop)[0] for done in free}
    assert {done.seed: done.text for done in stopped} == expected
    assert {done.finish_reason for done in stopped} >= {"stop"}


def test_a_fresh_seed_is_reported_and_repeats_the_completion(model):
    first = model.complete(PROMPT, max_tokens=10, temperature=2, top_p=1)
    again = model.complete(PROMPT, max_tokens=10, temperature=2, top_p=1, seed=first.seed)
    assert again.tokens == first.tokens
    assert model.complete(PROMPT, max_tokens=1).seed != first.seed
    last = Request(prompt=PROMPT, options=SamplingOptions(max_tokens=2, seed=MAX_SEED), num_samples=2)
    assert len(list(model.complete_many([last]))) == 2


def test_logits_at_every_place(small_model, make_checkpoint, make_reference, small_config, relative_error):
    tokens = np.random.default_rng(0).integers(0, 64, small_config.sequence_len)
    found = small_model().logits(tokens)
    assert found.shape == (small_config.sequence_len, 64)
    expected, margins = make_reference(make_checkpoint(small_config))(tokens)
    assert margins.min() > 1e-6
    assert relative_error(found, expected) < 5e-5


def test_a_score_adds_up(model):
    score = model.score("Hello", top_logprobs=4)
    logits = model.logits(score.tokens).astype(np.float64)
    exact = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    chosen = [exact[i, token] for i, token in enumerate(score.tokens[1:])]
    np.testing.assert_allclose([entry.logprob for entry in score.logprobs], chosen, atol=1e-5)
    assert score.total == pytest.approx(sum(chosen), abs=1e-4)
    assert score.perplexity == pytest.approx(math.exp(-sum(chosen) / 4), rel=1e-4)
    assert score.num_bytes == 4
    assert score.bits_per_byte == pytest.approx(-sum(chosen) / math.log(2) / 4, rel=1e-4)
    for entry, row in zip(score.logprobs, exact, strict=False):
        assert [token for token, _ in entry.top] == np.argsort(-row)[:4].tolist()
        np.testing.assert_allclose([logprob for _, logprob in entry.top], np.sort(row)[:-5:-1], atol=1e-5)


def test_bits_per_byte_need_a_tokenizer_and_bytes(model, small_model):
    score = small_model().score([24, 53, 60])
    assert (score.num_bytes, score.bits_per_byte) == (None, None)
    assert dataclasses.replace(score, num_bytes=0).bits_per_byte is None
    impossible = [TokenLogprobs(-math.inf, ())]
    assert dataclasses.replace(score, logprobs=impossible, num_bytes=3).bits_per_byte == math.inf


def test_a_prompt_may_fill_the_context_but_one_place(model, small_config):
    longest = [7] * (small_config.sequence_len - 1)
    done = model.complete(longest, greedy=True, ignore_eos=True)
    assert (len(done.tokens), done.finish_reason) == (1, "context")
    with pytest.raises(RequestError, match=r"48 tokens.* at most 47 "):
        model.complete([*longest, 7])
    with pytest.raises(RequestError, match=r"48 tokens.* at most 47 "):
        list(model.complete_many([Request(prompt=[*longest, 7])]))


def test_truncation_keeps_the_last_tokens(model, small_config):
    context = small_config.sequence_len
    prompt = [3 + i % 60 for i in range(context + 20)]
    for max_tokens, kept in [(1, context - 1), (10, context - 10), (1000, context // 2)]:
        done = model.complete(prompt, truncate=True, max_tokens=max_tokens, ignore_eos=True)
        assert done.prompt_tokens == prompt[-kept:]
        assert len(done.tokens) == min(max_tokens, context - kept)
    short = model.complete(prompt[:9], truncate=True, max_tokens=1000, ignore_eos=True)
    assert short.prompt_tokens == prompt[:9]


@pytest.mark.parametrize("prompt", ["", [], [64], [-1], [3, 1000]])
def test_prompts_that_cannot_be_served(prompt, model):
    with pytest.raises(RequestError):
        model.stream(prompt)


@pytest.mark.parametrize("call", ["logits", "score"])
@pytest.mark.parametrize("tokens", [[], [64, 2], [1, -1]])
def test_texts_that_cannot_be_read(call, tokens, model):
    with pytest.raises(RequestError):
        getattr(model, call)(tokens)


def test_a_text_longer_than_the_context_is_scored_in_windows(model):
    tokens = [int(token) for token in np.random.default_rng(0).integers(3, 64, 100)]
    with pytest.raises(RequestError):
        model.logits(tokens[:49])
    for stride in (10, 48, None):
        found = [entry.logprob for entry in model.score(tokens, stride=stride).logprobs]
        assert len(found) == 99
        expected, start = [], 0
        while len(expected) < 99:
            window = tokens[start : start + 49]  # the last is not read
            scores = [entry.logprob for entry in model.score(window).logprobs]
            expected += scores[len(expected) - start :]
            start += stride or 24
        assert found == pytest.approx(expected, abs=1e-4)
    for stride in (0, 49):
        with pytest.raises(RequestError, match="stride"):
            model.score(tokens, stride=stride)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"top_k": -1},
        {"min_p": 1.5},
        {"seed": -1},
        {"seed": 2**63},
        {"stop": ("",)},
        {"logprobs": 21},
    ],
)
def test_options_out_of_range_are_named(options, model):
    with pytest.raises(RequestError, match=next(iter(options))):
        model.complete(PROMPT, **options)


@pytest.mark.parametrize("num_samples", [0, -1])
def test_a_request_wants_at_least_one_sample(num_samples, model):
    with pytest.raises(RequestError, match="num_samples"):
        list(model.complete_many([Request(prompt=PROMPT, num_samples=num_samples)]))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_has_at_least_one_place(batch_size, model):
    with pytest.raises(RequestError, match="batch_size"):
        list(model.complete_many([Request(prompt=PROMPT)], batch_size=batch_size))


def test_text_needs_a_tokenizer_and_token_ids_do_not(small_model):
    with pytest.raises(TokenizerError, match="--tokenizer"):
        small_model().complete(PROMPT)
    with pytest.raises(TokenizerError):
        _ = small_model().tokenizer
    with pytest.raises(TokenizerError):
        small_model().complete([5, 6], stop="word")
    done = small_model().complete([5, 6], max_tokens=2, ignore_eos=True)
    assert (len(done.tokens), done.text) == (2, "")


def test_load_takes_a_mesh_and_devices(make_checkpoint, small_config):
    folder = make_checkpoint(small_config)
    model = grok1.load(folder / "ckpt-0", mesh=(2, 4), devices=jax.devices()[8:], dtype="bfloat16")
    assert model.mesh_shape == (2, 4)
    assert model.config == small_config
    assert set(model.engine.mesh.devices.flat) == set(jax.devices()[8:])
    assert grok1.load(folder).mesh_shape == (1, 16)  # as many as there are, two to a query head
