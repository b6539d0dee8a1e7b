"""Loading a checkpoint onto a mesh: each device's slices from the files' bytes to the device, and nothing else.

In memory the layers of a parameter are one array with a leading axis of layers. Work goes file by file, in pieces: a
piece is read for all devices of this process together, so that no byte is read twice. On a CPU it is read straight into
its final place, or packed on its way there. Elsewhere the arrays are allocated on the devices, and pieces on their way
are in host memory, as many as a budget allows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import haiku as hk
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from grok1.checkpoint.byte_ranges import STAGING_BYTES
from grok1.checkpoint.parallel import Advance, Progress, in_parallel
from grok1.checkpoint.parts import PackBox, Part, Place, local_parts
from grok1.checkpoint.reader import Checkpoint
from grok1.host.memory import DEFAULT_LOAD_MEMORY, MIN_LOAD_MEMORY, MemoryBudget, available_bytes
from grok1.host.sizes import format_bytes
from grok1.params.sharding import MODEL_AXIS
from grok1.params.tree import StoredLeaf, parameter_tree, stored_leaves

_READERS = 4
_PIECE_BYTES = 64 << 20
_PACKED_PIECE_BYTES = 4 << 20  # what is packed is best still in a cache
_PIECES = 4  # the budget holds at least so many pieces
_CACHEABLE = 0.8  # of the available memory


def load_parameters(
    checkpoint: Checkpoint,
    mesh: Mesh,
    dtype: np.dtype | type = np.float32,
    progress: Progress | None = None,
    load_memory: int = DEFAULT_LOAD_MEMORY,
    pack: PackBox | None = None,
) -> hk.Params:
    """Reads a checkpoint onto a mesh.

    Args:
        checkpoint: an opened checkpoint, whose files have been found to be right.
        mesh: a (data, model) mesh that the model divides over.
        dtype: dtype of the embedding matrix in memory.
        progress: is called in this thread with the bytes read so far and the bytes to read. What several model
            shards hold is read once and counts for each.
        load_memory: bytes of host memory beyond the weights that may be taken at a time.
        pack: how to pack quantised weights, for a mesh of CPU devices; by default they stay as they are in the files.

    Returns:
        the parameter tree: Haiku modules with arrays and `QuantizedMatrix`es, placed by the partition rules.

    Raises:
        CheckpointError: if a file cannot be read.
        MemoryError: if there is no memory for the weights.
        ValueError: if `load_memory` is less than `MIN_LOAD_MEMORY`, or weights for other devices are to be packed.
    """
    if load_memory < MIN_LOAD_MEMORY:
        raise ValueError(
            f"load_memory is {format_bytes(load_memory)}, expected at least {format_bytes(MIN_LOAD_MEMORY)}"
        )
    on_host = all(device.platform == "cpu" for device in mesh.devices.flat)
    if pack is not None and not on_host:
        raise ValueError("only weights in host memory are packed")
    leaves = stored_leaves(checkpoint.config, dtype, packed=pack is not None)
    parts = [local_parts(leaf, mesh, on_host, pack) for leaf in leaves]
    read_parts(checkpoint, leaves, parts, progress, load_memory)
    arrays = []
    for leaf, held in zip(leaves, parts, strict=True):
        shape = leaf.global_shape(mesh.shape[MODEL_AXIS])
        on_devices = [array for part in held for array in part.arrays()]
        arrays.append(jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, leaf.partition), on_devices))
    jax.block_until_ready(arrays)
    return parameter_tree(leaves, arrays, mesh.shape[MODEL_AXIS])


def read_parts(
    checkpoint: Checkpoint,
    leaves: Sequence[StoredLeaf],
    parts: Sequence[Sequence[Part]],
    progress: Progress | None = None,
    load_memory: int = DEFAULT_LOAD_MEMORY,
) -> None:
    """Reads parts of arrays, file by file in the order of the layers, and nothing else.

    Args:
        checkpoint: an opened checkpoint.
        leaves: the arrays, of all layers or of some.
        parts: for each array its parts, which are filled.
        progress: as for `load_parameters`.
        load_memory: as for `load_parameters`.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    budget = MemoryBudget(load_memory)
    most = {False: _PIECE_BYTES, True: _PACKED_PIECE_BYTES}
    pieces = sorted(
        (
            piece
            for leaf, held in zip(leaves, parts, strict=True)
            for piece in _cut(leaf, held, min(most[leaf.packed], load_memory // _PIECES - STAGING_BYTES))
        ),
        key=lambda piece: (piece.leaf.specs[piece.layer].layer or 0, piece.index),
    )
    crowded = _crowds_memory(checkpoint, sum(part.host_bytes for held in parts for part in held), load_memory)
    unread = Counter(piece.index for piece in pieces)

    def read(piece: _Piece, advance: Advance) -> None:
        with budget.hold(STAGING_BYTES + piece.staged_bytes):
            _read_piece(checkpoint, piece, advance)

    total = sum(piece.progress_bytes for piece in pieces)
    with closing(in_parallel(pieces, read, total, progress, threads=_READERS)) as finished:
        for piece, _ in finished:
            unread[piece.index] -= 1
            if crowded and not unread[piece.index]:
                checkpoint.forget(piece.index)


def _crowds_memory(checkpoint: Checkpoint, host_bytes: int, load_memory: int) -> bool:
    """Whether the files, once read, are to leave the page cache.

    They may stay, for a quick second start, if with the weights on the host and the memory of loading they take at
    most 80 % of what is available before, or if nobody knows how much that is.
    """
    available = available_bytes()
    needed = checkpoint.total_bytes + host_bytes + load_memory
    return available is not None and needed > _CACHEABLE * available


@dataclass(frozen=True, eq=False)
class _Piece:
    """A box of one layer of an array, the same in each of its parts."""

    leaf: StoredLeaf
    parts: Sequence[Part]
    layer: int
    box: tuple[slice, ...]

    @property
    def index(self) -> int:
        return self.leaf.specs[self.layer].index

    @property
    def place(self) -> Place:
        return (slice(self.layer, self.layer + 1), *self.box) if self.leaf.stacked else self.box

    @property
    def size(self) -> int:
        return math.prod(axis.stop - axis.start for axis in self.box)

    @property
    def staged_bytes(self) -> int:
        return self.size * sum(part.staged_item_bytes for part in self.parts)

    @property
    def progress_bytes(self) -> int:
        return self.size * self.leaf.file_dtype.itemsize * sum(part.shards for part in self.parts)


def _cut(leaf: StoredLeaf, parts: Sequence[Part], piece_bytes: int) -> Iterator[_Piece]:
    """Cuts an array into pieces that take at most so many bytes of all its parts together."""
    shape = [axis.stop - axis.start for axis in parts[0].key]
    for layer in range(len(leaf.specs)):
        for box in _boxes(shape, max(1, piece_bytes // (len(parts) * leaf.file_dtype.itemsize))):
            yield _Piece(leaf, parts, layer, box)


def _boxes(shape: Sequence[int], size: int) -> Iterator[tuple[slice, ...]]:
    """Cuts an array into contiguous boxes of at most `size` items, nearly all of one shape."""
    axis = next(i for i in range(len(shape)) if math.prod(shape[i + 1 :]) <= size)
    length = size // math.prod(shape[axis + 1 :])
    length = -(-shape[axis] // -(-shape[axis] // length))
    for outer in np.ndindex(*shape[:axis]):
        for start in range(0, shape[axis], length):
            yield (
                *(slice(place, place + 1) for place in outer),
                slice(start, min(start + length, shape[axis])),
                *(slice(0, whole) for whole in shape[axis + 1 :]),
            )


def _read_piece(checkpoint: Checkpoint, piece: _Piece, advance: Advance) -> None:
    buffers = [part.buffer(piece.place) for part in piece.parts]
    slices = []
    for part, buffer in zip(piece.parts, buffers, strict=True):
        key = tuple(
            slice(whole.start + axis.start, whole.start + axis.stop)
            for whole, axis in zip(part.key, piece.box, strict=True)
        )
        slices.append((key, buffer[0] if piece.leaf.stacked else buffer))
    checkpoint.read_slices(piece.index, slices, scales=piece.leaf.scales, check=lambda: advance(0))
    landed = [part.put(piece.place, buffer) for part, buffer in zip(piece.parts, buffers, strict=True)]
    jax.block_until_ready(landed)
    advance(piece.progress_bytes)
