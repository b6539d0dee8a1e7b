"""Which prompt is in which slot of a batch, what of it is to be read next, and what is copied from another slot.

What a prompt has in common with one that a slot holds, or is going to hold, is copied from there instead of being read
again, in whole lanes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from grok1.engine.engine import LANE_TOKENS, Engine
from grok1.engine.occupancy import Occupancy
from grok1.network import KVCache

Owner = TypeVar("Owner")


@dataclasses.dataclass(eq=False)
class PromptSlot(Generic[Owner]):
    """One place of the batch.

    Attributes:
        index: of the place.
        owner: who has it; None if it is free.
        prompt: int32, the prompt whose keys and values its cache holds, or is going to hold.
        read: how many of the prompt's tokens it holds, as soon as everything dispatched is done.
        source: another slot that is reading what this one begins with, and has to be waited for.
        shared: how much of that is to be copied.
    """

    index: int
    owner: Owner | None = None
    prompt: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    read: int = 0
    source: PromptSlot[Owner] | None = None
    shared: int = 0

    @property
    def reading(self) -> bool:
        """Whether it has an owner whose prompt is not wholly read yet."""
        return self.owner is not None and self.read < len(self.prompt)


class Part(NamedTuple, Generic[Owner]):
    """Tokens `start` to `end` of a slot's prompt."""

    slot: PromptSlot[Owner]
    start: int
    end: int


class PromptSlots(Generic[Owner]):
    """The slots of a batch and what has been read into them.

    Whoever uses it reads every part that `next_parts` gives.
    """

    def __init__(self, engine: Engine, slots: int, lanes: int, occupancy: Occupancy):
        """Free slots.

        Args:
            engine: the model.
            slots: how many; rounded up to a multiple of the mesh's data axis.
            lanes: how many parts of prompts a step reads on each data row.
            occupancy: is kept up to date.
        """
        self._engine = engine
        self._lanes = lanes
        self._row_slots = -(-slots // engine.data_rows)
        self._slots: list[PromptSlot[Owner]] = [
            PromptSlot(index) for index in range(self._row_slots * engine.data_rows)
        ]
        self._reading: list[PromptSlot[Owner]] = []  # in the order in which they came
        self._occupancy = occupancy
        occupancy.slots = len(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[PromptSlot[Owner]]:
        return iter(self._slots)

    @property
    def has_free(self) -> bool:
        """Whether a slot is free."""
        return any(slot.owner is None for slot in self._slots)

    @property
    def readers(self) -> list[Owner]:
        """Whose prompts are being read."""
        return [slot.owner for slot in self._reading if slot.owner is not None]

    def count_round(self) -> int:
        """Counts a step for the statistics; how many slots have an owner."""
        occupancy = self._occupancy
        occupancy.busy = sum(slot.owner is not None for slot in self._slots)
        if occupancy.busy:
            occupancy.rounds += 1
            occupancy.busy_rounds += occupancy.busy
        return occupancy.busy

    def take(self, owner: Owner, prompt: np.ndarray, sharable: int) -> None:
        """Gives a free slot to an owner.

        Args:
            owner: not None.
            prompt: int32, at least one token.
            sharable: how many of its first tokens may be copied instead of being read.
        """
        source, shared = self._longest_beginning(prompt[:sharable])
        free = [slot for slot in self._slots if slot.owner is None]
        if source is None:
            target = min(free, key=lambda slot: (self._busy(slot), len(slot.prompt)))
        elif source.owner is None:
            target = source
        else:
            target = min((slot for slot in free if self._same_row(slot, source)), key=lambda slot: len(slot.prompt))
        target.owner, target.prompt, target.read = owner, prompt, 0
        if target is source:
            target.read = shared
            self._occupancy.copied_tokens += shared
        elif source is not None:
            target.source, target.shared = source, shared
        self._reading.append(target)

    def free(self, owner: Owner) -> None:
        """Takes an owner's slot back; what was read into it stays there."""
        for slot in self._slots:
            if slot.owner is owner:
                slot.owner = None

    def _longest_beginning(self, prompt: np.ndarray) -> tuple[PromptSlot[Owner] | None, int]:
        """The slot that holds or is reading most of a prompt's beginning, in whole lanes, and how much."""
        best, most = None, 0
        for slot in self._slots:
            if not any(other.owner is None and self._same_row(slot, other) for other in self._slots):
                continue
            # A free slot holds what it has read; one that is reading will hold its whole prompt.
            held = slot.prompt[: slot.read] if slot.owner is None else slot.prompt
            length = min(len(held), len(prompt))
            differs = np.flatnonzero(held[:length] != prompt[:length])
            common = int(differs[0]) if len(differs) else length
            common -= common % LANE_TOKENS
            if common > most or (common == most and best is not None and slot.owner is None):
                best, most = slot, common
        return best, most

    def _same_row(self, slot: PromptSlot[Owner], other: PromptSlot[Owner]) -> bool:
        return slot.index // self._row_slots == other.index // self._row_slots

    def _busy(self, slot: PromptSlot[Owner]) -> int:
        """How many slots of its data row are taken."""
        return sum(other.owner is not None and self._same_row(slot, other) for other in self._slots)

    def copy_beginnings(self, cache: KVCache) -> KVCache:
        """Copies all that waits for another slot that has read it by now; the cache is consumed.

        It comes before `next_parts`, and once more before a slot that has been read is given to another.
        """
        for slot in self._reading:
            if slot.source is not None and slot.source.read >= slot.shared:
                cache = self._engine.copy_beginning(cache, slot.source.index, slot.index, slot.shared)
                self._occupancy.copied_tokens += slot.shared
                slot.read, slot.source = slot.shared, None
        return cache

    def next_parts(self) -> list[Part[Owner]]:
        """The parts to be read in the next step; on each data row who came first reads first."""
        length = LANE_TOKENS if self._lanes > 1 else self._engine.max_chunk
        free = [self._lanes] * self._engine.data_rows
        parts = []
        for slot in self._reading:
            row = slot.index // self._row_slots
            while slot.source is None and slot.read < len(slot.prompt) and free[row]:
                start, slot.read = slot.read, min(slot.read + length, len(slot.prompt))
                parts.append(Part(slot, start, slot.read))
                self._occupancy.read_tokens += slot.read - start
                free[row] -= 1
        self._reading = [slot for slot in self._reading if slot.reading]
        return parts
