"""A chunk of a prompt on its way from a slot to a step."""

from __future__ import annotations

import dataclasses

import numpy as np

from grok1.request import SamplingOptions

LANE_TOKENS = 16
"""Length of a lane, which holds one chunk in a step that reads several, and of the shortest step that reads one."""


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """Consecutive tokens of a prompt or text, to be read into a slot in one step.

    Attributes:
        slot: index of the slot.
        tokens: token ids, int32 `[count]`.
        start: position of the first token; the slot's cache holds all positions before it.
        sampling: for the last chunk of a prompt to be continued, its sampling options and seed.
        targets: for scoring, the token after each of `tokens`, int32 `[count]`.
    """

    slot: int
    tokens: np.ndarray
    start: int
    sampling: tuple[SamplingOptions, int] | None = None
    targets: np.ndarray | None = None

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)
