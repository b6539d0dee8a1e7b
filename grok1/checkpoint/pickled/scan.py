"""Find the arrays of a tensor file in its pickle's opcodes, without unpickling it.

Unpickling calls any function that the file names. This scanner calls nothing: it interprets the opcodes of NumPy arrays
on a stack of symbols, skips the arrays' data and rejects everything else. Its memory is bounded for any input.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from grok1.checkpoint.pickled.source import MAX_STRING, PickleSource, ScanError, open_regular
from grok1.checkpoint.pickled.symbols import (
    KNOWN_DTYPES,
    KNOWN_NAMES,
    ArraySymbol,
    BytesSymbol,
    DTypeSymbol,
    Known,
    QuantizedSymbol,
    StoredArray,
    describe,
)
from grok1.params.table import BFLOAT16, FLOAT32, INT8

__all__ = ["ScanError", "StoredArray", "StoredTensor", "scan"]

_MAX_STACK = 256
_MAX_MEMO = 1024
_MAX_DIMENSIONS = 32
# Flags of a dtype for access to items from Python, which differ between versions of ml_dtypes.
# The others mark items as pointers or Python objects.
_ACCESS_FLAGS = 0x70


@dataclass(frozen=True)
class StoredTensor:
    """What a tensor file holds.

    Attributes:
        array: float32, or the int8 values of a quantized weight.
        scales: a quantized weight's bfloat16 scales, otherwise None.
        file_bytes: size of the file.
    """

    array: StoredArray
    scales: StoredArray | None
    file_bytes: int


def scan(path: Path) -> StoredTensor:
    """Find the arrays of one tensor file. Nothing that the file names is imported or called.

    Accepts, at pickle protocol 4, one NumPy float32 array or one `__main__.QuantizedWeight8bit` with the
    attributes `weight` (int8) and `scales` (bfloat16), all little-endian and in C order, with any framing and
    memo numbering.

    Raises:
        CheckpointError: if the file cannot be read or contains anything else; the message gives the byte and opcode.
    """
    try:
        with open_regular(path) as file:
            return _Scanner(PickleSource(path, file)).scan()
    except OSError as error:
        raise ScanError(path, f"cannot be read: {error.strerror or error}") from None


class _Scanner:
    """The stack machine for one file."""

    def __init__(self, source: PickleSource) -> None:
        self._source = source
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def scan(self) -> StoredTensor:
        if self._source.size == 0:
            self._reject("the file is empty, expected a pickled array")
        if self._source.next_opcode() != pickle.PROTO[0]:
            self._reject("not a pickle of protocol 4, expected opcode PROTO")
        version = self._source.unsigned(1)
        if version != 4:
            self._reject(f"pickle protocol {version}, expected 4")
        while (code := self._source.next_opcode()) != pickle.STOP[0]:
            handler = _HANDLERS.get(code)
            if handler is None:
                self._reject("unexpected opcode (nothing was executed)")
            handler(self)
            if len(self._stack) > _MAX_STACK or len(self._marks) > _MAX_STACK or len(self._memo) > _MAX_MEMO:
                self._reject("too many nested or memoized objects")
        return self._result()

    def _reject(self, fault: str) -> NoReturn:
        self._source.reject(fault)

    # The stack.

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _top(self) -> object:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            self._reject("stack underflow")
        return self._stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        self._stack.pop()
        return value

    def _pop_to_mark(self) -> list[object]:
        if not self._marks:
            self._reject("missing MARK")
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    # Opcodes.

    def _frame(self) -> None:
        self._source.begin_frame(self._source.unsigned(8))

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _string(self, length_bytes: int) -> None:
        size = self._source.unsigned(length_bytes)
        if size > MAX_STRING:
            self._reject(f"string of {size} bytes, expected at most {MAX_STRING}")
        try:
            self._push(self._source.take(size).decode("utf-8"))
        except UnicodeDecodeError:
            self._reject("string is not valid UTF-8")

    def _bytes(self, length_bytes: int) -> None:
        size = self._source.unsigned(length_bytes)
        self._push(BytesSymbol(self._source.position, size))
        self._source.skip(size)

    def _signed(self, size: int) -> None:
        self._push(int.from_bytes(self._source.take(size), "little", signed=True))

    def _long1(self) -> None:
        size = self._source.unsigned(1)
        if size > 8:
            self._reject(f"integer of {size} bytes, expected at most 8")
        self._signed(size)

    def _tuple(self, size: int | None) -> None:
        values = self._pop_to_mark() if size is None else [self._pop() for _ in range(size)][::-1]
        self._push(tuple(values))

    def _set_items(self, items: list[object]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            self._reject(f"cannot set items of {describe(target)}, expected a dict and pairs")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) or key in target:
                self._reject(f"invalid or duplicate attribute {describe(key)}")
            target[key] = value

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def _put(self, size: int) -> None:
        index = self._source.unsigned(size)
        if index >= _MAX_MEMO:
            self._reject(f"memo index {index}, expected less than {_MAX_MEMO}")
        self._memo[index] = self._top()

    def _get(self, size: int) -> None:
        index = self._source.unsigned(size)
        if index not in self._memo:
            self._reject(f"memo index {index} is not set")
        self._push(self._memo[index])

    def _known(self, module: object, name: object) -> Known:
        if not isinstance(module, str) or not isinstance(name, str):
            self._reject("name is not a string")
        known = KNOWN_NAMES.get((module, name))
        if known is None:
            self._reject(
                f"reference to {f'{module}.{name}'!a}, expected only NumPy arrays and "
                f"{Known.QUANTIZED.value} (nothing was executed)"
            )
        return known

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._push(self._known(module, name))

    def _global(self) -> None:
        self._push(self._known(self._source.line(), self._source.line()))

    def _inst(self) -> None:
        self._known(self._source.line(), self._source.line())
        self._reject("unexpected construction of an object (nothing was executed)")

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        count = len(arguments) if isinstance(arguments, tuple) else -1
        if function is Known.DTYPE and count == 3:
            self._push(self._new_dtype(*arguments))
        elif function is Known.RECONSTRUCT and count == 3:
            kind, shape, code = arguments
            # In all versions of NumPy: an empty ndarray of bytes, whose state BUILD sets.
            is_zero = shape == (0,) and type(shape[0]) is int
            if kind is not Known.NDARRAY or not is_zero or not self._is_byte_b(code):
                self._reject('invalid arguments of _reconstruct, expected (numpy.ndarray, (0,), b"b")')
            self._push(ArraySymbol())
        else:
            self._reject(f"unexpected call of {describe(function)} (nothing was executed)")

    def _new_dtype(self, name: object, align: object, copy: object) -> DTypeSymbol:
        dtype = KNOWN_DTYPES.get(name) if isinstance(name, str | Known) else None
        if dtype is None:
            self._reject(f"array has dtype {describe(name)}, expected 'f4', 'i1' or ml_dtypes.bfloat16")
        if align is not False or copy is not True:
            self._reject("invalid arguments of numpy.dtype, expected (name, False, True)")
        return DTypeSymbol(dtype)

    def _is_byte_b(self, value: object) -> bool:
        return isinstance(value, BytesSymbol) and value.size == 1 and self._source.peek_behind(value.offset, 1) == b"b"

    def _new_object(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if kind is not Known.QUANTIZED or not isinstance(arguments, tuple) or arguments:
            self._reject(f"object of {describe(kind)}, expected {Known.QUANTIZED.value} (nothing was executed)")
        self._push(QuantizedSymbol())

    def _build(self) -> None:
        state = self._pop()
        target = self._top()
        if isinstance(target, DTypeSymbol) and isinstance(state, tuple) and not target.built:
            self._build_dtype(target, state)
        elif isinstance(target, ArraySymbol) and isinstance(state, tuple) and target.stored is None:
            target.stored = self._stored_array(state)
        elif isinstance(target, QuantizedSymbol) and isinstance(state, dict) and target.attributes is None:
            if set(state) != {"weight", "scales"}:
                self._reject("invalid attributes of a quantized weight, expected weight and scales")
            target.attributes = dict(state)
        else:
            self._reject(f"cannot set the state of {describe(target)} to {describe(state)}")

    def _build_dtype(self, target: DTypeSymbol, state: tuple[object, ...]) -> None:
        if len(state) != 8 or state[0] != 3:
            self._reject("unknown version of a dtype, expected NumPy's version 3")
        _, order, subarray, names, fields, itemsize, alignment, flags = state
        expected = "|" if target.dtype.itemsize == 1 else "<"
        if order != expected:
            self._reject(f"{target.dtype} has byte order {describe(order)}, expected {expected!r}")
        if subarray is not None or names is not None or fields is not None:
            self._reject("structured dtype, expected numbers")
        if itemsize not in (-1, target.dtype.itemsize) or alignment not in (-1, 1, 2, 4):
            self._reject(f"{target.dtype} has item size {describe(itemsize)} and alignment {describe(alignment)}")
        if type(flags) is not int or flags & ~_ACCESS_FLAGS:
            self._reject(f"{target.dtype} has the flags {describe(flags)}, expected those of numbers")
        target.built = True

    def _stored_array(self, state: tuple[object, ...]) -> StoredArray:
        if len(state) != 5 or state[0] != 1:
            self._reject("unknown version of an array, expected NumPy's version 1")
        _, shape, dtype, fortran, data = state
        if not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS:
            self._reject(f"array shape is {describe(shape)}, expected up to {_MAX_DIMENSIONS} integers")
        for size in shape:
            if type(size) is not int or size < 1:
                self._reject(f"array has a dimension of {describe(size)}, expected 1 or more")
        if not isinstance(dtype, DTypeSymbol) or not dtype.built:
            self._reject("array has an incomplete dtype")
        if fortran is not False:
            self._reject("array is in Fortran order, expected C order")
        if not isinstance(data, BytesSymbol):
            self._reject(f"array data is {describe(data)}, expected bytes")
        stored = StoredArray(dtype.dtype, shape, data.offset)
        if stored.nbytes != data.size:
            self._reject(
                f"{dtype.dtype} array of shape {shape} has {data.size} bytes of data, expected {stored.nbytes}"
            )
        return stored

    def _result(self) -> StoredTensor:
        if self._source.position != self._source.size:
            rest = self._source.size - self._source.position
            self._reject(f"{rest} byte{'s' * (rest != 1)} after the end of the pickle")
        if len(self._stack) != 1 or self._marks:
            self._reject(f"pickle of {len(self._stack)} objects, expected one")
        value = self._stack[0]
        if isinstance(value, QuantizedSymbol) and value.attributes is not None:
            weight = self._complete(value.attributes["weight"], INT8, "the attribute weight")
            scales = self._complete(value.attributes["scales"], BFLOAT16, "the attribute scales")
            return StoredTensor(weight, scales, self._source.size)
        return StoredTensor(self._complete(value, FLOAT32, "the file's object"), None, self._source.size)

    def _complete(self, value: object, dtype: np.dtype[Any], what: str) -> StoredArray:
        if not isinstance(value, ArraySymbol) or value.stored is None:
            self._reject(f"{what} is {describe(value)}, expected a complete {dtype} array")
        if value.stored.dtype != dtype:
            self._reject(f"{what} is an array of {value.stored.dtype}, expected {dtype}")
        return value.stored


_HANDLERS: dict[int, Callable[[_Scanner], None]] = {
    opcode[0]: handler
    for opcode, handler in {
        pickle.FRAME: _Scanner._frame,
        pickle.MARK: _Scanner._mark,
        pickle.SHORT_BINUNICODE: lambda scanner: scanner._string(1),
        pickle.BINUNICODE: lambda scanner: scanner._string(4),
        pickle.SHORT_BINBYTES: lambda scanner: scanner._bytes(1),
        pickle.BINBYTES: lambda scanner: scanner._bytes(4),
        pickle.BINBYTES8: lambda scanner: scanner._bytes(8),
        pickle.BININT: lambda scanner: scanner._signed(4),
        pickle.BININT1: lambda scanner: scanner._push(scanner._source.unsigned(1)),
        pickle.BININT2: lambda scanner: scanner._push(scanner._source.unsigned(2)),
        pickle.LONG1: _Scanner._long1,
        pickle.NONE: lambda scanner: scanner._push(None),
        pickle.NEWTRUE: lambda scanner: scanner._push(True),
        pickle.NEWFALSE: lambda scanner: scanner._push(False),
        pickle.EMPTY_TUPLE: lambda scanner: scanner._push(()),
        pickle.TUPLE1: lambda scanner: scanner._tuple(1),
        pickle.TUPLE2: lambda scanner: scanner._tuple(2),
        pickle.TUPLE3: lambda scanner: scanner._tuple(3),
        pickle.TUPLE: lambda scanner: scanner._tuple(None),
        pickle.EMPTY_DICT: lambda scanner: scanner._push({}),
        pickle.SETITEM: _Scanner._set_item,
        pickle.SETITEMS: lambda scanner: scanner._set_items(scanner._pop_to_mark()),
        pickle.MEMOIZE: _Scanner._memoize,
        pickle.BINPUT: lambda scanner: scanner._put(1),
        pickle.LONG_BINPUT: lambda scanner: scanner._put(4),
        pickle.BINGET: lambda scanner: scanner._get(1),
        pickle.LONG_BINGET: lambda scanner: scanner._get(4),
        pickle.STACK_GLOBAL: _Scanner._stack_global,
        pickle.GLOBAL: _Scanner._global,
        pickle.INST: _Scanner._inst,
        pickle.REDUCE: _Scanner._reduce,
        pickle.NEWOBJ: _Scanner._new_object,
        pickle.BUILD: _Scanner._build,
    }.items()
}
