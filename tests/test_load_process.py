"""Loading in a process of its own: its memory, and Ctrl-C."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from configs import LARGE_WEIGHTS

from grok1.host.memory import MIN_LOAD_MEMORY

SLACK = 64 << 20
"""For threads' stacks, compiled programs and whatever else JAX takes."""

LOAD = f"""
import resource, sys
from pathlib import Path
import jax
from grok1.checkpoint import load, reader, shards
from grok1.params.sharding import make_mesh

folder, way, model = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if way == "device":
    make_local_shards = shards.local_shards
    load.local_shards = lambda array, mesh, *_: make_local_shards(array, mesh, False)
checkpoint = reader.Checkpoint.open(folder)
mesh = make_mesh(checkpoint.config, (1, model))

def run():
    return load.load_parameters(checkpoint, mesh, load_memory={MIN_LOAD_MEMORY})

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

"""


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint(LARGE_WEIGHTS)


@pytest.fixture(scope="module")
def weights_bytes(folder):
    return sum(path.stat().st_size for path in (folder / "ckpt-0").iterdir())


def popen(code, *arguments):
    # A process started in a background job inherits that it ignores Ctrl-C, unless its parent listens.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    flags = os.environ["XLA_FLAGS"].replace("device_count=16", "device_count=8")
    environment = os.environ | {"XLA_FLAGS": flags, "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", LOAD + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(code, *arguments):
    process = popen(code, *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory as Linux does")


@pytest.mark.parametrize(("way", "model"), [("host", 8), ("device", 1), ("device", 8)])
def test_it_takes_no_more_than_the_weights_and_its_budget(way, model, folder, weights_bytes):
    """On the way of accelerators, the devices' memory is the process's too."""
    code = f"""
    run()  # compiles the programs
    limit = status("VmData") + {weights_bytes + MIN_LOAD_MEMORY + SLACK}
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    run()
    print("loaded")
    """
    assert result(code, folder, way, model) == "loaded\n"


def test_too_little_memory_for_the_weights_is_an_error_of_python(folder, weights_bytes):
    code = f"""
    limit = status("VmData") + {weights_bytes // 2}
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        run()
    except MemoryError:
        print("no memory")
    """
    assert result(code, folder, "host", 8) == "no memory\n"


@pytest.mark.parametrize("model", [1, 8])
def test_peak_of_resident_memory(model, folder, weights_bytes):
    code = """
    jax.block_until_ready(jax.numpy.zeros(1))
    before = status("VmRSS")
    run()
    print(status("VmHWM") - before)
    """
    grown = int(result(code, folder, "host", model))
    assert weights_bytes * 0.9 < grown < weights_bytes + MIN_LOAD_MEMORY + SLACK


@pytest.mark.parametrize("way", ["host", "device"])
def test_an_interrupt_ends_it_at_once(way, folder):
    """Reading would take minutes, a byte at a time, and the process ends only when its threads have."""
    code = """
    import os, threading
    begun, preadv = threading.Event(), os.preadv

    def read_a_byte(descriptor, buffers, offset):
        if not begun.is_set():
            begun.set()
            print("begun", flush=True)
        return preadv(descriptor, [buffers[0][:1]], offset)

    os.preadv = read_a_byte
    try:
        run()
    except KeyboardInterrupt:
        print("interrupted")
    """
    process = popen(code, folder, way, 8)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "interrupted\n"), err
