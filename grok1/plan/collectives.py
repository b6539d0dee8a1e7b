"""Collective operations in the text of a compiled program."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"

# An asynchronous operation is counted at its "-done" part, whose result is only the exchanged array.
_EXCHANGE = re.compile(rf"= (?P<result>.*?) (?P<kind>{_KINDS})(?:-done)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_REFERENCE = re.compile(r"%([\w.-]+)")
_LOOP_BODY = re.compile(r" while\(.*\bbody=%?([\w.-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """The collective operations of one kind in a step.

    Attributes:
        kind: "all-reduce", "all-gather" or another of XLA's names.
        per_layer: number of operations in the loop over the layers.
        layer_bytes: size of their results on one device.
        once: number of operations outside the loop.
        once_bytes: size of their results on one device.
    """

    kind: str
    per_layer: int
    layer_bytes: int
    once: int
    once_bytes: int


def collectives(text: str) -> tuple[Collectives, ...]:
    """Count the collective operations of a compiled program, by kind in alphabetical order.

    Args:
        text: the program from `jax.stages.Compiled.as_text`. Its only loop with collective operations must be the loop
            over the layers.
    """
    computations = _computations(text)
    in_loop = _reachable(computations, set(_LOOP_BODY.findall(text)))
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
    """Return the lines of each computation, by name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = found[match["name"]] = []
        elif line.startswith("  "):
            lines.append(line)
    return found


def _reachable(computations: dict[str, list[str]], names: set[str]) -> set[str]:
    """Return the given computations and all those that they call."""
    reached: set[str] = set()
    while names:
        reached |= names
        called = {name for caller in names for line in computations[caller] for name in _REFERENCE.findall(line)}
        names = (called & computations.keys()) - reached
    return reached


def _array_bytes(shape: str) -> int:
    """Return the size in bytes of an array or a tuple of arrays, such as `(bf16[1,6144]{1,0}, f32[8]{0})`."""
    return sum(
        _item_bytes(dtype) * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in _ARRAY.findall(shape)
    )


def _item_bytes(dtype: str) -> int:
    """Return the size in bytes of an XLA type such as `pred`, `bf16`, `f32`, `s8` or `u32`."""
    return 1 if dtype == "pred" else int(re.sub(r"\D*(\d+).*", r"\1", dtype)) // 8
