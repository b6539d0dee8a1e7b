"""Admission, prefix reuse and chunks, without a model."""

from types import SimpleNamespace

import numpy as np
import pytest

from grok1.engine.chunks import LANE_TOKENS
from grok1.engine.occupancy import Occupancy
from grok1.engine.scheduler import Scheduler

L = LANE_TOKENS


class Engine:
    """Records requested copies."""

    def __init__(self, data_rows=1, max_chunk=4 * L):
        self.data_rows = data_rows
        self.max_chunk = max_chunk
        self.copies = []

    def copy_prefix(self, state, source, target, length):
        self.copies.append((source, target, length))
        return state


def make(slots, lanes=1, **options):
    engine = Engine(**options)
    return engine, Scheduler(engine, slots, lanes, Occupancy())


def prompt(*runs):
    """Return a prompt made of runs `(token, length)`."""
    return np.concatenate([np.full(length, token, np.int32) for token, length in runs])


def read_all(scheduler):
    chunks = []
    while new := scheduler.next_chunks():
        chunks += new
    return chunks


def test_the_slot_with_the_longest_prefix_is_the_source():
    engine, scheduler = make(4)
    for owner, shared in enumerate((1, 3, 2)):
        scheduler.admit(owner, prompt((7, shared * L), (owner, 5)), 0)
    read_all(scheduler)
    scheduler.admit(3, prompt((7, 4 * L)), 4 * L)
    scheduler.copy_prefixes(None)
    assert engine.copies[-1] == (1, 3, 3 * L)
    assert [(chunk.slot, chunk.start, len(chunk.tokens)) for chunk in scheduler.next_chunks()] == [(3, 3 * L, L)]


def test_prefixes_are_shared_in_whole_lanes():
    engine, scheduler = make(2)
    scheduler.admit(0, prompt((7, 2 * L - 1), (8, 9)), 3 * L)
    read_all(scheduler)
    scheduler.admit(1, prompt((7, 2 * L - 1), (9, 9)), 3 * L)
    scheduler.copy_prefixes(None)
    assert engine.copies == [(0, 1, L)]


def test_only_the_sharable_part_is_copied():
    engine, scheduler = make(2)
    for owner in range(2):
        scheduler.admit(owner, prompt((7, 3 * L)), 2 * L)
        read_all(scheduler)
        scheduler.copy_prefixes(None)
    assert engine.copies == [(0, 1, 2 * L)]


def test_a_free_slot_with_the_prefix_is_reused_without_a_copy():
    engine, scheduler = make(3)
    for owner in range(2):
        scheduler.admit(owner, prompt((owner, 2 * L), (9, 3)), 2 * L)
    read_all(scheduler)
    scheduler.release(1)
    scheduler.admit(2, prompt((1, 2 * L), (5, 3)), 2 * L)
    assert scheduler.slots[1].owner == 2
    assert [(chunk.slot, chunk.start, len(chunk.tokens)) for chunk in read_all(scheduler)] == [(1, 2 * L, 3)]
    assert engine.copies == []


def test_a_prefix_is_copied_only_after_its_source_has_processed_it():
    engine, scheduler = make(2, max_chunk=L)
    scheduler.admit(0, prompt((7, 2 * L), (1, 1)), 2 * L)
    scheduler.admit(1, prompt((7, 2 * L), (2, 1)), 2 * L)
    scheduler.copy_prefixes(None)
    assert engine.copies == []
    assert {chunk.slot for chunk in scheduler.next_chunks()} == {0}
    while not engine.copies:
        scheduler.copy_prefixes(None)
        chunks = scheduler.next_chunks()
    assert engine.copies == [(0, 1, 2 * L)]
    assert (1, 2 * L) in [(chunk.slot, chunk.start) for chunk in chunks + read_all(scheduler)]


def test_prompts_go_to_the_data_row_with_the_fewest_busy_slots():
    _, scheduler = make(4, data_rows=2)
    for owner in range(4):
        scheduler.admit(owner, prompt((owner, 3)), 0)
    assert [scheduler.slots[i].owner for i in range(4)] == [0, 2, 1, 3]
    assert not scheduler.has_free_slot


@pytest.mark.parametrize(("lanes", "expected"), [(1, [(0, 2 * L)]), (3, [(0, L), (0, L), (0, 2)])])
def test_chunks_fill_the_lanes_of_a_row(lanes, expected):
    _, scheduler = make(2, lanes=lanes, max_chunk=2 * L)
    scheduler.admit(0, prompt((5, 2 * L + 2)), 0)
    assert [(chunk.slot, len(chunk.tokens)) for chunk in scheduler.next_chunks()] == expected


def test_only_the_last_chunk_samples_and_each_has_its_targets():
    _, scheduler = make(1, max_chunk=L)
    sampling, targets = SimpleNamespace(), np.arange(L + 2)
    scheduler.admit("a", prompt((5, L + 2)), 0, sampling=sampling, targets=targets)
    first, last = read_all(scheduler)
    assert (first.sampling, last.sampling) == (None, sampling)
    np.testing.assert_array_equal(first.targets, targets[:L])
    np.testing.assert_array_equal(last.targets, targets[L:])


def test_occupancy_counts_tokens_and_busy_slots():
    engine, occupancy = Engine(), Occupancy()
    scheduler = Scheduler(engine, 2, 1, occupancy)
    assert scheduler.count_step() == 0
    for owner in range(2):
        scheduler.admit(owner, prompt((7, L), (owner, 2)), L)
        read_all(scheduler)
        scheduler.copy_prefixes(None)
        read_all(scheduler)
    assert scheduler.count_step() == 2
    assert (occupancy.slots, occupancy.rounds, occupancy.busy_rounds) == (2, 1, 2)
    assert (occupancy.read_tokens, occupancy.copied_tokens) == (L + 4, L)
