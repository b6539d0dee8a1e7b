"""Scheduler of prompts on the slots of a batch: admission, prefix reuse, and the chunks of each step.

A prefix that is, or will be, in the cache of another slot is copied from there instead of being processed again, in
multiples of `LANE_TOKENS`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Generic, TypeVar

import numpy as np

from grok1.engine.chunks import LANE_TOKENS, PrefillChunk
from grok1.engine.engine import Engine
from grok1.engine.occupancy import Occupancy
from grok1.engine.programs import AnyState
from grok1.request import SamplingOptions

Owner = TypeVar("Owner")


@dataclasses.dataclass(eq=False)
class Slot(Generic[Owner]):
    """A slot of the batch.

    Attributes:
        index: index of the slot.
        row: data row of the slot.
        owner: the sequence in the slot; None if it is free.
        prompt: int32, the prompt whose keys and values are, or will be, in the cache.
        read: number of the prompt's tokens in the cache after all dispatched steps.
        source: slot from which a shared prefix is still to be copied.
        shared: length of that prefix.
        sampling: `PrefillChunk.sampling` of the prompt's last chunk.
        targets: `PrefillChunk.targets` of the whole prompt.
    """

    index: int
    row: int
    owner: Owner | None = None
    prompt: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    read: int = 0
    source: Slot[Owner] | None = None
    shared: int = 0
    sampling: tuple[SamplingOptions, int] | None = None
    targets: np.ndarray | None = None

    @property
    def prefilling(self) -> bool:
        """Whether the slot has an owner and tokens of its prompt are left to process."""
        return self.owner is not None and self.read < len(self.prompt)

    def next_chunk(self, length: int) -> PrefillChunk:
        """Return the next chunk of at most `length` tokens, and count it as read."""
        start, end = self.read, min(self.read + length, len(self.prompt))
        self.read = end
        return PrefillChunk(
            self.index,
            self.prompt[start:end],
            start,
            sampling=self.sampling if end == len(self.prompt) else None,
            targets=None if self.targets is None else self.targets[start:end],
        )


class Scheduler(Generic[Owner]):
    """Assigns prompts to the slots of a batch.

    The caller must process every chunk that `next_chunks` returns, in order.
    """

    def __init__(self, engine: Engine, slots: int, lanes: int, occupancy: Occupancy):
        """Create free slots.

        Args:
            engine: the model.
            slots: number of slots, rounded up to a multiple of the mesh's data axis.
            lanes: maximum number of chunks per step and data row.
            occupancy: statistics to update.
        """
        self._engine = engine
        self._lanes = lanes
        row_slots = -(-slots // engine.data_rows)
        self.slots: list[Slot[Owner]] = [
            Slot(index, index // row_slots) for index in range(row_slots * engine.data_rows)
        ]
        self._prefilling: list[Slot[Owner]] = []  # in order of admission
        self._occupancy = occupancy
        occupancy.slots = len(self.slots)

    @property
    def has_free_slot(self) -> bool:
        """Whether a slot is free."""
        return any(slot.owner is None for slot in self.slots)

    @property
    def prefilling(self) -> list[Owner]:
        """Owners whose prompts are not completely processed."""
        return [slot.owner for slot in self._prefilling if slot.owner is not None]

    def count_step(self) -> int:
        """Count a step in the statistics, and return the number of slots in use."""
        occupancy = self._occupancy
        occupancy.busy = sum(slot.owner is not None for slot in self.slots)
        if occupancy.busy:
            occupancy.rounds += 1
            occupancy.busy_rounds += occupancy.busy
        return occupancy.busy

    def admit(
        self,
        owner: Owner,
        prompt: np.ndarray,
        sharable: int,
        *,
        sampling: tuple[SamplingOptions, int] | None = None,
        targets: np.ndarray | None = None,
    ) -> None:
        """Assign a free slot to an owner.

        If the slot with the longest prefix of the prompt is free, that slot is assigned; if it is busy, a free slot of
        its data row. If no slot has a prefix, a slot of the data row with the fewest busy slots is assigned.

        Args:
            owner: the sequence, not None.
            prompt: int32, at least one token.
            sharable: maximum length of a prefix to copy instead of processing it.
            sampling: as in `Slot`.
            targets: as in `Slot`.
        """
        source, shared = self._longest_prefix(prompt[:sharable])
        free = [slot for slot in self.slots if slot.owner is None]
        if source is None:
            busy = Counter(slot.row for slot in self.slots if slot.owner is not None)
            target = min(free, key=lambda slot: (busy[slot.row], len(slot.prompt)))
        elif source.owner is None:
            target = source
        else:
            target = min((slot for slot in free if slot.row == source.row), key=lambda slot: len(slot.prompt))
        target.owner, target.prompt, target.read = owner, prompt, 0
        target.sampling, target.targets = sampling, targets
        if target is source:
            target.read = shared
            self._occupancy.copied_tokens += shared
        elif source is not None:
            target.source, target.shared = source, shared
        self._prefilling.append(target)

    def release(self, owner: Owner) -> None:
        """Free an owner's slot. Its prompt stays in the cache for reuse."""
        for slot in self.slots:
            if slot.owner is owner:
                slot.owner = None

    def _longest_prefix(self, prompt: np.ndarray) -> tuple[Slot[Owner] | None, int]:
        """Return the slot that has, or will have, the longest prefix of a prompt in whole lanes, and its length."""
        best, longest = None, 0
        rows_with_room = {slot.row for slot in self.slots if slot.owner is None}
        for slot in self.slots:
            if slot.row not in rows_with_room:
                continue
            # A free slot has the tokens that were processed; a busy one will have its whole prompt.
            tokens = slot.prompt[: slot.read] if slot.owner is None else slot.prompt
            length = min(len(tokens), len(prompt))
            differs = np.flatnonzero(tokens[:length] != prompt[:length])
            common = int(differs[0]) if len(differs) else length
            common -= common % LANE_TOKENS
            if common > longest or (common == longest and best is not None and slot.owner is None):
                best, longest = slot, common
        return best, longest

    def copy_prefixes(self, state: AnyState) -> AnyState:
        """Copy the shared prefixes that their source slots have processed, and return the state, which is donated.

        Call it before `next_chunks`, and again before a finished slot is assigned to another owner.
        """
        for slot in self._prefilling:
            if slot.source is not None and slot.source.read >= slot.shared:
                state = self._engine.copy_prefix(state, slot.source.index, slot.index, slot.shared)
                self._occupancy.copied_tokens += slot.shared
                slot.read, slot.source = slot.shared, None
        return state

    def next_chunks(self) -> list[PrefillChunk]:
        """Return the chunks of the next step, in order of admission on each data row."""
        length = LANE_TOKENS if self._lanes > 1 else self._engine.max_chunk
        free = [self._lanes] * self._engine.data_rows
        chunks = []
        for slot in self._prefilling:
            while slot.source is None and slot.read < len(slot.prompt) and free[slot.row]:
                chunks.append(slot.next_chunk(length))
                self._occupancy.read_tokens += len(chunks[-1].tokens)
                free[slot.row] -= 1
        self._prefilling = [slot for slot in self._prefilling if slot.prefilling]
        return chunks
