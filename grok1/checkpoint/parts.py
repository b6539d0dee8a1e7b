"""Parts of an array in memory: what the model shards of this process hold of it, on the host or on devices."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from grok1.params.sharding import MODEL_AXIS, own_devices
from grok1.params.tree import StoredLeaf

Place = tuple[slice, ...]
"""A box in a part, whose first axis is that of the layers if there is one."""

PackBox = Callable[[np.ndarray, np.ndarray, int, int, int, int], None]
"""Puts an int8 box `[rows, columns]` into the panels of a packed matrix: given the box, the panels, the box's first row
and first column, and the matrix's number of scale groups and the rows of each."""

_ALIGNMENT = 64  # XLA takes a host buffer as it is if it is aligned so


class Part(Protocol):
    """What one or several model shards hold of an array, all layers of it.

    Attributes:
        key: which part of each file's array it is.
        shards: how many of this process's model shards hold it.
        host_bytes: host memory that it takes.
        staged_item_bytes: host memory that each item takes on its way, beyond that.
    """

    key: tuple[slice, ...]
    shards: int
    host_bytes: int
    staged_item_bytes: int

    def buffer(self, place: Place) -> np.ndarray:
        """Where to read a box to: of its shape and the file's dtype."""

    def put(self, place: Place, buffer: np.ndarray) -> list[jax.Array]:
        """Takes a box that was read; the buffer is free again when the arrays that it returns are ready."""

    def arrays(self) -> list[jax.Array]:
        """The part on each of its devices, once every box was put."""


class HostPart:
    """A part in host memory, which CPU devices use as it is and share."""

    def __init__(self, leaf: StoredLeaf, key: tuple[slice, ...], shards: int, devices: list[jax.Device]):
        self.key = key
        self.shards = shards
        self._devices = devices
        self._whole = _aligned_empty(leaf.memory_shape(key), leaf.dtype)
        self._file_dtype = leaf.file_dtype
        self.host_bytes = self._whole.nbytes
        self.staged_item_bytes = 0 if leaf.dtype == leaf.file_dtype else leaf.file_dtype.itemsize

    def buffer(self, place: Place) -> np.ndarray:
        """The box itself, or a copy if it is to change its dtype."""
        box = self._whole[place]
        return box if box.dtype == self._file_dtype else np.empty(box.shape, self._file_dtype)

    def put(self, place: Place, buffer: np.ndarray) -> list[jax.Array]:
        """Changes the dtype, if that is needed."""
        if buffer.dtype != self._whole.dtype:
            self._whole[place] = buffer
        return []

    def arrays(self) -> list[jax.Array]:
        """The same memory for each device."""
        return [jax.device_put(self._whole, device, may_alias=True) for device in self._devices]


class PackedPart(HostPart):
    """A part of a quantised weight in host memory, packed for the kernels for processors."""

    def __init__(self, leaf: StoredLeaf, key: tuple[slice, ...], shards: int, devices: list[jax.Device], pack: PackBox):
        super().__init__(leaf, key, shards, devices)
        self._pack = pack
        self._groups = leaf.scale_groups(key[-2].stop - key[-2].start)

    def buffer(self, place: Place) -> np.ndarray:
        """New memory."""
        return np.empty(tuple(box.stop - box.start for box in place), self._file_dtype)

    def put(self, place: Place, buffer: np.ndarray) -> list[jax.Array]:
        """Packs the box."""
        *lead, rows, columns = place
        for index in np.ndindex(*buffer.shape[:-2]):
            matrix = tuple(axis.start + i for axis, i in zip(lead, index, strict=True))
            self._pack(buffer[index], self._whole[matrix], rows.start, columns.start, *self._groups)
        return []


class DevicePart:
    """A part on each of some devices, to which boxes go by way of the host."""

    def __init__(self, leaf: StoredLeaf, key: tuple[slice, ...], shards: int, devices: list[jax.Device]):
        self.key = key
        self.shards = shards
        self._wholes = [jnp.zeros(leaf.memory_shape(key), leaf.dtype, device=device) for device in devices]
        self._devices = devices
        self._file_dtype = leaf.file_dtype
        self._lock = threading.Lock()
        self.host_bytes = 0
        self.staged_item_bytes = leaf.file_dtype.itemsize

    def buffer(self, place: Place) -> np.ndarray:
        """New host memory."""
        return _aligned_empty(tuple(box.stop - box.start for box in place), self._file_dtype)

    def put(self, place: Place, buffer: np.ndarray) -> list[jax.Array]:
        """Sends the box to the devices, which change its dtype if that is needed."""
        start = np.array([box.start for box in place], np.int32)
        landed = []
        with self._lock:
            for i, device in enumerate(self._devices):
                self._wholes[i], done = _put_box(self._wholes[i], jax.device_put(buffer, device), start)
                landed.append(done)
        return landed

    def arrays(self) -> list[jax.Array]:
        """One for each device."""
        return self._wholes


def local_parts(leaf: StoredLeaf, mesh: Mesh, on_host: bool, pack: PackBox | None = None) -> list[Part]:
    """The parts of an array that this process's devices hold; shards and data rows that hold the same share one."""
    shards = mesh.shape[MODEL_AXIS]
    devices: dict[tuple[int, ...], list[jax.Device]] = {}
    held: dict[tuple[int, ...], tuple[tuple[slice, ...], int]] = {}
    for shard in range(shards):
        local = own_devices(mesh.devices[:, shard])
        if local:
            key = leaf.file_key(shards, shard)
            start = tuple(part.start for part in key)
            devices.setdefault(start, []).extend(local)
            held[start] = key, held.get(start, (key, 0))[1] + 1
    if leaf.packed:
        if pack is None:
            raise ValueError(f"{leaf.module} is to be packed, and nothing says how")
        return [PackedPart(leaf, *held[start], devices[start], pack) for start in held]
    kind = HostPart if on_host else DevicePart
    return [kind(leaf, *held[start], devices[start]) for start in held]


@partial(jax.jit, donate_argnums=0)
def _put_box(whole: jax.Array, box: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Also gives an item of the box, which is ready when the box is in its place: `whole` is donated again by then."""
    place = [start[axis] for axis in range(whole.ndim)]
    return lax.dynamic_update_slice(whole, box.astype(whole.dtype), place), box[(0,) * box.ndim]


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)
