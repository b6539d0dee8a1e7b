"""Chunks of prompts on their way from a slot to a step, and the arrays in which a step takes them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from grok1.engine.sampling import SamplingState
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkRows:
    """The chunks of a step as arrays, one in each row.

    Attributes:
        tokens: int32 `[rows, length]`.
        positions: int32 `[rows, length]`, negative for padding.
        slots: int32 `[rows]`, indices within the data row.
    """

    tokens: Any
    positions: Any
    slots: Any

    @classmethod
    def empty(cls, rows: int, length: int) -> ChunkRows:
        """Rows of padding, as NumPy arrays."""
        return cls(np.zeros((rows, length), np.int32), np.full((rows, length), -1, np.int32), np.zeros(rows, np.int32))

    def put(self, row: int, chunk: PrefillChunk, row_slots: int) -> None:
        """Store a chunk in a row; `row_slots` is the number of slots of a data row."""
        count = len(chunk.tokens)
        self.tokens[row, :count] = chunk.tokens
        self.positions[row, :count] = np.arange(chunk.start, chunk.end)
        self.slots[row] = chunk.slot % row_slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FirstTokens:
    """The rows of `ChunkRows` whose first token is to be sampled.

    Attributes:
        wanted: bool `[rows]`.
        sampling: how, for those rows.
    """

    wanted: Any
    sampling: SamplingState

    @classmethod
    def empty(cls, rows: int) -> FirstTokens:
        """No first tokens, as NumPy arrays."""
        return cls(np.zeros(rows, bool), SamplingState.empty(rows))

    def put(self, row: int, options: SamplingOptions, seed: int) -> None:
        """Sample the first token of a row."""
        self.wanted[row] = True
        new = jax.tree.leaves(SamplingState.of(options, seed))
        for array, value in zip(jax.tree.leaves(self.sampling), new, strict=True):
            array[row] = value[0]
