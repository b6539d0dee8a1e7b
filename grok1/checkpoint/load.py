"""Loading a checkpoint onto a mesh: each device's slices from the files' bytes to the device, and nothing else.

In memory the layers of a parameter are one array with a leading axis of layers. On a CPU each device's part of it is
read from the files straight into its final place. Elsewhere it is allocated on the device and filled layer by layer,
with a few slices in flight on the host.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from functools import partial

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from grok1.checkpoint.layout import TensorSpec
from grok1.checkpoint.parameters import StoredLeaf, parameter_tree, stored_leaves
from grok1.checkpoint.reader import Checkpoint
from grok1.sharding import MODEL_AXIS

_READERS = 4
_STAGING_BYTES = 1 << 30  # host memory for slices on their way to a device
_CAST_BYTES = 32 << 20  # a slice that changes its dtype goes through a buffer of this size
_ALIGNMENT = 64  # XLA takes a host buffer as it is if it is aligned so

Progress = Callable[[int, int], None]


def load_parameters(
    checkpoint: Checkpoint,
    mesh: Mesh,
    dtype: np.dtype | type = np.float32,
    progress: Progress | None = None,
) -> hk.Params:
    """Reads a checkpoint onto a mesh.

    Args:
        checkpoint: an opened checkpoint, whose files have been found to be right.
        mesh: a (data, model) mesh that the model divides over.
        dtype: dtype of the embedding matrix in memory.
        progress: is called with the bytes read so far and the bytes to read, from several threads in turn.

    Returns:
        the parameter tree: Haiku modules with arrays and `QuantizedWeight`s, placed by the partition rules.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    leaves = stored_leaves(checkpoint.config, dtype)
    on_host = all(device.platform == "cpu" for device in mesh.devices.flat)
    fill = _fill_on_host if on_host else _fill_on_device
    counter = _Counter(leaves, mesh.shape[MODEL_AXIS], progress)
    arrays: list[jax.Array] = []
    pool = concurrent.futures.ThreadPoolExecutor(_READERS, thread_name_prefix="grok1-read")
    try:
        for leaf in leaves:
            arrays.append(fill(checkpoint, leaf, mesh, pool, counter))
        jax.block_until_ready(arrays)
    finally:
        pool.shutdown(cancel_futures=True)
    return parameter_tree(leaves, arrays)


class _Counter:
    """Counts the bytes read."""

    def __init__(self, leaves: tuple[StoredLeaf, ...], shards: int, progress: Progress | None):
        self._progress = progress
        self._lock = threading.Lock()
        self._done = 0
        self._total = shards * sum(
            len(leaf.specs) * int(np.prod(leaf.part_shape(shards))) * leaf.file_dtype.itemsize for leaf in leaves
        )

    def add(self, count: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += count
                self._progress(self._done, self._total)


def _read_part(
    checkpoint: Checkpoint, leaf: StoredLeaf, spec: TensorSpec, key: tuple[slice, ...], out: np.ndarray
) -> None:
    """Reads a part of one file's array into `out`, which may have another dtype than the file."""
    if out.dtype == leaf.file_dtype:
        checkpoint.read_into(spec.index, out, key, scales=leaf.scales)
        return
    row_bytes = int(np.prod(out.shape[1:])) * leaf.file_dtype.itemsize
    rows = max(1, _CAST_BYTES // row_bytes)
    for start in range(0, out.shape[0], rows):
        piece = out[start : start + rows]
        buffer = np.empty(piece.shape, leaf.file_dtype)
        first = key[0].start + start
        checkpoint.read_into(spec.index, buffer, (slice(first, first + len(piece)), *key[1:]), scales=leaf.scales)
        piece[...] = buffer


def _devices_by_shard(mesh: Mesh) -> Iterator[tuple[int, list[jax.Device]]]:
    """Each model shard that has devices in this process, with those devices: one for each data row."""
    for shard in range(mesh.shape[MODEL_AXIS]):
        devices = [d for d in mesh.devices[:, shard] if d.process_index == jax.process_index()]
        if devices:
            yield shard, devices


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _assemble(leaf: StoredLeaf, mesh: Mesh, parts: list[jax.Array]) -> jax.Array:
    shape = leaf.global_shape(mesh.shape[MODEL_AXIS])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, leaf.partition), parts)


def _fill_on_host(
    checkpoint: Checkpoint,
    leaf: StoredLeaf,
    mesh: Mesh,
    pool: concurrent.futures.ThreadPoolExecutor,
    counter: _Counter,
) -> jax.Array:
    """Reads into host memory that the CPU devices then use as it is; data rows share it."""
    shards = mesh.shape[MODEL_AXIS]
    parts: list[jax.Array] = []
    for shard, devices in _devices_by_shard(mesh):
        key = leaf.file_key(shards, shard)
        whole = _aligned_empty(leaf.local_shape(shards), leaf.dtype)

        def read(layer: int, key: tuple[slice, ...] = key, whole: np.ndarray = whole) -> None:
            out = whole[layer] if leaf.stacked else whole
            _read_part(checkpoint, leaf, leaf.specs[layer], key, out)
            counter.add(out.size * leaf.file_dtype.itemsize)

        for _ in pool.map(read, range(len(leaf.specs))):
            pass
        parts.extend(jax.device_put(whole, device, may_alias=True) for device in devices)
    return _assemble(leaf, mesh, parts)


@partial(jax.jit, donate_argnums=0)
def _put_layer(stack: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(stack, part, layer, 0)


def _fill_on_device(
    checkpoint: Checkpoint,
    leaf: StoredLeaf,
    mesh: Mesh,
    pool: concurrent.futures.ThreadPoolExecutor,
    counter: _Counter,
) -> jax.Array:
    """Fills arrays on the devices layer by layer; a few slices are on the host at a time."""
    shards = mesh.shape[MODEL_AXIS]
    part_shape = leaf.part_shape(shards)
    part_bytes = int(np.prod(part_shape)) * leaf.file_dtype.itemsize
    parts: list[jax.Array] = []
    for shard, devices in _devices_by_shard(mesh):
        key = leaf.file_key(shards, shard)

        def read(spec: TensorSpec, key: tuple[slice, ...] = key) -> np.ndarray:
            part = np.empty(part_shape, leaf.dtype)
            _read_part(checkpoint, leaf, spec, key, part)
            counter.add(part_bytes)
            return part

        if not leaf.stacked:
            part = read(leaf.specs[0])
            parts.extend(jax.device_put(part, device) for device in devices)
            continue
        stacks = [jnp.zeros(leaf.local_shape(shards), leaf.dtype, device=device) for device in devices]
        ahead = max(1, min(_READERS, _STAGING_BYTES // part_bytes))
        waiting = [pool.submit(read, spec) for spec in leaf.specs[:ahead]]
        for layer in range(len(leaf.specs)):
            part = waiting.pop(0).result()
            for i, device in enumerate(devices):
                stacks[i] = _put_layer(stacks[i], jax.device_put(part, device), layer)
            jax.block_until_ready(stacks)  # the host's slice is free again only then
            del part
            if layer + ahead < len(leaf.specs):
                waiting.append(pool.submit(read, leaf.specs[layer + ahead]))
        parts.extend(stacks)
    return _assemble(leaf, mesh, parts)
