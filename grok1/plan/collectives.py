"""Exchanges between devices, counted in the text of a compiled program."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict

import numpy as np

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"

# An asynchronous exchange is counted at its end, whose result is the exchanged array alone.
_EXCHANGE = re.compile(rf"= (?P<result>.*?) (?P<kind>{_KINDS})(?:-done)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_REFERENCE = re.compile(r"%([\w.-]+)")
_LOOP_BODY = re.compile(r" while\(.*\bbody=%?([\w.-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """The exchanges of one kind in a step.

    Attributes:
        kind: "all-reduce", "all-gather" or another of XLA's names.
        per_layer: how many there are in the loop over the layers.
        layer_bytes: of the results of those together, on one device.
        once: how many there are outside of it.
        once_bytes: of the results of those together, on one device.
    """

    kind: str
    per_layer: int
    layer_bytes: int
    once: int
    once_bytes: int


def collectives(text: str) -> tuple[Collectives, ...]:
    """The exchanges in a compiled program whose only loop with exchanges is the one over the layers.

    Args:
        text: the program in XLA's text format, as `jax.stages.Compiled.as_text` gives it.

    Returns:
        one entry for each kind that occurs, in order of their names.
    """
    computations = _computations(text)
    in_loop = _reachable(computations, {body for lines in computations.values() for body in _loop_bodies(lines)})
    sizes: dict[str, dict[bool, list[int]]] = defaultdict(lambda: {True: [], False: []})
    for name, lines in computations.items():
        for line in lines:
            if match := _EXCHANGE.search(line):
                sizes[match["kind"]][name in in_loop].append(_array_bytes(match["result"]))
    return tuple(
        Collectives(kind, len(found[True]), sum(found[True]), len(found[False]), sum(found[False]))
        for kind, found in sorted(sizes.items())
    )


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation, by its name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = found[match["name"]] = []
        elif line.startswith("  "):
            lines.append(line)
    return found


def _loop_bodies(lines: list[str]) -> list[str]:
    return [match[1] for line in lines if (match := _LOOP_BODY.search(line))]


def _reachable(computations: dict[str, list[str]], names: set[str]) -> set[str]:
    """Those computations and all that they call."""
    reached: set[str] = set()
    while names:
        reached |= names
        called = {name for caller in names for line in computations[caller] for name in _REFERENCE.findall(line)}
        names = (called & computations.keys()) - reached
    return reached


def _array_bytes(shape: str) -> int:
    """Bytes of an array or a tuple of arrays, such as `(bf16[1,6144]{1,0}, f32[8]{0})`."""
    return sum(
        _item_bytes(dtype) * int(np.prod([int(size) for size in sizes.split(",") if size]))
        for dtype, sizes in _ARRAY.findall(shape)
    )


def _item_bytes(dtype: str) -> int:
    """Bytes of XLA's `pred`, `bf16`, `f32`, `s8`, `u32` and their like."""
    if dtype == "pred":
        return 1
    bits = int(re.sub(r"\D*(\d+).*", r"\1", dtype))
    return bits // 8
