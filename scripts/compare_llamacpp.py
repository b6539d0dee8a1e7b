#!/usr/bin/env python3
"""Compare the speed of grok1 and llama.cpp on the same random weights.

The two programs run alternately; medians and ratios are printed. The first run compiles llama.cpp, which takes minutes,
and creates a checkpoint in the release's format and its GGUF conversion (Q8_0), all in --directory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "scripts" / "llamacpp"
CASES = [(64, 1), (512, 1), (64, 8)]  # (prompt length, batch size)
DECODE = 32
PRESET = "bench-3b"  # has a tokenizer, and a context long enough for all cases
PROMPT = "The answer to life is the answer to"
BUSY = 0.1  # cores; a higher load by other programs distorts the results
OTHERS = "CPU load of other programs, cores"


def main() -> None:
    """Run the comparison and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--directory",
        type=Path,
        default=ROOT / "build" / "llamacpp",
        help="directory for the environment and the models (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=_threads(), help="CPU threads of each program (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="number of measurements of each program (default: %(default)s)"
    )
    parser.add_argument(
        "--python", type=Path, help="interpreter with llama_cpp and gguf installed, instead of a new environment"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to FILE")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    python = options.python or _environment(options.directory / "venv")
    checkpoint, model = _models(options.directory, python)
    tokens = len(_json([sys.executable, "-m", "grok1", "tokenize", "-c", checkpoint, "--json", PROMPT])["token_ids"])
    buffers = _buffers(python, model, options.threads, tokens)

    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def note(name: str, program: str, value: float) -> None:
        figures[name][program].append(value)

    for number in range(options.rounds):
        for prompt, batch in CASES:
            _say(f"round {number + 1} of {options.rounds}: {batch} x {prompt} tokens")
            size = ["--prompt", prompt, "--batch", batch, "--decode", DECODE, "--threads", options.threads]
            with _measure_other_load(partial(note, OTHERS, "llama.cpp")):
                theirs = _json([python, TOOLS / "measure.py", model, *size, *buffers])
            bench = ["bench", "-c", checkpoint, "--mesh", "1,1", *size, "--json"]
            with _measure_other_load(partial(note, OTHERS, "grok1")):
                ours = _json([sys.executable, "-m", "grok1", *bench])
            for program, found in (("grok1", ours), ("llama.cpp", theirs)):
                note(f"decode, {batch} x {prompt} tokens, tokens/s", program, found["decode_tokens_per_second"])
                if (prompt, batch) == (512, 1):
                    note("prefill, 512 tokens, tokens/s", program, found["prefill_tokens_per_second"])
                    note("peak resident memory, GB (lower is better)", program, found["peak_memory_bytes"] / 1e9)
            note("memory read bandwidth, GB/s", "grok1", ours["read_gigabytes_per_second"])
        _say(f"round {number + 1} of {options.rounds}: time to first token")
        run = ["run", "-c", checkpoint, "--mesh", "1,1", "--greedy", "-n", "1", "--threads", options.threads, PROMPT]
        note(
            "time to first token from launch, s (lower is better)",
            "grok1",
            _seconds([sys.executable, "-m", "grok1", *run]),
        )
        first = [python, TOOLS / "first_token.py", model, options.threads, tokens, *buffers]
        note("time to first token from launch, s (lower is better)", "llama.cpp", _seconds(first))
    _print(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _threads() -> int:
    from grok1.host.threads import default_threads

    return default_threads()


def _environment(folder: Path) -> Path:
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        _say("compiling llama.cpp (takes minutes)")
        venv.create(folder, with_pip=True)
        _run([python, "-m", "pip", "install", "--quiet", "-r", TOOLS / "requirements.txt"])
        (folder / "ready").touch()
    return python


def _models(folder: Path, python: Path) -> tuple[Path, Path]:
    checkpoint, model = folder / PRESET, folder / f"{PRESET}.gguf"
    if not checkpoint.exists():
        _run([sys.executable, "-m", "grok1", "init", checkpoint, "--preset", PRESET])
    if not model.exists():
        _say("converting the weights to GGUF")
        unfinished = model.with_suffix(".unfinished")
        _run([python, TOOLS / "convert.py", checkpoint, unfinished])
        unfinished.rename(model)
    return checkpoint, model


def _buffers(python: Path, model: Path, threads: int, tokens: int) -> list[str]:
    """Return the option that disables llama.cpp's repacked weights if llama.cpp crashes on this CPU with them."""
    first = [python, TOOLS / "first_token.py", model, threads, tokens]
    if _run(first, check=False, capture_output=True).returncode == 0:
        return []
    _say("llama.cpp crashes on this CPU with repacked weights (AMX); repacking is disabled")
    return ["--plain-buffers"]


@contextlib.contextmanager
def _measure_other_load(report: Callable[[float], None]) -> Iterator[None]:
    """Report the average number of cores that other programs use in the block, where /proc/stat is available."""
    start, busy, own = time.perf_counter(), _busy_seconds(), _own_seconds()
    yield
    after = _busy_seconds()
    if busy is not None and after is not None:
        seconds = after - busy - (_own_seconds() - own)
        report(max(0.0, seconds / (time.perf_counter() - start)))


def _busy_seconds() -> float | None:
    """Return the CPU time of all cores in seconds, including time stolen by a hypervisor."""
    try:
        user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Return the CPU time of this process and its finished children in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _print(figures: dict[str, dict[str, list[float]]]) -> None:
    width = max(map(len, figures))
    print(f"{'':{width}} {'grok1':>9} {'llama.cpp':>10} {'grok1 / llama.cpp':>18}")
    for name, values in figures.items():
        middle = {program: statistics.median(found) for program, found in values.items()}
        theirs = None if name == OTHERS else middle.get("llama.cpp")
        compared = f"{theirs:10.2f} {middle['grok1'] / theirs:18.2f}" if theirs else ""
        if name == OTHERS:
            compared = f"{middle['llama.cpp']:10.2f}"
        print(f"{name:{width}} {middle['grok1']:9.2f} {compared}".rstrip())
    most = max((found for values in figures.get(OTHERS, {}).values() for found in values), default=0.0)
    if most > BUSY:
        _say(
            f"warning: other programs used up to {most:.1f} cores, which makes the ratios unreliable; "
            "repeat on an idle machine"
        )


def _variables() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def _run(command: list[Any], *, check: bool = True, **how: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(part) for part in command], env=_variables(), check=check, **how)


def _json(command: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_run(command, stdout=subprocess.PIPE).stdout)
    return found


def _seconds(command: list[Any]) -> float:
    start = time.perf_counter()
    _run(command, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
