"""The pickle bytes around a tensor's data, exactly as the release's files have them.

The release was written with NumPy 1.26 and `pickle.dump(obj, file, protocol=4)`. Pickle's stream depends on
nothing but dtypes and shapes, so it can be laid out without any data: the writer streams the data between the
pieces, and the size of a file is known before it exists. The rules are those of CPython's `_pickle.c`; tests
compare both.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np

from grok1.params.table import BFLOAT16, FLOAT32, INT8, ArraySpec, TensorFile

RELEASE_NUMPY_MODULE = "numpy.core.multiarray"
"""Where NumPy 1 says that its array constructor lives; NumPy 2 says `numpy._core.multiarray`."""

QUANTIZED_CLASS = ("__main__", "QuantizedWeight8bit")
"""Module and name of the class that holds a quantised weight in the release's files."""

_FRAME_TARGET = 64 * 1024  # a frame is closed at the first object after this many bytes
_FRAME_MIN = 4  # a shorter frame is written without its header
_FRAME_HEADER = 9

# How NumPy pickles a dtype: the argument of `numpy.dtype`, then byte order, item size, alignment and flags.
# Item size and alignment are -1 for NumPy's own types; 64 says that ml_dtypes has a function of its own to
# set an item.
_DTYPE_STATE: dict[np.dtype[Any], tuple[str, int, int, int]] = {
    FLOAT32: ("<", -1, -1, 0),
    INT8: ("|", -1, -1, 0),
    BFLOAT16: ("<", 2, 2, 64),
}
_DTYPE_NAME = {FLOAT32: "f4", INT8: "i1"}


@dataclass(frozen=True)
class Payload:
    """The place of an array's data, C order, little-endian.

    Attributes:
        array: 0 for the file's array or a quantised weight's values, 1 for its scales.
        nbytes: bytes of the data.
    """

    array: int
    nbytes: int


Piece = bytes | Payload


def file_pieces(
    array: ArraySpec, scales: ArraySpec | None = None, *, numpy_module: str = RELEASE_NUMPY_MODULE
) -> list[Piece]:
    """A tensor file from beginning to end: literal bytes, and where the arrays' data go.

    Args:
        array: the file's only array, or the values of a quantised weight.
        scales: the quantised weight's scales; without them the file is a plain array.
        numpy_module: the module that the array constructor is named by.

    Raises:
        ValueError: if an array has fewer than two bytes or a dtype that no checkpoint has. (The pickler
        writes an
            object of a single byte by reference to an earlier equal one, which depends on the data.)
    """
    pickler = _Pickler(numpy_module)
    if scales is None:
        pickler.save_array(0, array)
    else:
        pickler.save_quantized(array, scales)
    return pickler.finish()


def tensor_pieces(spec: TensorFile) -> list[Piece]:
    """A parameter's file as the release has it: literal bytes, and where the arrays' data go."""
    return file_pieces(spec.array, spec.scales)


def tensor_file_size(spec: TensorFile) -> int:
    """Size of a parameter's file as the release has it."""
    return pieces_size(tensor_pieces(spec))


def pieces_size(pieces: list[Piece]) -> int:
    """Bytes of the whole file."""
    return sum(piece.nbytes if isinstance(piece, Payload) else len(piece) for piece in pieces)


class _Pickler:
    """CPython's pickler at protocol 4 for the objects that tensor files are made of."""

    def __init__(self, numpy_module: str) -> None:
        self._numpy_module = numpy_module
        self._pieces: list[Piece] = [pickle.PROTO + b"\x04"]
        self._frame: list[Piece] = []
        self._frame_size = 0
        self._memo: dict[object, int] = {}
        self._memo_size = 0

    def finish(self) -> list[Piece]:
        self._write(pickle.STOP)
        self._close_frame()
        merged: list[Piece] = []
        for piece in self._pieces:
            last = merged[-1] if merged else None
            if isinstance(piece, bytes) and isinstance(last, bytes):
                merged[-1] = last + piece
            else:
                merged.append(piece)
        return merged

    # Frames. Every object begins with `_begin_object`, the only place where a full frame ends.

    def _write(self, piece: Piece) -> None:
        self._frame.append(piece)
        self._frame_size += piece.nbytes if isinstance(piece, Payload) else len(piece)

    def _close_frame(self) -> None:
        if self._frame_size >= _FRAME_MIN:
            self._pieces.append(pickle.FRAME + self._frame_size.to_bytes(8, "little"))
        self._pieces += self._frame
        self._frame, self._frame_size = [], 0

    def _begin_object(self) -> None:
        if self._frame_size >= _FRAME_TARGET:
            self._close_frame()

    def _memoize(self, key: object = None) -> None:
        """Numbers the object just written; later objects equal to `key` refer to it."""
        self._write(pickle.MEMOIZE)
        if key is not None:
            self._memo[key] = self._memo_size
        self._memo_size += 1

    def _recall(self, key: object) -> bool:
        if key not in self._memo:
            return False
        self._write(pickle.BINGET + bytes([self._memo[key]]))
        return True

    # Objects.

    def _save_int(self, value: int) -> None:
        self._begin_object()
        if 0 <= value <= 0xFF:
            self._write(pickle.BININT1 + bytes([value]))
        elif 0 <= value <= 0xFFFF:
            self._write(pickle.BININT2 + value.to_bytes(2, "little"))
        elif -(2**31) <= value < 2**31:
            self._write(pickle.BININT + value.to_bytes(4, "little", signed=True))
        else:
            size = (value.bit_length() >> 3) + 1
            self._write(pickle.LONG1 + bytes([size]) + value.to_bytes(size, "little", signed=True))

    def _save_constant(self, opcode: bytes) -> None:
        self._begin_object()
        self._write(opcode)

    def _save_string(self, text: str, *, shared: bool = True) -> None:
        self._begin_object()
        if shared and self._recall(text):
            return
        encoded = text.encode()
        self._write(pickle.SHORT_BINUNICODE + bytes([len(encoded)]) + encoded)
        self._memoize(text if shared else None)

    def _save_global(self, module: str, name: str) -> None:
        self._begin_object()
        if self._recall((module, name)):
            return
        self._save_string(module)
        self._save_string(name)
        self._write(pickle.STACK_GLOBAL)
        self._memoize((module, name))

    def _save_shape(self, shape: tuple[int, ...]) -> None:
        self._begin_object()
        if not shape:
            self._write(pickle.EMPTY_TUPLE)  # the one empty tuple is never memoized
            return
        if len(shape) > 3:
            self._write(pickle.MARK)
        for size in shape:
            self._save_int(size)
        self._write({1: pickle.TUPLE1, 2: pickle.TUPLE2, 3: pickle.TUPLE3}.get(len(shape), pickle.TUPLE))
        self._memoize()

    def _save_payload(self, array: int, nbytes: int) -> None:
        self._begin_object()
        if nbytes <= 0xFF:
            header = pickle.SHORT_BINBYTES + nbytes.to_bytes(1, "little")
        elif nbytes <= 0xFFFF_FFFF:
            header = pickle.BINBYTES + nbytes.to_bytes(4, "little")
        else:
            header = pickle.BINBYTES8 + nbytes.to_bytes(8, "little")
        if nbytes >= _FRAME_TARGET:  # large data stands between frames
            self._close_frame()
            self._pieces += [header, Payload(array, nbytes)]
        else:
            self._write(header)
            self._write(Payload(array, nbytes))
        self._memoize()

    def _save_dtype(self, dtype: np.dtype[Any]) -> None:
        """`numpy.dtype(name, False, True)`, then its state."""
        if dtype not in _DTYPE_STATE:
            raise ValueError(f"no tensor file holds arrays of {dtype}")
        byte_order, itemsize, alignment, flags = _DTYPE_STATE[dtype]
        self._begin_object()
        self._save_global("numpy", "dtype")
        self._begin_object()
        if dtype in _DTYPE_NAME:
            self._save_string(_DTYPE_NAME[dtype], shared=False)
        else:
            self._save_global("ml_dtypes", "bfloat16")
        self._save_constant(pickle.NEWFALSE)
        self._save_constant(pickle.NEWTRUE)
        self._write(pickle.TUPLE3)
        self._memoize()
        self._write(pickle.REDUCE)
        self._memoize()
        self._begin_object()
        self._write(pickle.MARK)
        self._save_int(3)
        self._save_string(byte_order)
        for _ in range(3):
            self._save_constant(pickle.NONE)
        for value in (itemsize, alignment, flags):
            self._save_int(value)
        self._write(pickle.TUPLE)
        self._memoize()
        self._write(pickle.BUILD)

    def save_array(self, index: int, array: ArraySpec) -> None:
        """`_reconstruct(numpy.ndarray, (0,), b"b")`, then its state: version, shape, dtype, order, data."""
        if array.nbytes < 2:
            raise ValueError(f"an array of shape {array.shape} has {array.nbytes} bytes, expected at least 2")
        self._begin_object()
        self._save_global(self._numpy_module, "_reconstruct")
        self._begin_object()
        self._save_global("numpy", "ndarray")
        self._save_shape((0,))
        self._begin_object()
        if not self._recall(b"b"):
            self._write(pickle.SHORT_BINBYTES + b"\x01b")
            self._memoize(b"b")
        self._write(pickle.TUPLE3)
        self._memoize()
        self._write(pickle.REDUCE)
        self._memoize()
        self._begin_object()
        self._write(pickle.MARK)
        self._save_int(1)
        self._save_shape(array.shape)
        self._save_dtype(array.dtype)
        self._save_constant(pickle.NEWFALSE)
        self._save_payload(index, array.nbytes)
        self._write(pickle.TUPLE)
        self._memoize()
        self._write(pickle.BUILD)

    def save_quantized(self, weight: ArraySpec, scales: ArraySpec) -> None:
        """An object of the release's class whose `__dict__` is `{"weight": ..., "scales": ...}`."""
        self._begin_object()
        self._save_global(*QUANTIZED_CLASS)
        self._save_shape(())
        self._write(pickle.NEWOBJ)
        self._memoize()
        self._begin_object()
        self._write(pickle.EMPTY_DICT)
        self._memoize()
        self._write(pickle.MARK)
        self._save_string("weight")
        self.save_array(0, weight)
        self._save_string("scales")
        self.save_array(1, scales)
        self._write(pickle.SETITEMS)
        self._write(pickle.BUILD)
