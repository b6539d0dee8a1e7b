"""How likely given texts are: reads them as prompts are read, many at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from grok1.engine.engine import Engine, ScoredPart
from grok1.engine.occupancy import Occupancy
from grok1.engine.sampling import SampledTokens
from grok1.engine.scheduler import PromptSlots


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringRequest:
    """A text in token ids.

    Attributes:
        tokens: 2 to `sequence_len + 1` ids; the last is only scored, not read.
        first: index of the first token to be scored, at least 1. What is before it may be shared with other texts.
        tag: anything, handed back in `ScoredSequence.request`.
    """

    tokens: Sequence[int]
    first: int = 1
    tag: object = None


@dataclasses.dataclass(eq=False)
class ScoredSequence:
    """A text that is being scored.

    Attributes:
        request: which.
        pieces: NumPy arrays, an entry for each token from `request.first` on, as far as they are there.
    """

    request: ScoringRequest
    pieces: list[SampledTokens] = dataclasses.field(default_factory=list)

    @property
    def scored(self) -> SampledTokens:
        """NumPy arrays with an entry for each token from `request.first` on."""
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *self.pieces)


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """A step whose results have not been read: of which sequence each row is, and which of its places are wanted."""

    scored: Any
    rows: list[tuple[int, ScoredSequence, slice]]
    ended: list[ScoredSequence]


def score(
    engine: Engine,
    requests: Iterable[ScoringRequest],
    slots: int,
    *,
    lanes: int = 1,
    logprobs: bool = False,
    occupancy: Occupancy | None = None,
) -> Iterator[ScoredSequence]:
    """Scores texts, as many at a time as there are slots, sharing what they begin with.

    Args:
        engine: the model.
        requests: taken one by one, when a slot is free.
        slots: how many texts are read at a time; rounded up to a multiple of the mesh's data axis.
        lanes: parts of texts that a step reads, as for `grok1.engine.generate.generate`.
        logprobs: whether the 20 likeliest tokens are wanted in each place, rather than the one.
        occupancy: is kept up to date.

    Yields:
        each text when it is done, in the order in which they are.
    """
    places: PromptSlots[ScoredSequence] = PromptSlots(engine, slots, lanes, occupancy or Occupancy())
    cache = engine.new_cache(len(places))
    waiting = iter(requests)
    before: _Dispatched | None = None
    while True:
        while places.has_free and (request := next(waiting, None)) is not None:
            if not 1 <= request.first < len(request.tokens) <= engine.capacity + 1:
                raise ValueError(f"{len(request.tokens)} tokens, to be scored from {request.first} on")
            places.take(ScoredSequence(request), np.asarray(request.tokens[:-1], np.int32), request.first - 1)
        places.count_round()
        cache = places.copy_beginnings(cache)
        step = None
        if chosen := places.next_parts():
            parts = []
            for slot, start, end in chosen:
                assert slot.owner is not None
                targets = np.asarray(slot.owner.request.tokens[start + 1 : end + 1], np.int32)
                parts.append(ScoredPart(slot.index, slot.prompt[start:end], start, targets))
            cache, scored, rows = engine.score_parts(cache, parts, lanes, logprobs)
            cache = places.copy_beginnings(cache)
            step = _Dispatched(scored, [], [])
            for (slot, start, end), row in zip(chosen, rows, strict=True):
                sequence = slot.owner
                assert sequence is not None
                wanted = slice(max(0, sequence.request.first - 1 - start), end - start)
                step.rows.append((row, sequence, wanted))
                if end == len(slot.prompt):
                    step.ended.append(sequence)
                    places.free(sequence)
            engine.report_reading(chosen[0].end, len(chosen[0].slot.prompt))
        if before is not None:
            arrays = jax.device_get(before.scored)
            for row, sequence, wanted in before.rows:
                sequence.pieces.append(jax.tree.map(lambda array, row=row, wanted=wanted: array[row][wanted], arrays))
            yield from before.ended
        if step is None and before is None and not places.readers:
            return
        before = step
