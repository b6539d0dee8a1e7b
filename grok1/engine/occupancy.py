"""How busy a batch is. Nothing here imports JAX."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(eq=False)
class Occupancy:
    """How busy a batch is and has been.

    Attributes:
        slots: how many there are.
        busy: how many have a sequence now.
        rounds: steps so far, a reading and a decoding step together for one.
        busy_rounds: sum over these of the slots that had a sequence.
        read_tokens: tokens of prompts that were read.
        copied_tokens: tokens of prompts that were copied from another slot's beginning, or were still there.
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
        """Mean share of the slots that had a sequence; None before the first step."""
        return self.busy_rounds / (self.rounds * self.slots) if self.rounds else None
