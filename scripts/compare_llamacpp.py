#!/usr/bin/env python3
"""Compares grok1 with llama.cpp on the same random weights, by turns, and prints the ratios.

It makes what it needs under --folder the first time: a virtual environment in which llama.cpp is compiled (minutes), a
checkpoint in the release's format, and the same as GGUF with Q8_0 weights.
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
CASES = [(64, 1), (512, 1), (64, 8)]  # prompt and batch
DECODE = 32
PRESET = "bench-3b"  # the one whose shapes and context the cases need, and that has a tokenizer
PROMPT = "The answer to life is the answer to"
BUSY = 0.1  # cores: what others use beyond this shows in the figures
OTHERS = "cores that others used"


def main() -> None:
    """Makes what is missing, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "llamacpp", help="where to keep everything")
    parser.add_argument("--threads", type=int, default=_threads(), help="of both programs")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured, by turns")
    parser.add_argument("--python", type=Path, help="an interpreter that has llama_cpp already")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    python = options.python or _environment(options.folder / "venv")
    checkpoint, model = _models(options.folder, python)
    tokens = len(_json([sys.executable, "-m", "grok1", "tokenize", "-c", checkpoint, "--json", PROMPT])["token_ids"])
    buffers = _buffers(python, model, options.threads, tokens)

    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def note(name: str, program: str, value: float) -> None:
        figures[name][program].append(value)

    for number in range(options.rounds):
        for prompt, batch in CASES:
            _say(f"round {number + 1} of {options.rounds}: {batch} x {prompt} tokens")
            size = ["--prompt", prompt, "--batch", batch, "--decode", DECODE, "--threads", options.threads]
            with _others(partial(note, OTHERS, "llama.cpp")):
                theirs = _json([python, TOOLS / "measure.py", model, *size, *buffers])
            bench = ["bench", "-c", checkpoint, "--mesh", "1,1", *size, "--json"]
            with _others(partial(note, OTHERS, "grok1")):
                ours = _json([sys.executable, "-m", "grok1", *bench])
            for program, found in (("grok1", ours), ("llama.cpp", theirs)):
                note(f"decode, {batch} x {prompt} tokens, tokens/s", program, found["decode_tokens_per_second"])
                if (prompt, batch) == (512, 1):
                    note("prefill, 512 tokens, tokens/s", program, found["prefill_tokens_per_second"])
                    note("peak resident memory, GB (less is better)", program, found["peak_memory_bytes"] / 1e9)
            note("memory that can be read, GB/s", "grok1", ours["read_gigabytes_per_second"])
        _say(f"round {number + 1} of {options.rounds}: from command to first token")
        run = ["run", "-c", checkpoint, "--mesh", "1,1", "--greedy", "-n", "1", "--threads", options.threads, PROMPT]
        note("command to first token, s (less is better)", "grok1", _seconds([sys.executable, "-m", "grok1", *run]))
        first = [python, TOOLS / "first_token.py", model, options.threads, tokens, *buffers]
        note("command to first token, s (less is better)", "llama.cpp", _seconds(first))
    _print(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _threads() -> int:
    from grok1.host.threads import default_threads

    return default_threads()


def _environment(folder: Path) -> Path:
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        _say("compiling llama.cpp, which takes minutes")
        venv.create(folder, with_pip=True)
        _run([python, "-m", "pip", "install", "--quiet", "-r", TOOLS / "requirements.txt"])
        (folder / "ready").touch()
    return python


def _models(folder: Path, python: Path) -> tuple[Path, Path]:
    checkpoint, model = folder / PRESET, folder / f"{PRESET}.gguf"
    if not checkpoint.exists():
        _run([sys.executable, "-m", "grok1", "init", checkpoint, "--preset", PRESET])
    if not model.exists():
        _say("writing the weights as GGUF")
        unfinished = model.with_suffix(".unfinished")
        _run([python, TOOLS / "convert.py", checkpoint, unfinished])
        unfinished.rename(model)
    return checkpoint, model


def _buffers(python: Path, model: Path, threads: int, tokens: int) -> list[str]:
    """Nothing, or what llama.cpp must leave out because it crashes with it on this processor."""
    first = [python, TOOLS / "first_token.py", model, threads, tokens]
    if _run(first, check=False, capture_output=True).returncode == 0:
        return []
    _say("llama.cpp crashes on this processor with its own layouts of weights (AMX): it runs without them")
    return ["--plain-buffers"]


@contextlib.contextmanager
def _others(tell: Callable[[float], None]) -> Iterator[None]:
    """Tells how many cores other programs used meanwhile, on average; nothing where the system does not say."""
    start, busy, own = time.perf_counter(), _busy_seconds(), _own_seconds()
    yield
    after = _busy_seconds()
    if busy is not None and after is not None:
        seconds = after - busy - (_own_seconds() - own)
        tell(max(0.0, seconds / (time.perf_counter() - start)))


def _busy_seconds() -> float | None:
    """Seconds for which all cores together have worked, those that a virtual machine's host took away included."""
    try:
        user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Of these, what this program and those that it has started used."""
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
            f"other programs used up to {most:.1f} cores meanwhile: the ratios mean little, as the two programs bear "
            "that very differently; run it again on a quiet machine"
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
