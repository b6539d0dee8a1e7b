"""Messages with which one process of a mesh makes the others replay its steps.

A message has a step's key, a handle of its state, and its host arrays. It is encoded as one line of JSON followed by
the bytes of the arrays; decoding executes no code.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Step:
    """A step to replay.

    Attributes:
        key: its `StepKey`.
        handle: handle of its state.
        freed: handles of states that have been freed.
        arrays: leaves of its host arrays.
    """

    key: tuple[Any, ...]
    handle: int
    freed: list[int]
    arrays: list[np.ndarray]

    def encode(self) -> bytes:
        """Encode as a message."""
        header = {
            "key": self.key,
            "handle": self.handle,
            "freed": self.freed,
            "arrays": [[array.dtype.name, array.shape] for array in self.arrays],
        }
        return b"".join([json.dumps(header).encode(), b"\n", *(array.tobytes() for array in self.arrays)])

    @classmethod
    def decode(cls, message: bytes) -> Step:
        """Decode a message."""
        end = message.index(b"\n")
        header = json.loads(message[:end])
        arrays, offset = [], end + 1
        for name, shape in header["arrays"]:
            array = np.frombuffer(message, name, int(np.prod(shape)), offset).reshape(shape)
            arrays.append(array)
            offset += array.nbytes
        return cls(tuple(header["key"]), header["handle"], header["freed"], arrays)


class StepSender:
    """Sends steps and assigns handles to states.

    A state is identified by one of its arrays, the owner, which every step donates and replaces.
    """

    def __init__(self, send: Callable[[bytes], None]):
        """Create a sender; `send` delivers a message to every other process, in order."""
        self._send = send
        self._new_handles = itertools.count(1)
        self._owners: dict[int, int] = {}  # id() of the owner, by handle
        self._freed: list[int] = []

    def send(self, key: tuple[Any, ...], owner: jax.Array | None, arrays: Sequence[Any]) -> int:
        """Send a step.

        Args:
            key: as in `Step`.
            owner: owner of the input state; None if the step creates a state.
            arrays: as in `Step`.

        Returns:
            the handle of the state that the step returns.
        """
        if owner is None:
            handle = next(self._new_handles)
        else:
            handle = next(handle for handle, known in self._owners.items() if known == id(owner))
        freed = [self._freed.pop() for _ in range(len(self._freed))]
        self._send(Step(key, handle, freed, [np.asarray(array) for array in arrays]).encode())
        return handle

    def returned(self, handle: int, owner: jax.Array) -> None:
        """Record the new owner of a state after a step."""
        self._owners[handle] = id(owner)
        weakref.finalize(owner, self._forget, id(owner), handle).atexit = False

    def _forget(self, owner: int, handle: int) -> None:
        if self._owners.get(handle) == owner:
            del self._owners[handle]
            self._freed.append(handle)
