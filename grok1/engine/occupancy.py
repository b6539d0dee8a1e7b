"""Slot use of a batch. Nothing here imports JAX."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(eq=False)
class Occupancy:
    """Statistics about the slots of a batch.

    Attributes:
        slots: number of slots.
        busy: number of slots with a sequence now.
        rounds: steps so far; a prefill step and the decoding step after it count as one.
        busy_rounds: sum over these of the slots with a sequence.
        read_tokens: prompt tokens that were read.
        copied_tokens: prompt tokens that were copied from another slot, or were still in the slot.
        generated_tokens: tokens handed out.
    """

    slots: int = 0
    busy: int = 0
    rounds: int = 0
    busy_rounds: int = 0
    read_tokens: int = 0
    copied_tokens: int = 0
    generated_tokens: int = 0

    @property
    def mean_use(self) -> float | None:
        """Mean fraction of the slots with a sequence; None before the first step."""
        return self.busy_rounds / (self.rounds * self.slots) if self.rounds else None
