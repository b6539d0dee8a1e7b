"""Prefill chunks, the pieces in which the engine processes prompts."""

from __future__ import annotations

import dataclasses

import numpy as np

from grok1.request import SamplingOptions

LANE_TOKENS = 16
"""Tokens per lane. In a step with several lanes each holds one chunk; a step with one lane is at least this long."""


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """Consecutive tokens of a prompt or text that one step processes.

    Attributes:
        slot: index of the slot.
        tokens: token ids, int32 `[count]`.
        start: position of the first token; the slot's cache must hold all positions before it.
        sampling: sampling options and seed, for the last chunk of a prompt to complete.
        targets: int32 `[count]`, the token that follows each of `tokens`, for scoring.
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
