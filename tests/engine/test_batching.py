"""Steps of prompts that share a batch, and independence of their results from the batch."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from grok1.engine.chunks import LANE_TOKENS
from grok1.engine.engine import Engine
from grok1.engine.generate import generate
from grok1.request import EncodedRequest, SamplingOptions


@pytest.fixture(scope="module")
def engine(long_folder, make_engine):
    return make_engine(long_folder)


@pytest.fixture
def steps(monkeypatch):
    """Steps of the engine from now on: "decode", or the chunks of a prefill step."""
    done = []
    prefill, decode = Engine.prefill, Engine.decode

    def record_prefill(self, state, chunks, *rest):
        done.append([SimpleNamespace(slot=chunk.slot, start=chunk.start, count=len(chunk.tokens)) for chunk in chunks])
        return prefill(self, state, chunks, *rest)

    def record_decode(self, *arguments):
        done.append("decode")
        return decode(self, *arguments)

    monkeypatch.setattr(Engine, "prefill", record_prefill)
    monkeypatch.setattr(Engine, "decode", record_decode)
    return done


def tokens_read(steps):
    return sum(part.count for step in steps if step != "decode" for part in step)


def prompt(length, seed=0):
    return [int(token) for token in np.random.default_rng(seed).integers(3, 64, length)]


def request(tokens, samples=1, **options):
    options = {"max_tokens": 4, "temperature": 0.0, "seed": 5, "ignore_eos": True} | options
    return EncodedRequest(prompt=tokens, tokens=tokens, options=SamplingOptions(**options), num_samples=samples)


def run(engine, requests, slots, **shape):
    """Return all finished sequences by request index and sample index."""
    ended = {}
    for sequence in generate(engine, requests, slots, **shape):
        if sequence.finish_reason is not None:
            ended[sequence.request_index, sequence.sample] = sequence
    return ended


def bits(sequence):
    """Return the complete result of a sequence."""
    return sequence.tokens, sequence.logprobs, sequence.finish_reason


def mixed_requests():
    rng = np.random.default_rng(3)
    header = prompt(70, seed=99)
    requests = []
    for i in range(24):
        tokens = prompt(int(rng.integers(1, 120)), seed=i)
        if i % 3 == 0:
            tokens = header[: int(rng.integers(10, 70))] + tokens
        options = {"max_tokens": int(rng.integers(1, 30)), "temperature": 1.3 * (i % 2), "seed": i, "logprobs": 5}
        requests.append(request(tokens, samples=1 + (i % 5 == 0), **options))
    return requests


def test_results_are_bitwise_independent_of_the_batch(engine):
    requests = mixed_requests()
    shape = {"lanes": 4, "logprobs": True}
    together = run(engine, requests, 3, **shape)
    assert len(together) == 29
    backwards = run(engine, requests[::-1], 3, **shape)
    alone = [run(engine, [each], 3, **shape) for each in requests]
    for (i, sample), sequence in together.items():
        assert bits(sequence) == bits(backwards[23 - i, sample]) == bits(alone[i][0, sample])


def test_log_probabilities_are_only_returned_if_requested(engine):
    [sequence] = run(engine, [request(prompt(5))], 2, lanes=2, logprobs=True).values()
    assert sequence.logprobs == []


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_shared_prefix_is_processed_once(lanes, engine, steps):
    header = prompt(200)
    rows = [header + prompt(9, seed=1 + i) for i in range(100)]
    found = run(engine, (request(tokens) for tokens in rows), 8, lanes=lanes)
    shared = 200 - 200 % LANE_TOKENS
    assert tokens_read(steps) == 209 + 99 * (209 - shared)
    for i in (0, 1, 7, 50, 99):
        [alone] = run(engine, [request(rows[i])], 1).values()
        assert found[i, 0].tokens == alone.tokens


def test_samples_share_the_prefill_of_their_prompt(engine, steps):
    samples = run(engine, [request(prompt(100), samples=5, temperature=1.5, max_tokens=9)], 3, lanes=4)
    assert tokens_read(steps) == 100 + 4 * 4  # 96 of 100 tokens are shared, in whole lanes
    assert len({tuple(sequence.tokens) for sequence in samples.values()}) == 5
    steps.clear()
    for (_, sample), sequence in samples.items():
        [alone] = run(engine, [request(prompt(100), temperature=1.5, max_tokens=9, seed=5 + sample)], 1).values()
        assert alone.tokens == sequence.tokens


def test_a_prefix_left_in_a_free_slot_is_reused(engine, steps):
    rows = [prompt(64), prompt(40, seed=1), prompt(64) + prompt(10, seed=2)]
    run(engine, (request(tokens) for tokens in rows), 1, lanes=4)
    assert tokens_read(steps) == 64 + 40 + 74  # one slot: the first prompt has been overwritten
    steps.clear()
    run(engine, (request(tokens, max_tokens=1) for tokens in rows), 2, lanes=4)
    assert tokens_read(steps) == 64 + 40 + 10


def test_one_step_processes_several_prompts(engine, steps):
    requests = [request(prompt(10, seed=i), max_tokens=2) for i in range(8)]
    run(engine, requests, 8, lanes=8)
    assert len([step for step in steps if step != "decode"]) == 1
    assert {part.slot for part in steps[0]} == set(range(8))


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_long_prompt_does_not_stall_the_others(lanes, engine, steps, monkeypatch):
    monkeypatch.setattr(Engine, "max_chunk", 32)
    requests = [request(prompt(3), max_tokens=30), request(prompt(300, seed=1), max_tokens=2)]
    run(engine, requests, 2, lanes=lanes)
    reading = [i for i, step in enumerate(steps) if step != "decode"]
    assert len(reading) >= 300 // 32
    begun = steps.index("decode")
    between = [later - earlier for earlier, later in itertools.pairwise(reading) if earlier > begun]
    assert between == [2] * len(between)  # a decode step after each chunk
    assert len(between) > 5


def test_the_next_step_is_dispatched_before_tokens_are_fetched(engine, monkeypatch):
    """When a token of an unfinished sequence is yielded, the step of the next one is already dispatched."""
    dispatched = []
    decode = Engine.decode
    monkeypatch.setattr(Engine, "decode", lambda self, *rest: dispatched.append(1) or decode(self, *rest))
    received = 0
    for sequence in generate(engine, [request(prompt(5), max_tokens=20)], 1):
        received = len(sequence.tokens)
        if 1 < received < 20:
            assert len(dispatched) == received  # prefill gives the first token, and one step is ahead
    assert received == 20


def test_data_rows_prefill_in_parallel(long_folder, make_engine, steps):
    rows = make_engine(long_folder, (2, 2))
    requests = [request(prompt(100, seed=i)) for i in range(2)]
    found = run(rows, requests, 2, lanes=4)
    reading = [step for step in steps if step != "decode"]
    assert all({part.slot for part in step} == {0, 1} for step in reading)
    steps.clear()
    for i, each in enumerate(requests):
        [alone] = run(rows, [each], 2).values()
        assert found[i, 0].tokens == alone.tokens


def test_greedy_tokens_of_the_golden_checkpoint_do_not_depend_on_slots(golden, golden_sequences, make_engine):
    engine = make_engine(golden, (1, 1))
    requests = [
        request(sequence.tokens[:length].tolist(), max_tokens=12)
        for sequence in golden_sequences
        for length in {max(1, len(sequence.tokens) // 2), len(sequence.tokens)}
    ]
    first, *others = [run(engine, requests, slots, lanes=4) for slots in (1, 3, 8)]
    assert len(first) == len(requests)
    for other in others:
        assert {key: sequence.tokens for key, sequence in other.items()} == {
            key: sequence.tokens for key, sequence in first.items()
        }


def test_a_prefix_is_copied_before_its_slot_is_reused(engine):
    """The source slot finishes with its first token and is reused at once, while another slot waits for the prefix."""
    header = prompt(160)
    rows = [[*header, 5], [*header, 6, 7], prompt(170, seed=1), prompt(150, seed=2)]
    for lanes in (1, 2):
        found = run(engine, [request(tokens, max_tokens=1) for tokens in rows], 2, lanes=lanes)
        for i, tokens in enumerate(rows):
            [alone] = run(engine, [request(tokens, max_tokens=1)], 1).values()
            assert found[i, 0].tokens == alone.tokens
