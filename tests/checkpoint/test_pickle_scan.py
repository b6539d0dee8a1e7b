import os
import pickle
import pickletools
import struct
import subprocess

import ml_dtypes
import numpy as np
import pytest

from grok1.checkpoint.pickled.scan import StoredArray, scan
from grok1.errors import CheckpointError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def split(data):
    """The opcodes of a pickle, each with its argument's bytes."""
    starts = [position for _, _, position in pickletools.genops(data)]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def unframed(data):
    return b"".join(opcode for opcode in split(data) if opcode[:1] != pickle.FRAME)


def with_a_frame_for_each_opcode(data):
    opcodes = split(unframed(data))
    return opcodes[0] + b"".join(b"\x95" + struct.pack("<Q", len(opcode)) + opcode for opcode in opcodes[1:])


def with_numbered_memo(data, opcode, form):
    parts, count = [], 0
    for part in split(unframed(data)):
        if part == pickle.MEMOIZE:
            part, count = opcode + struct.pack(form, count), count + 1
        parts.append(part)
    return b"".join(parts)


def refusal(tmp_path, data):
    path = tmp_path / "tensor00000_000"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        scan(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: ")
    assert "\n" not in sentence
    assert "download or restore" in sentence
    return sentence


def test_every_golden_file(golden, check_scan):
    paths = sorted((golden / "ckpt-0").iterdir())
    assert len(paths) == 146
    for path in paths:
        check_scan(path)


@pytest.mark.parametrize("size", [2, 255, 256, 65400, 65536, 200000])
@pytest.mark.parametrize("python", [False, True])
def test_either_pickler_at_any_size(tmp_path, dump, check_scan, size, python):
    path = tmp_path / "file"
    path.write_bytes(dump(np.arange(size, dtype=np.float32), python=python))
    check_scan(path)
    weight = np.arange(4 * size).astype(np.int8).reshape(2, 2, size)
    path.write_bytes(dump(weight, np.arange(2 * size).reshape(2, 1, size).astype(BFLOAT16), python=python))
    check_scan(path)


@pytest.mark.parametrize(
    "form",
    [
        unframed,
        with_a_frame_for_each_opcode,
        pickletools.optimize,
        lambda data: with_numbered_memo(data, pickle.BINPUT, "<B"),
        lambda data: with_numbered_memo(data, pickle.LONG_BINPUT, "<I"),
        lambda data: unframed(data).replace(b"\x8c\x06weight", b"X\x06\0\0\0weight"),
        lambda data: unframed(data).replace(b"K\x06K\x04\x86", b"(J\x06\0\0\0\x8a\x01\x04t"),
        lambda data: unframed(data).replace(b"C\x18", b"\x8e\x18" + bytes(7)),
        lambda data: unframed(data).replace(b"\x8c\x16numpy._core.", b"\x8c\x15numpy.core."),
    ],
    ids=[
        "unframed",
        "frames",
        "optimized",
        "binput",
        "long-binput",
        "strings",
        "numbers",
        "bytes8",
        "numpy1",
    ],
)
def test_other_spellings_of_the_same_file(tmp_path, small_quantized, check_scan, form):
    data = form(small_quantized)
    assert data != small_quantized
    path = tmp_path / "file"
    path.write_bytes(data)
    check_scan(path)


def test_attributes_in_the_other_order(tmp_path, dump, check_scan):
    weight, scales = np.ones((4, 2), np.int8), np.ones((1, 2), BFLOAT16)
    swapped = dump(scales, weight).replace(b"weight", b"_eight").replace(b"scales", b"weight")
    path = tmp_path / "file"
    path.write_bytes(swapped.replace(b"_eight", b"scales"))
    check_scan(path)
    assert scan(path).array.shape == (4, 2)


def test_reads_no_array_data(tmp_path, dump):
    """The data of a large file is a hole that would take minutes to read."""
    header = dump(np.zeros((1 << 20,), np.int8), np.zeros((2,), BFLOAT16))
    hole = 1 << 38
    start = header.index(b"B" + struct.pack("<I", 1 << 20))
    shape = header.index(b"J" + struct.pack("<i", 1 << 20))
    data = header[:shape] + b"\x8a\x06" + struct.pack("<Q", hole)[:6] + header[shape + 5 : start]
    data = b"\x80\x04" + data[11:] + b"\x8e" + struct.pack("<Q", hole)
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(data)
        file.seek(hole, os.SEEK_CUR)
        file.write(header[start + 5 + (1 << 20) :])
    assert scan(path).array == StoredArray(np.dtype(np.int8), (hole,), len(data))


class _Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_runs_a_command_is_named_and_not_run(tmp_path, dump):
    marker = tmp_path / "marker"
    for data in (
        pickle.dumps(_Command(f"touch {marker}"), 4),
        b"\x80\x04cposix\nsystem\n\x8c\x04true\x85R.",
        b"\x80\x04(\x8c\x04trueiposix\nsystem\n.",
    ):
        sentence = refusal(tmp_path, data)
        assert "posix.system" in sentence
        assert "nothing was executed" in sentence
    assert not marker.exists()


def test_a_command_among_the_attributes_is_not_run(tmp_path, small_quantized):
    marker = tmp_path / "marker"
    command = unframed(pickle.dumps(_Command(f"touch {marker}"), 4))[2:-1]
    data = unframed(small_quantized).replace(b"\x8c\x06weight", command + b"\x8c\x06weight")
    assert "posix.system" in refusal(tmp_path, data)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("opcodes", "reason"),
    [
        (b"", "unexpected end of file"),
        (b".", "0 objects"),
        (b"N.", "None"),
        (b"}.", "a dict"),
        (b"C\x03abc.", "bytes"),
        (b"Pname\n.", "opcode PERSID"),
        (b"\x8c\x01aQ.", "opcode BINPERSID"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"(\x8c\x01ao.", "opcode OBJ"),
        (b"\x8c\x02os\x8c\x06system\x93.", "'os.system'"),
        (b"\x8c\x08builtins\x8c\x04eval\x93.", "'builtins.eval'"),
        (b"\x8c\x05numpy\x8c\x04load\x93.", "'numpy.load'"),
        (b"\x8c\x05numpy\x8c\x07ndarray\x93K\x03\x85R.", "numpy.ndarray"),
        (b"\x8c\x05numpy\x8c\x07ndarray\x93)\x81.", "numpy.ndarray"),
        (b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x01O\x89\x88\x87R.", "'O'"),
        (b"K\x01K\x02\x93.", "name is not a string"),
        (b"h\x05.", "memo index 5"),
        (b"j\xff\xff\xff\xff.", "memo index 4294967295"),
        (b"Nr\xff\xff\xff\xff.", "memo index 4294967295"),
        (b"\x94.", "stack underflow"),
        (b"N(\x85.", "stack underflow"),
        (b"t.", "missing MARK"),
        (b"\xff.", "opcode 0xff"),
        (b"\x80\x04N.", "opcode PROTO"),
        (b"\x95\x03\0\0\0\0\0\0\0NNN.", "3 objects"),
        (b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", "past the end of the file"),
        (b"\x95\x0b\0\0\0\0\0\0\0\x95\x01\0\0\0\0\0\0\0NN.", "nested frame"),
        (b"\x95\x03\0\0\0\0\0\0\0\x8c\x04abcd.", "past the end of its frame"),
        (b"X\xff\xff\xff\xff.", "string of 4294967295 bytes"),
        (b"\x8c\x02\xff\xfe.", "not valid UTF-8"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff.", "unexpected end of file"),
        (b"\x8a\xff" + bytes(255) + b".", "integer of 255 bytes"),
        (b"c" + b"a" * 300 + b"\n.", "name longer than 256 bytes"),
        (b"N\x8c\x01aNs.", "cannot set items of None"),
        (b"}\x8c\x01aNs\x8c\x01aNs.", "duplicate attribute"),
        (b"}(K\x01Nu.", "invalid or duplicate attribute"),
        (b"}(\x8c\x01aNNu.", "pairs"),
        (b"}\x94h\x00b.", "cannot set the state of"),
        (b"N" * 300 + b".", "too many nested or memoized objects"),
        (b"(" * 300 + b".", "too many nested or memoized objects"),
        (b"N" + b"\x94" * 1100 + b".", "too many nested or memoized objects"),
        (b"N" + b"\x85" * 20000 + b".", "in addition to array data"),
    ],
)
def test_refuses(tmp_path, opcodes, reason):
    sentence = refusal(tmp_path, b"\x80\x04" + opcodes)
    assert reason in sentence
    assert "at byte " in sentence


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3), np.float32).T, "Fortran order"),
        (np.zeros(3, ">f4"), "byte order '>'"),
        (np.zeros(3, np.float64), "dtype 'f8'"),
        (np.zeros(3, np.int8), "array of int8, expected float32"),
        (np.zeros(3, BFLOAT16), "array of bfloat16, expected float32"),
        (np.array([None, 1]), "dtype 'O8'"),
        (np.array(["text"]), "dtype 'U4'"),
        (np.zeros(3, [("a", "f4")]), "dtype 'V4'"),
        (np.zeros((0, 3), np.float32), "a dimension of 0"),
        (np.float32(1), "'numpy._core.multiarray.scalar'"),
        ([np.zeros(3, np.float32)], "opcode EMPTY_LIST"),
        (1.5, "opcode BINFLOAT"),
    ],
)
def test_refuses_other_objects(tmp_path, dump, array, reason):
    assert reason in refusal(tmp_path, dump(array)).replace("numpy.core.", "numpy._core.")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"K\x03K\x02\x86", b"J\xff\xff\xff\xffK\x02\x86", "a dimension of -1"),
        (b"K\x03K\x02\x86", b"K\x03K\x03\x86", "has 24 bytes of data, expected 36"),
        (b"K\x03K\x02\x86", b"\x8a\x08" + struct.pack("<q", 1 << 62) + b"\x85", f"expected {1 << 64}"),
        (b"K\x03K\x02\x86", b"(" + (b"\x8a\x08" + struct.pack("<q", 1 << 62)) * 20 + b"t", "expected"),
        (b"K\x03K\x02\x86", b"(" + b"K\x01" * 33 + b"t", "up to 32"),
        (b"K\x03K\x02\x86", b"\x88K\x06\x86", "a dimension of True"),
        (b"K\x03K\x02\x86", b"N", "shape is None"),
        (b"(K\x01", b"(K\x02", "expected NumPy's version 1"),
        (b"(K\x03\x8c\x01<", b"(K\x04\x8c\x01<", "expected NumPy's version 3"),
        (b"NNN", b"N\x8c\x01aN", "structured"),
        (b"K\x00t\x94b", b"K\x01t\x94b", "flags 1"),
        (b"C\x01b", b"C\x01c", "invalid arguments of _reconstruct"),
        (b"K\x00\x85", b"K\x01\x85", "invalid arguments of _reconstruct"),
        (b"\x89\x88\x87", b"\x88\x88\x87", "invalid arguments of numpy.dtype"),
        (b"\x94b.", b"\x94b", "unexpected end of file"),
        (b"\x94b.", b"\x94b..", "1 byte after the end"),
        (b"\x94b.", b"\x94b.\0\0", "2 bytes after the end"),
        (b"\x94b.", b"\x94bh\x0bb.", "cannot set the state of"),
        (b"\x94b.", b"\x94b(N.", "2 objects"),
        (b"\x94b.", b"\x94.", "2 objects"),
        (b"\x80\x04", b"\x80\x05", "protocol 5, expected 4"),
        (b"\x80\x04", b"\x80\x03", "protocol 3, expected 4"),
        (b"\x80\x04", b"", "expected opcode PROTO"),
    ],
)
def test_refuses_a_changed_array(tmp_path, small_array, old, new, reason):
    data = unframed(small_array)
    assert data.count(old) == 1, "the change is not where the test means it"
    assert reason in refusal(tmp_path, data.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"weight", b"height", "invalid attributes"),
        (b"\x8c\x06scales", b"\x8c\x06weight", "duplicate attribute"),
        (b"\x8c\x08__main__", b"\x8c\x08__fain__", "'__fain__.QuantizedWeight8bit'"),
        (b")\x81", b"K\x01\x85\x81", "object of __main__.QuantizedWeight8bit"),
        (b"\x8c\x09ml_dtypes\x94\x8c\x08bfloat16\x94\x93", b"\x8c\x02f4", "'<'"),
        (b"ub.", b"ubN.", "2 objects"),
        (b"ub.", b"u.", "2 objects"),
        (b"ub.", b"ub}b.", "cannot set the state of"),
    ],
)
def test_refuses_a_changed_quantised_weight(tmp_path, small_quantized, old, new, reason):
    data = unframed(small_quantized)
    assert data.count(old) == 1, "the change is not where the test means it"
    sentence = refusal(tmp_path, data.replace(old, new))
    assert reason in sentence or (reason == "'<'" and "item size 2" in sentence)


def test_quantised_arrays_of_other_dtypes(tmp_path, dump):
    int8, floats = np.zeros((2, 2), np.int8), np.zeros((1, 2), np.float32)
    assert "scales is an array of float32, expected bfloat16" in refusal(tmp_path, dump(int8, floats))
    assert "weight is an array of float32, expected int8" in refusal(tmp_path, dump(floats, int8))


def test_a_file_cut_at_every_byte(tmp_path, small_quantized, small_array):
    for whole in (small_quantized, unframed(small_quantized), small_array):
        for length in range(len(whole)):
            refusal(tmp_path, whole[:length])


def test_not_a_file(tmp_path):
    with pytest.raises(CheckpointError, match="is a directory"):
        scan(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        scan(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe, device or socket"):
        scan(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe, device or socket"):
        scan(type(tmp_path)("/dev/null"))


def test_a_link_to_a_file_is_followed(tmp_path, small_array):
    (tmp_path / "blob").write_bytes(small_array)
    (tmp_path / "link").symlink_to("blob")
    assert scan(tmp_path / "link").array.shape == (3, 2)


def test_scanning_imports_no_jax():
    program = "import sys, grok1.checkpoint.pickled.scan; sys.exit('jax' in sys.modules)"
    assert subprocess.run([os.sys.executable, "-c", program], check=False).returncode == 0
