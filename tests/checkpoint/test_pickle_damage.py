"""The scanner on files damaged at random, and on files made to make it work hard."""

import pickle
import pickletools
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grok1.checkpoint.pickled.scan import scan
from grok1.errors import CheckpointError


def split(data):
    """The opcodes of a pickle, each with its argument's bytes."""
    starts = [position for _, _, position in pickletools.genops(data)]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def unframed(data):
    return b"".join(opcode for opcode in split(data) if opcode[:1] != pickle.FRAME)


@st.composite
def mutations(draw):
    """A function that damages the bytes of a pickle in one to four places."""
    kinds = ["byte", "bit", "insert", "delete", "opcode", "splice"]
    kinds = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
    places = [draw(st.floats(0, 1, exclude_max=True)) for _ in range(2 * len(kinds))]
    values = [draw(st.integers(0, 255)) for _ in kinds]
    return list(zip(kinds, places[::2], places[1::2], values, strict=True))


def mutate(data, steps, interesting):
    for kind, first, second, value in steps:
        at = int(first * len(data))
        if kind == "byte":
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif kind == "bit":
            data = data[:at] + bytes([data[at] ^ (1 << value % 8)]) + data[at + 1 :] if data else data
        elif kind == "insert":
            data = data[:at] + interesting[value % len(interesting)] + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + 1 + value % 8 :]
        else:
            try:
                parts = split(data)
            except ValueError:
                continue
            source, target = int(first * len(parts)), int(second * len(parts))
            replaced = 1 if kind == "opcode" else 0
            parts[target : target + replaced] = [parts[source]]
            data = b"".join(parts)
    return data


@settings(deadline=None, max_examples=1500)
@given(st.booleans(), st.booleans(), mutations())
def test_a_damaged_file_is_refused_or_read_as_python_reads_it(
    tmp_path_factory, small_quantized, small_array, check_scan, quantised, framed, steps
):
    whole = small_quantized if quantised else small_array
    interesting = [
        *split(whole),
        b"\x8a\x08" + bytes([255] * 8),
        b"\x95" + bytes(8),
        b"(",
        b"t",
        b"b",
        b"0",
        b"2",
    ]
    data = mutate(whole if framed else unframed(whole), steps, interesting)
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        found = scan(path)
    except CheckpointError:
        found = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20
    if found is not None:
        check_scan(path)


@pytest.mark.parametrize(
    "body",
    [
        b"N" + b"\x85" * 16000,
        b"(" * 16000,
        b"}" * 250 + b"N\x94" * 8000,
        b"\x8cd" + b"a" * 100 + b"\x94" * 900,
    ],
)
def test_memory_stays_bounded(tmp_path, body):
    path = tmp_path / "file"
    path.write_bytes(b"\x80\x04" + body)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            scan(path)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
