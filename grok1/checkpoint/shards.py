"""Shards of an array in memory: what the model shards of this process hold of it, on the host or on devices."""

from __future__ import annotations

import abc
import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from grok1.params.sharding import MODEL_AXIS, local_devices
from grok1.params.tree import ParameterArray

Box = tuple[slice, ...]
"""A box in a shard, whose first axis is that of the layers if there is one."""

PackBox = Callable[[np.ndarray, np.ndarray, int, int, int, int], None]
"""Writes an int8 box `[rows, columns]` into the panels of a matrix: given the box, the panels, the box's first row and
first column, and the matrix's number of scale groups and the rows of each."""

_ALIGNMENT = 64  # XLA uses a host buffer with this alignment without copying it


class Shard(abc.ABC):
    """What one or several model shards hold of an array, all layers of it.

    Attributes:
        key: the part of each file's array.
        holders: number of this process's model shards that hold it.
        host_bytes: its size in host memory.
        staged_item_bytes: additional host memory for each item while it is loaded.
    """

    def __init__(self, array: ParameterArray, key: tuple[slice, ...], holders: int, devices: Sequence[jax.Device]):
        self.key = key
        self.holders = holders
        self.host_bytes = 0
        self.staged_item_bytes = array.file_dtype.itemsize
        self._file_dtype = array.file_dtype
        self._devices = devices

    @abc.abstractmethod
    def buffer(self, box: Box) -> np.ndarray:
        """Memory to read a box into: of its shape and the file's dtype."""

    @abc.abstractmethod
    def put(self, box: Box, buffer: np.ndarray) -> list[jax.Array]:
        """Store a box that was read; the buffer is free again when the returned arrays are ready."""

    @abc.abstractmethod
    def arrays(self) -> list[jax.Array]:
        """Return the shard on each of its devices, once every box was put."""


class HostShard(Shard):
    """A shard in host memory, which CPU devices use without a copy and share."""

    def __init__(self, array: ParameterArray, key: tuple[slice, ...], holders: int, devices: Sequence[jax.Device]):
        super().__init__(array, key, holders, devices)
        self._whole = _aligned_empty(array.memory_shape(key), array.dtype)
        self.host_bytes = self._whole.nbytes
        if array.dtype == array.file_dtype:
            self.staged_item_bytes = 0

    def buffer(self, box: Box) -> np.ndarray:
        """Return the box itself, or new memory if its dtype is to be converted."""
        target = self._whole[box]
        return target if target.dtype == self._file_dtype else np.empty(target.shape, self._file_dtype)

    def put(self, box: Box, buffer: np.ndarray) -> list[jax.Array]:
        """Convert the dtype if needed."""
        if buffer.dtype != self._whole.dtype:
            self._whole[box] = buffer
        return []

    def arrays(self) -> list[jax.Array]:
        """Return the same memory for each device."""
        return [jax.device_put(self._whole, device, may_alias=True) for device in self._devices]


class PackedShard(HostShard):
    """A shard of a quantized matrix in host memory, in panels."""

    def __init__(
        self,
        array: ParameterArray,
        key: tuple[slice, ...],
        holders: int,
        devices: Sequence[jax.Device],
        pack: PackBox,
    ):
        super().__init__(array, key, holders, devices)
        self._pack = pack
        self._groups = array.groups_of(key[-2].stop - key[-2].start)

    def buffer(self, box: Box) -> np.ndarray:
        """New memory."""
        return np.empty(box_shape(box), self._file_dtype)

    def put(self, box: Box, buffer: np.ndarray) -> list[jax.Array]:
        """Pack the box."""
        *lead, rows, columns = box
        for index in np.ndindex(*buffer.shape[:-2]):
            matrix = tuple(axis.start + i for axis, i in zip(lead, index, strict=True))
            self._pack(buffer[index], self._whole[matrix], rows.start, columns.start, *self._groups)
        return []


class DeviceShard(Shard):
    """A shard on each of several devices, filled from buffers on the host."""

    def __init__(self, array: ParameterArray, key: tuple[slice, ...], holders: int, devices: Sequence[jax.Device]):
        super().__init__(array, key, holders, devices)
        self._wholes = [jnp.zeros(array.memory_shape(key), array.dtype, device=device) for device in devices]
        self._lock = threading.Lock()

    def buffer(self, box: Box) -> np.ndarray:
        """New host memory."""
        return _aligned_empty(box_shape(box), self._file_dtype)

    def put(self, box: Box, buffer: np.ndarray) -> list[jax.Array]:
        """Send the box to the devices, which convert its dtype if needed."""
        start = np.array([axis.start for axis in box], np.int32)
        landed = []
        with self._lock:
            for i, device in enumerate(self._devices):
                self._wholes[i], done = _put_box(self._wholes[i], jax.device_put(buffer, device), start)
                landed.append(done)
        return landed

    def arrays(self) -> list[jax.Array]:
        """One for each device."""
        return self._wholes


def local_shards(array: ParameterArray, mesh: Mesh, on_host: bool, pack: PackBox | None = None) -> list[Shard]:
    """The shards of an array on this process's devices; model shards and data rows that hold the same share one."""
    shards = mesh.shape[MODEL_AXIS]
    keys: dict[tuple[int, ...], tuple[slice, ...]] = {}  # by where they start
    holders: Counter[tuple[int, ...]] = Counter()
    devices: dict[tuple[int, ...], list[jax.Device]] = defaultdict(list)
    for shard in range(shards):
        local = local_devices(mesh.devices[:, shard])
        if local:
            key = array.file_key(shards, shard)
            start = tuple(part.start for part in key)
            keys[start] = key
            holders[start] += 1
            devices[start] += local
    if not array.packed:
        make: Callable[..., Shard] = HostShard if on_host else DeviceShard
    elif pack is not None:
        make = partial(PackedShard, pack=pack)
    else:
        raise ValueError(f"{array.spec.path} is to be packed, but no function to pack it is given")
    return [make(array, key, holders[start], devices[start]) for start, key in keys.items()]


@partial(jax.jit, donate_argnums=0)
def _put_box(whole: jax.Array, box: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Also returns an item of the box, which is ready once the box is written: `whole` is donated again by then."""
    index = [start[axis] for axis in range(whole.ndim)]
    return lax.dynamic_update_slice(whole, box.astype(whole.dtype), index), box[(0,) * box.ndim]


def box_shape(box: Box) -> tuple[int, ...]:
    """Size of each axis of a box."""
    return tuple(axis.stop - axis.start for axis in box)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)
