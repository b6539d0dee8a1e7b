"""Symbols that the pickle scanner's stack holds instead of objects."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np

from grok1.checkpoint.pickled.framing import QUANTIZED_CLASS
from grok1.params.table import BFLOAT16, FLOAT32, INT8, ArraySpec


@dataclass(frozen=True)
class StoredArray(ArraySpec):
    """An array in a file, C order, little-endian, no dimension zero.

    Attributes:
        offset: bytes from the file's beginning to the array's first.
    """

    offset: int


class Known(enum.Enum):
    """The importable names that tensor files refer to."""

    RECONSTRUCT = "numpy._core.multiarray._reconstruct"
    NDARRAY = "numpy.ndarray"
    DTYPE = "numpy.dtype"
    BFLOAT16 = "ml_dtypes.bfloat16"
    QUANTIZED = ".".join(QUANTIZED_CLASS)


KNOWN_NAMES = {tuple(known.value.rsplit(".", 1)): known for known in Known}
KNOWN_NAMES["numpy.core.multiarray", "_reconstruct"] = Known.RECONSTRUCT  # the name in NumPy 1
KNOWN_DTYPES: dict[object, np.dtype[Any]] = {"f4": FLOAT32, "i1": INT8, Known.BFLOAT16: BFLOAT16}


@dataclass(frozen=True)
class BytesSymbol:
    """A bytes object, by its position in the file."""

    offset: int
    size: int


@dataclass(eq=False)
class DTypeSymbol:
    """A dtype, `built` once BUILD gave it its state."""

    dtype: np.dtype[Any]
    built: bool = False


@dataclass(eq=False)
class ArraySymbol:
    """An array, `stored` once BUILD gave it its state."""

    stored: StoredArray | None = None


@dataclass(eq=False)
class QuantizedSymbol:
    """A quantized weight, with `attributes` once BUILD gave it its state."""

    attributes: dict[str, object] | None = None


def describe(value: object) -> str:
    """A short description of a symbol. Never its repr, which may be large or deep."""
    if isinstance(value, Known):
        return value.value
    if isinstance(value, str):
        return ascii(value)
    if value is None or isinstance(value, int):
        return str(value)
    names = {
        ArraySymbol: "an array",
        DTypeSymbol: "a dtype",
        QuantizedSymbol: "a quantized weight",
        BytesSymbol: "bytes",
    }
    return names.get(type(value), f"a {type(value).__name__}")
