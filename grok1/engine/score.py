"""Log-probabilities of texts, which are processed like prompts, many at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from grok1.engine.engine import Engine
from grok1.engine.occupancy import Occupancy
from grok1.engine.sampling import SampledTokens
from grok1.engine.scheduler import Scheduler


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringRequest:
    """A text to score.

    Attributes:
        tokens: 2 to `sequence_len + 1` token ids; the last is only scored, not read.
        first: index of the first token to score, at least 1. A prefix before it may be shared with other texts.
    """

    tokens: Sequence[int]
    first: int = 1


@dataclasses.dataclass(eq=False)
class ScoredSequence:
    """A text being scored.

    Attributes:
        request: the text.
        request_index: index of the request in the input.
        pieces: results of the chunks that have arrived.
    """

    request: ScoringRequest
    request_index: int
    pieces: list[SampledTokens] = dataclasses.field(default_factory=list)

    @property
    def scored(self) -> SampledTokens:
        """NumPy arrays with one entry for each token from index `request.first`."""
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *self.pieces)


@dataclasses.dataclass(frozen=True)
class _ScoredStep:
    """A dispatched step: its outputs, the part of each row to keep, and the texts that it completes."""

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
    """Score texts with continuous batching, processing shared prefixes once.

    Args:
        engine: the model.
        requests: texts, each consumed when a slot is free.
        slots: number of texts processed together, rounded up to a multiple of the mesh's data axis.
        lanes: number of chunks per step, as for `grok1.engine.generate.generate`.
        logprobs: whether to report the 20 most likely tokens at each position instead of only the most likely one.
        occupancy: statistics to update.

    Yields:
        each text when it is scored.

    Raises:
        ValueError: if a text is too short or too long, or `first` is out of range.
    """
    scheduler: Scheduler[ScoredSequence] = Scheduler(engine, slots, lanes, occupancy or Occupancy())
    cache = engine.new_cache(len(scheduler.slots))
    waiting = enumerate(requests)
    previous: _ScoredStep | None = None
    while True:
        while scheduler.has_free_slot and (numbered := next(waiting, None)) is not None:
            index, request = numbered
            if not 1 <= request.first < len(request.tokens) <= engine.config.sequence_len + 1:
                raise ValueError(
                    f"cannot score {len(request.tokens)} tokens from index {request.first}: expected 2 to "
                    f"{engine.config.sequence_len + 1} tokens and an index from 1 to the last"
                )
            tokens = np.asarray(request.tokens, np.int32)
            scheduler.admit(ScoredSequence(request, index), tokens[:-1], request.first - 1, targets=tokens[1:])
        scheduler.count_step()
        cache = scheduler.copy_prefixes(cache)
        step = None
        if chunks := scheduler.next_chunks():
            cache, scored, rows = engine.score(cache, chunks, lanes, logprobs)
            cache = scheduler.copy_prefixes(cache)
            step = _ScoredStep(scored, [], [])
            engine.report_prefill(chunks[0].end, len(scheduler.slots[chunks[0].slot].prompt))
            for chunk, row in zip(chunks, rows, strict=True):
                slot = scheduler.slots[chunk.slot]
                sequence = slot.owner
                assert sequence is not None
                wanted = slice(max(0, sequence.request.first - 1 - chunk.start), len(chunk.tokens))
                step.rows.append((row, sequence, wanted))
                if chunk.end == len(slot.prompt):
                    step.ended.append(sequence)
                    scheduler.release(sequence)
        if previous is not None:
            arrays = jax.device_get(previous.scored)
            for row, sequence, wanted in previous.rows:
                sequence.pieces.append(jax.tree.map(lambda array, row=row, wanted=wanted: array[row][wanted], arrays))
            yield from previous.ended
        if step is None and previous is None and not scheduler.prefilling:
            return
        previous = step
