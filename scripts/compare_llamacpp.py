#!/usr/bin/env python3
"""Compares grok1 with llama.cpp on the same random weights, by turns, and prints the ratios.

It makes what it needs under --folder the first time: a virtual environment in which llama.cpp is compiled (minutes), a
checkpoint in the release's format, and the same as GGUF with Q8_0 weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "scripts" / "llamacpp"
CASES = [(64, 1), (512, 1), (64, 8)]  # prompt and batch
DECODE = 32
PROMPT = "The answer to life the universe and everything"


def main() -> None:
    """Makes what is missing, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "llamacpp", help="where to keep everything")
    parser.add_argument("--preset", default="bench-3b", help="the model")
    parser.add_argument("--threads", type=int, default=_threads(), help="of both programs")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured, by turns")
    parser.add_argument("--python", type=Path, help="an interpreter that has llama_cpp already")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    python = options.python or _environment(options.folder / "venv")
    checkpoint, model = _models(options.folder, options.preset, python)
    buffers = _buffers(python, model, options.threads)

    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def note(name: str, program: str, value: float) -> None:
        figures[name][program].append(value)

    for number in range(options.rounds):
        for prompt, batch in CASES:
            _say(f"round {number + 1} of {options.rounds}: {batch} x {prompt} tokens")
            size = ["--prompt", prompt, "--batch", batch, "--decode", DECODE, "--threads", options.threads]
            theirs = _json([python, TOOLS / "measure.py", model, *size, *buffers])
            ours = _json([sys.executable, "-m", "grok1", "bench", "-c", checkpoint, "--mesh", "1,1", *size, "--json"])
            for program, found in (("grok1", ours), ("llama.cpp", theirs)):
                note(f"decode, {batch} x {prompt} tokens, tokens/s", program, found["decode_tokens_per_second"])
                if (prompt, batch) == (512, 1):
                    note("prefill, 512 tokens, tokens/s", program, found["prefill_tokens_per_second"])
                    note("peak resident memory, GB", program, found["peak_memory_bytes"] / 1e9)
            note("memory that can be read, GB/s", "grok1", ours["read_gigabytes_per_second"])
        _say(f"round {number + 1} of {options.rounds}: from command to first token")
        run = ["run", "-c", checkpoint, "--mesh", "1,1", "--greedy", "-n", "1", "--threads", options.threads, PROMPT]
        note("command to first token, s", "grok1", _seconds([sys.executable, "-m", "grok1", *run]))
        first = [python, TOOLS / "first_token.py", model, options.threads, *buffers]
        note("command to first token, s", "llama.cpp", _seconds(first))
    _print(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _threads() -> int:
    from grok1.threads import default_threads

    return default_threads()


def _environment(folder: Path) -> Path:
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        _say("compiling llama.cpp, which takes minutes")
        venv.create(folder, with_pip=True)
        _run([python, "-m", "pip", "install", "--quiet", "-r", TOOLS / "requirements.txt"])
        (folder / "ready").touch()
    return python


def _models(folder: Path, preset: str, python: Path) -> tuple[Path, Path]:
    checkpoint, model = folder / preset, folder / f"{preset}.gguf"
    if not checkpoint.exists():
        _run([sys.executable, "-m", "grok1", "init", checkpoint, "--preset", preset])
    if not model.exists():
        _say("writing the weights as GGUF")
        unfinished = model.with_suffix(".unfinished")
        _run([python, TOOLS / "convert.py", checkpoint, unfinished])
        unfinished.rename(model)
    return checkpoint, model


def _buffers(python: Path, model: Path, threads: int) -> list[str]:
    """Nothing, or what llama.cpp must leave out because it crashes with it on this processor."""
    command = _strings([python, TOOLS / "first_token.py", model, threads])
    if subprocess.run(command, capture_output=True, env=_variables(), check=False).returncode == 0:
        return []
    _say("llama.cpp crashes on this processor with its own layouts of weights (AMX): it runs without them")
    return ["--plain-buffers"]


def _print(figures: dict[str, dict[str, list[float]]]) -> None:
    print(f"{'':40} {'grok1':>10} {'llama.cpp':>10} {'ratio':>8}")
    for name, values in figures.items():
        middle = {program: statistics.median(found) for program, found in values.items()}
        theirs = middle.get("llama.cpp")
        compared = f"{theirs:10.2f} {middle['grok1'] / theirs:7.2f}x" if theirs else ""
        print(f"{name:40} {middle['grok1']:10.2f} {compared}".rstrip())


def _strings(command: list[Any]) -> list[str]:
    return [str(part) for part in command]


def _variables() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def _run(command: list[Any], call: Callable[..., Any] = subprocess.run, **how: Any) -> Any:
    return call(_strings(command), env=_variables(), check=True, **how)


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
