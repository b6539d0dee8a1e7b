"""The pickle bytes around a tensor's data, exactly as in the release's files.

The release was written with NumPy 1.26 and `pickle.dump(obj, file, protocol=4)`. The stream depends only on dtypes and
shapes, so the standard library's pickler lays it out without any data: the writer streams the data into the gaps, and
the size of a file is known before it exists.
"""

from __future__ import annotations

import io
import pickle
import struct
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from grok1.params.table import BFLOAT16, FLOAT32, INT8, ArraySpec, TensorFile

QUANTIZED_CLASS = ("__main__", "QuantizedWeight8bit")
"""Module and name of the class that holds a quantized weight in the release's files."""

_FRAME_HEADER = 9
_reduce_array: Any = np.empty(0).__reduce__  # typeshed allows for a string

# How NumPy 1.26 pickles a dtype: the argument of `numpy.dtype`, then byte order, item size, alignment and flags.
# Item size and alignment are -1 for NumPy's own types; the flag 64 marks ml_dtypes's own function to set an item.
_DTYPES: dict[np.dtype[Any], tuple[object, str, int, int, int]] = {
    FLOAT32: ("f4", "<", -1, -1, 0),
    INT8: ("i1", "|", -1, -1, 0),
    BFLOAT16: (ml_dtypes.bfloat16, "<", 2, 2, 64),
}


@dataclass(frozen=True)
class Payload:
    """Gap for an array's data, C order, little-endian.

    Attributes:
        array: 0 for the file's array or a quantized weight's values, 1 for its scales.
        nbytes: bytes of the data.
    """

    array: int
    nbytes: int


Segment = bytes | Payload


def file_segments(
    array: ArraySpec, scales: ArraySpec | None = None, *, numpy_module: str = "numpy.core.multiarray"
) -> list[Segment]:
    """A tensor file from beginning to end: literal bytes, and gaps for the arrays' data.

    Args:
        array: the file's only array, or the values of a quantized weight.
        scales: the quantized weight's scales; None for a plain array.
        numpy_module: the module of NumPy's array constructor; NumPy 2 says `numpy._core.multiarray`.

    Raises:
        ValueError: if an array has fewer than two bytes (Python shares the objects of single bytes, so the stream
            depends on the data) or a dtype that no checkpoint has.
    """
    pickler = _Pickler(numpy_module)
    pickler.dump(array if scales is None else _Quantized(array, scales))
    return pickler.segments()


def tensor_segments(spec: TensorFile) -> list[Segment]:
    """A parameter's file in the release's format: literal bytes, and gaps for the arrays' data."""
    return file_segments(spec.array, spec.scales)


def tensor_file_size(spec: TensorFile) -> int:
    """Size of a parameter's file in the release's format."""
    return sum(segment.nbytes if isinstance(segment, Payload) else len(segment) for segment in tensor_segments(spec))


class _Quantized:
    """Placeholder of an object of the release's class, whose `__dict__` is `{"weight": ..., "scales": ...}`."""

    def __init__(self, weight: ArraySpec, scales: ArraySpec) -> None:
        self.weight = weight
        self.scales = scales


_GLOBALS: dict[object, tuple[str, str]] = {
    np.ndarray: ("numpy", "ndarray"),
    np.dtype: ("numpy", "dtype"),
    ml_dtypes.bfloat16: ("ml_dtypes", "bfloat16"),
    _Quantized: QUANTIZED_CLASS,
}
_PythonPickler: Any = pickle._Pickler  # its methods are not in typeshed


class _Pickler(_PythonPickler):
    """The standard library's pickler, which writes an `ArraySpec` as a NumPy array with a gap for its data."""

    def __init__(self, numpy_module: str) -> None:
        self._stream = io.BytesIO()
        super().__init__(self._stream, protocol=4)
        self._globals = _GLOBALS | {_reduce_array()[0]: (numpy_module, "_reconstruct")}
        self._gaps: list[tuple[int, int, Payload]] = []  # with beginning and end in the stream

    def segments(self) -> list[Segment]:
        stream, position, segments = self._stream.getvalue(), 0, list[Segment]()
        for start, stop, payload in self._gaps:
            segments += [stream[position:start], payload]
            position = stop
        return [*segments, stream[position:]]

    def reducer_override(self, obj: object) -> Any:
        """Call and states as NumPy has them. A tuple must be new, as in NumPy: pickle writes the same object once."""
        if isinstance(obj, ArraySpec):
            if obj.nbytes < 2:
                raise ValueError(f"an array of shape {obj.shape} has {obj.nbytes} bytes, expected at least 2")
            payload = Payload(len(self._gaps), obj.nbytes)
            reconstruct, arguments, _ = _reduce_array()
            return reconstruct, arguments, (1, (*obj.shape,), obj.dtype, False, payload)
        if isinstance(obj, np.dtype):
            if obj not in _DTYPES:
                raise ValueError(f"unsupported dtype {obj}")
            name, byte_order, *sizes_and_flags = _DTYPES[obj]
            return np.dtype, (name, False, True), (3, byte_order, None, None, None, *sizes_and_flags)
        return NotImplemented

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """Write the release's name of an object, which need not be importable here."""
        module, name = self._globals[obj]
        self.save(module)
        self.save(name)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)

    def _save_payload(self, payload: Payload) -> None:
        """As `save_bytes`: small data in the frame, here as zeros to cut out again; large data between frames."""
        size = payload.nbytes
        if size < self.framer._FRAME_SIZE_TARGET:
            self.save_bytes(bytes(size))
            stop = self._stream.tell() + _FRAME_HEADER + self.framer.current_frame.tell() - len(pickle.MEMOIZE)
            self._gaps.append((stop - size, stop, payload))
        else:
            opcode, form = (pickle.BINBYTES, "<I") if size < 2**32 else (pickle.BINBYTES8, "<Q")
            self._write_large_bytes(opcode + struct.pack(form, size), b"")
            self._gaps.append((self._stream.tell(), self._stream.tell(), payload))
            self.memoize(payload)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, Payload: _save_payload}
