"""Statistics on the use of a batch's slots. Importing this does not import JAX."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(eq=False)
class Occupancy:
    """Statistics on the slots of a batch.

    Attributes:
        slots: number of slots.
        busy: number of slots in use.
        rounds: number of steps; a prefill step and the decode step after it count as one.
        busy_rounds: sum over `rounds` of the slots in use.
        read_tokens: prompt tokens processed.
        copied_tokens: prompt tokens reused from another slot or from the same slot.
        generated_tokens: tokens generated.
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
        """Mean fraction of slots in use; None before the first step."""
        return self.busy_rounds / (self.rounds * self.slots) if self.rounds else None
