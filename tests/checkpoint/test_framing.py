import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grok1.checkpoint.pickled.framing import Payload, file_segments, tensor_segments
from grok1.config import ModelConfig
from grok1.params.table import ArraySpec, tensor_table

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
INSTALLED = np.ndarray((1,)).__reduce__()[0].__module__
"""What the installed NumPy calls the module of its array constructor."""


def emit(*arrays):
    specs = [ArraySpec(array.dtype, array.shape) for array in arrays]
    segments = file_segments(*specs, numpy_module=INSTALLED)
    assert all(segment.nbytes == arrays[segment.array].nbytes for segment in segments if isinstance(segment, Payload))
    return b"".join(segment if isinstance(segment, bytes) else arrays[segment.array].tobytes() for segment in segments)


def numbered(shape, dtype):
    size = int(np.prod(shape)) * dtype.itemsize
    return np.arange(size, dtype=np.uint8).view(dtype).reshape(shape)


def test_golden_files_emitted_again_are_equal(golden):
    for spec in tensor_table(ModelConfig.read(golden / "config.json")):
        stored = (golden / "ckpt-0" / spec.file_name).read_bytes()
        position = 0
        for segment in tensor_segments(spec):
            if isinstance(segment, bytes):
                assert stored[position : position + len(segment)] == segment, spec.file_name
                position += len(segment)
            else:
                position += segment.nbytes
        assert position == len(stored)


@pytest.mark.parametrize(
    "shape",
    [
        (2,),
        (255,),
        (256,),
        (65535,),
        (65536,),
        (1, 2),
        (3, 4, 5),
        (1, 2, 1, 2),
        (2,) * 9,
        (1, 300),
        (70000, 1),
    ],
)
def test_arrays_as_the_pickler_writes_them(shape, dump):
    for dtype in (np.dtype(np.float32), np.dtype(np.int8)):
        array = numbered(shape, dtype)
        assert emit(array) == dump(array)


def test_array_without_dimensions(dump):
    assert emit(np.array(2.5, np.float32)) == dump(np.array(2.5, np.float32))


@pytest.mark.parametrize("size", [*range(65536 - 260, 65536 + 5), 2 * 65536])
def test_every_size_about_the_limit_of_a_frame(size, dump):
    weight, scales = np.zeros((size,), np.int8), np.zeros((1, 4), BFLOAT16)
    assert emit(weight) == dump(weight)
    assert emit(weight, scales) == dump(weight, scales)
    small, large = np.zeros((4,), np.int8), np.zeros((size // 2,), BFLOAT16)
    assert emit(small, large) == dump(small, large)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([4, 127, 128, 255, 256, 30000, 65000, 65280, 65300, 65345, 65350, 65535, 65536, 140000]),
    st.integers(-3, 40),
    st.sampled_from([2, 127, 128, 16384, 32000, 32640, 32700, 32767, 32768, 70000]),
    st.integers(-1, 40),
)
def test_two_arrays_as_the_pickler_writes_them(dump, size, more, scales_size, scales_more):
    weight = np.zeros((size + more, 1), np.int8) if size % 2 else np.zeros((1, 2, size + more), np.int8)
    scales = np.zeros((1, scales_size + scales_more), BFLOAT16)
    if weight.nbytes < 2:
        weight = np.zeros((2, 1), np.int8)
    assert emit(weight, scales) == dump(weight, scales)


def test_more_than_four_gigabytes_has_a_length_of_eight_bytes():
    segments = file_segments(ArraySpec(np.dtype(np.float32), (131072, 8192 + 1)))
    assert segments[0].endswith(b"\x8e" + (131072 * 8193 * 4).to_bytes(8, "little"))
    assert segments[1] == Payload(0, 131072 * 8193 * 4)
    below = file_segments(ArraySpec(np.dtype(np.int8), (2**32 - 1,)))
    assert below[0].endswith(b"B\xff\xff\xff\xff")
    # 2^32 - 1 does not fit a signed number of four bytes, so the shape has LONG1 of five
    assert b"\x8a\x05\xff\xff\xff\xff\x00" in below[0]


def test_refuses_what_depends_on_the_data():
    with pytest.raises(ValueError, match="at least 2"):
        file_segments(ArraySpec(np.dtype(np.int8), (1,)))
    with pytest.raises(ValueError, match="float64"):
        file_segments(ArraySpec(np.dtype(np.float64), (4,)))
