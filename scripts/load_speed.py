#!/usr/bin/env python3
"""Compare the speed of loading a checkpoint with that of reading its files once into newly allocated memory.

Both run alternately, each in a new process. The checkpoint must fit in memory twice. The first round only warms the
page cache. grok1 must be installed.
"""

import argparse
import concurrent.futures
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

THREADS = 4


def read_once(folder: Path) -> None:
    """Read every file into a newly allocated buffer."""
    import numpy as np

    paths = sorted((folder / "ckpt-0").iterdir(), key=lambda path: -path.stat().st_size)

    def read(path: Path) -> np.ndarray:
        whole = np.empty(path.stat().st_size, np.uint8)
        with path.open("rb", buffering=0) as file:
            done = 0
            while done < len(whole):
                done += file.readinto(whole[done : done + (4 << 20)].data)
        return whole

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        _ = list(pool.map(read, paths))


def load(folder: Path, mesh: tuple[int, int]) -> None:
    """Load the checkpoint onto a mesh."""
    from grok1.checkpoint.load import load_parameters
    from grok1.checkpoint.reader import Checkpoint
    from grok1.params.sharding import make_mesh

    checkpoint = Checkpoint.open(folder)
    load_parameters(checkpoint, make_mesh(checkpoint.config, mesh))


def measure_here(what: str, folder: Path, mesh: tuple[int, int]) -> dict[str, float]:
    """Return the time in seconds, excluding the start of JAX, and the peak resident memory of this process."""
    import jax

    from grok1.host.memory import peak_resident_bytes

    jax.devices()
    import grok1.checkpoint.load  # noqa: F401

    start = time.perf_counter()
    load(folder, mesh) if what == "load" else read_once(folder)
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak_resident_bytes() or 0}


def measure(what: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run `measure_here` in a new process.

    A process that reads the files runs first, so that memory is in the same state for each measurement: the host of a
    virtual machine may reclaim memory that has been free for long, and using it again is several times slower.
    """
    results = []
    for each in ("read", what):
        command = [sys.executable, __file__, str(arguments.directory), "--mesh", arguments.mesh, "--only", each]
        results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    return results[-1]


def main() -> None:
    """Print one line per round and the ratio of the median speeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="checkpoint directory, which contains ckpt-0")
    parser.add_argument("--mesh", default="1,1", metavar="DATA,MODEL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["load", "read"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    data, model = (int(size) for size in arguments.mesh.split(","))
    if arguments.only:
        print(json.dumps(measure_here(arguments.only, arguments.directory, (data, model))))
        return
    size = sum(path.stat().st_size for path in (arguments.directory / "ckpt-0").iterdir())
    reads, loads = [], []
    for number in range(arguments.rounds + 1):
        read, loaded = measure("read", arguments), measure("load", arguments)
        if number:
            reads.append(read["seconds"])
            loads.append(loaded["seconds"])
            print(
                f"read once {size / reads[-1] / 1e9:.2f} GB/s, load {size / loads[-1] / 1e9:.2f} GB/s, "
                f"peak of load: files + {(loaded['peak_bytes'] - size) / 1e6:.0f} MB",
                flush=True,
            )
    print(f"load / read once: {statistics.median(reads) / statistics.median(loads):.2f} (ratio of median speeds)")


if __name__ == "__main__":
    main()
