"""Loading a checkpoint onto a mesh: each device's slices are read from the files, and nothing else.

In memory the layers of a parameter are one array with a leading axis of layers. Files are read one after the other, in
pieces: a piece is read for all devices of this process together, so that no byte is read twice. For CPU devices it is
read in place, or packed on the way. For others the arrays are allocated on the devices, and pieces pass through host
memory, as many at a time as a budget allows.
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
from jax.sharding import Mesh

from grok1.checkpoint.byte_ranges import STAGING_BYTES
from grok1.checkpoint.parallel import Advance, ByteProgress, in_parallel
from grok1.checkpoint.reader import Checkpoint
from grok1.checkpoint.shards import Box, PackBox, Shard, box_shape, local_shards
from grok1.host.memory import DEFAULT_LOAD_MEMORY, MIN_LOAD_MEMORY, MemoryBudget, available_bytes
from grok1.host.sizes import format_bytes
from grok1.params.sharding import MODEL_AXIS
from grok1.params.tree import ParameterArray, abstract_arrays, parameter_arrays, parameter_tree

_READERS = 4
_PIECE_BYTES = 64 << 20
_PACKED_PIECE_BYTES = 4 << 20  # packing is fastest on data that is still in a cache
_PIECES = 4  # the budget holds at least this many pieces
_CACHEABLE = 0.8  # of the available memory


def load_parameters(
    checkpoint: Checkpoint,
    mesh: Mesh,
    dtype: np.dtype | type = np.float32,
    progress: ByteProgress | None = None,
    load_memory: int = DEFAULT_LOAD_MEMORY,
    pack: PackBox | None = None,
) -> hk.Params:
    """Read a checkpoint onto a mesh.

    Args:
        checkpoint: an opened checkpoint, whose structure has been checked.
        mesh: a (data, model) mesh that the model divides over.
        dtype: dtype of the embedding matrix in memory.
        progress: called in this thread. Bytes that several model shards hold are read once and counted for each.
        load_memory: limit of host memory for loading in bytes, in addition to the weights.
        pack: function that packs quantized matrices, for a mesh of CPU devices; by default they keep the files' layout.

    Returns:
        the parameter tree with arrays and `QuantizedMatrix`es, sharded over the mesh.

    Raises:
        CheckpointError: if a file cannot be read.
        MemoryError: if the weights do not fit in memory.
        ValueError: if `load_memory` is less than `MIN_LOAD_MEMORY`, or `pack` is given for other devices.
    """
    if load_memory < MIN_LOAD_MEMORY:
        raise ValueError(
            f"load_memory is {format_bytes(load_memory)}, expected at least {format_bytes(MIN_LOAD_MEMORY)}"
        )
    on_host = all(device.platform == "cpu" for device in mesh.devices.flat)
    if pack is not None and not on_host:
        raise ValueError("only weights in host memory can be packed")
    arrays = parameter_arrays(checkpoint.config, dtype, packed=pack is not None)
    shards = [local_shards(array, mesh, on_host, pack) for array in arrays]
    fill_shards(checkpoint, arrays, shards, progress, load_memory)
    loaded = [
        jax.make_array_from_single_device_arrays(
            abstract.shape, abstract.sharding, [on_device for shard in held for on_device in shard.arrays()]
        )
        for abstract, held in zip(abstract_arrays(arrays, mesh), shards, strict=True)
    ]
    jax.block_until_ready(loaded)
    return parameter_tree(arrays, loaded, mesh.shape[MODEL_AXIS])


def fill_shards(
    checkpoint: Checkpoint,
    arrays: Sequence[ParameterArray],
    shards: Sequence[Sequence[Shard]],
    progress: ByteProgress | None = None,
    load_memory: int = DEFAULT_LOAD_MEMORY,
) -> None:
    """Fill the shards of each array, file by file in the order of the layers.

    Arguments and errors are those of `load_parameters`; the arrays may have some of the layers only.
    """
    budget = MemoryBudget(load_memory)
    pieces = [piece for array, held in zip(arrays, shards, strict=True) for piece in _cut(array, held, load_memory)]
    pieces.sort(key=lambda piece: (piece.array.files[piece.layer].layer or 0, piece.index))
    crowded = _crowds_memory(checkpoint, sum(shard.host_bytes for held in shards for shard in held), load_memory)
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
    """Whether to drop files from the page cache once they are read.

    They stay, for a quick second start, if they, the weights on the host and the memory for loading fit into 80 % of
    the available memory, or if that is unknown.
    """
    available = available_bytes()
    needed = checkpoint.total_bytes + host_bytes + load_memory
    return available is not None and needed > _CACHEABLE * available


@dataclass(frozen=True, eq=False)
class _Piece:
    """A box of one layer of an array, the same in each of its shards."""

    array: ParameterArray
    shards: Sequence[Shard]
    layer: int
    layer_box: Box

    @property
    def index(self) -> int:
        return self.array.files[self.layer].index

    @property
    def box(self) -> Box:
        return (slice(self.layer, self.layer + 1), *self.layer_box) if self.array.spec.stacked else self.layer_box

    @property
    def size(self) -> int:
        return math.prod(box_shape(self.layer_box))

    @property
    def staged_bytes(self) -> int:
        return self.size * sum(shard.staged_item_bytes for shard in self.shards)

    @property
    def progress_bytes(self) -> int:
        return self.size * self.array.file_dtype.itemsize * sum(shard.holders for shard in self.shards)


def _cut(array: ParameterArray, shards: Sequence[Shard], load_memory: int) -> Iterator[_Piece]:
    """Cut an array into pieces, all its shards together, so that several fit into `load_memory`."""
    piece_bytes = min(_PACKED_PIECE_BYTES if array.packed else _PIECE_BYTES, load_memory // _PIECES - STAGING_BYTES)
    shape = box_shape(shards[0].key)
    for layer in range(len(array.files)):
        for box in _boxes(shape, max(1, piece_bytes // (len(shards) * array.file_dtype.itemsize))):
            yield _Piece(array, shards, layer, box)


def _boxes(shape: Sequence[int], size: int) -> Iterator[Box]:
    """Cut an array into contiguous boxes of at most `size` items, nearly all of one shape."""
    axis = next(i for i in range(len(shape)) if math.prod(shape[i + 1 :]) <= size)
    length = size // math.prod(shape[axis + 1 :])
    length = -(-shape[axis] // -(-shape[axis] // length))
    for outer in np.ndindex(*shape[:axis]):
        for start in range(0, shape[axis], length):
            yield (
                *(slice(index, index + 1) for index in outer),
                slice(start, min(start + length, shape[axis])),
                *(slice(0, whole) for whole in shape[axis + 1 :]),
            )


def _read_piece(checkpoint: Checkpoint, piece: _Piece, advance: Advance) -> None:
    buffers = [shard.buffer(piece.box) for shard in piece.shards]
    slices = []
    for shard, buffer in zip(piece.shards, buffers, strict=True):
        key = tuple(
            slice(whole.start + axis.start, whole.start + axis.stop)
            for whole, axis in zip(shard.key, piece.layer_box, strict=True)
        )
        slices.append((key, buffer[0] if piece.array.spec.stacked else buffer))
    checkpoint.read_slices(piece.index, slices, scales=piece.array.scales, check=lambda: advance(0))
    landed = [shard.put(piece.box, buffer) for shard, buffer in zip(piece.shards, buffers, strict=True)]
    jax.block_until_ready(landed)
    advance(piece.progress_bytes)
