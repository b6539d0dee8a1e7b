"""The sample checkpoint on meshes over several processes, compared with float64 and with one device."""

import json
import math

import numpy as np
import pytest

from grok1.checkpoint.reader import Checkpoint
from grok1.model import Model
from grok1.params.sharding import MESH_AXES
from grok1.params.tree import parameter_arrays

DEVICES = 4  # in all processes
MESHES = [(1, 2), (1, 4), (2, 2)]  # with 2 processes: on one, on both, and with a data row on each
FLOAT32_ERROR = 1e-4

WORKER = """
import json, sys
from pathlib import Path
import numpy as np
from grok1.host.memory import DEFAULT_LOAD_MEMORY
from grok1.multihost.cluster import given_cluster
from grok1.multihost.join import join

process, count, port, folder, meshes, out = sys.argv[1:]
def end(sentence, code):
    import os
    print(sentence, file=sys.stderr, flush=True)
    os._exit(code)

runtime = join(given_cluster(f":{port}", int(count), int(process), None, 120), {})
runtime.start(end)
from grok1.model.worker import tell_load, worker_loop
from grok1.model import load

if not runtime.leads:
    worker_loop(runtime, Path(folder), DEFAULT_LOAD_MEMORY, None)
found = {}
reports = {}
with np.load(Path(folder) / "logits.npz") as stored:
    sequences = [stored[f"tokens_{i}"] for i in (1, 2)]
for mesh in json.loads(meshes):
    tell_load(runtime, mesh, None, "auto")
    model = load(folder, mesh=tuple(mesh), runtime=runtime)
    name = f"{mesh[0]},{mesh[1]}"
    for i, tokens in enumerate(sequences):
        found[f"{name} {i}"] = model.logits(tokens)
    done = model.complete(sequences[0].tolist(), greedy=True, max_tokens=12, ignore_eos=True)
    reports[name] = {"text": done.tokens, "loads": model.loads, "idle": len(model.idle)}
np.savez(out, reports=json.dumps(reports), **found)
runtime.leave()
"""


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_logits_and_greedy_tokens_do_not_depend_on_processes(
    count, golden, golden_sequences, make_engine, relative_error, spawn, port, tmp_path
):
    out = tmp_path / "found.npz"
    arguments = (count, port, golden, json.dumps(MESHES), out)
    processes = [spawn("-c", WORKER, i, *arguments, devices=DEVICES // count) for i in range(count)]
    for process in processes:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    with np.load(out) as found:
        reports = json.loads(str(found["reports"]))
        for mesh in reports:
            for i, sequence in enumerate(golden_sequences[1:3]):
                assert relative_error(found[f"{mesh} {i}"], sequence.float64) < FLOAT32_ERROR
    alone = Model(make_engine(golden, (1, 1)), None)
    expected = alone.complete(golden_sequences[1].tokens.tolist(), greedy=True, max_tokens=12, ignore_eos=True)
    checkpoint = Checkpoint.open(golden)
    for mesh in MESHES:
        report = reports["{},{}".format(*mesh)]
        assert report["text"] == expected.tokens
        assert report["idle"] == DEVICES - mesh[0] * mesh[1]
        check_bytes_read(checkpoint, mesh, count, [load["bytes_read"] for load in report["loads"]])


def check_bytes_read(checkpoint, mesh, count, found):
    """Check that each process has read its model shards once, whatever the number of its data rows."""
    data, shards = mesh
    per_process = DEVICES // count
    for process in range(count):
        devices = range(process * per_process, (process + 1) * per_process)
        held = {device % shards for device in devices if device < data * shards}
        expected = 0
        for array in parameter_arrays(checkpoint.config):
            divided = [axis for axis in array.file_axes if axis.name in MESH_AXES]
            parts = math.gcd(divided[0].size // divided[0].unit, shards) if divided else 1
            mine = {shard * parts // shards for shard in held}
            whole = len(array.files) * math.prod(axis.size for axis in array.file_axes) * array.file_dtype.itemsize
            expected += whole * len(mine) // parts
        assert found[process] == expected
