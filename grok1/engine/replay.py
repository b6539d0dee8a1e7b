"""Steps as messages: what one process of a mesh tells the others to run with it.

A step is its kind and sizes, a handle for the cache or batch that it takes over and gives back, and the arrays that
come from the host. As bytes it is one line of JSON and the arrays' own bytes behind it; nothing in it is executed.
"""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        key: its kind, and the sizes that its program is made for.
        handle: of the cache or batch.
        freed: handles that nobody will use any more.
        arrays: from the host, in the order of the leaves.
    """

    key: tuple[Any, ...]
    handle: int
    freed: list[int]
    arrays: list[np.ndarray]

    def encode(self) -> bytes:
        """The message."""
        told = {
            "key": self.key,
            "handle": self.handle,
            "freed": self.freed,
            "arrays": [[array.dtype.name, array.shape] for array in self.arrays],
        }
        return b"".join([json.dumps(told).encode(), b"\n", *(array.tobytes() for array in self.arrays)])

    @classmethod
    def decode(cls, message: bytes) -> Step:
        """The step of a message."""
        end = message.index(b"\n")
        told = json.loads(message[:end])
        arrays, offset = [], end + 1
        for name, shape in told["arrays"]:
            array = np.frombuffer(message, name, int(np.prod(shape)), offset).reshape(shape)
            arrays.append(array)
            offset += array.nbytes
        return cls(tuple(told["key"]), told["handle"], told["freed"], arrays)


class StepSender:
    """Sends steps, and knows by which handle the others know a cache or batch.

    What is held is known by one of its arrays, the owner, which every step consumes and gives anew.
    """

    def __init__(self, send: Callable[[bytes], None]):
        """`send` delivers a message to every other process, in order."""
        self._send = send
        self._handles: dict[int, int] = {}  # by the id of the owner
        self._owners: dict[int, int] = {}  # the id of the owner by handle
        self._freed: list[int] = []
        self._count = 0

    def send(self, key: tuple[Any, ...], owner: jax.Array | None, arrays: Sequence[Any]) -> int:
        """Sends a step.

        Args:
            key: as in `Step`.
            owner: of what it takes over; None if it makes it.
            arrays: as in `Step`.

        Returns:
            the handle of what it gives.
        """
        if owner is None:
            self._count += 1
            handle = self._count
        else:
            handle = self._handles[id(owner)]
        freed = [self._freed.pop() for _ in range(len(self._freed))]
        self._send(Step(key, handle, freed, [np.asarray(array) for array in arrays]).encode())
        return handle

    def given(self, handle: int, owner: jax.Array) -> None:
        """Takes note of the owner that a step has given anew."""
        self._handles[id(owner)] = handle
        self._owners[handle] = id(owner)
        weakref.finalize(owner, self._forget, id(owner), handle).atexit = False

    def _forget(self, owner: int, handle: int) -> None:
        del self._handles[owner]
        if self._owners.get(handle) == owner:
            del self._owners[handle]
            self._freed.append(handle)
