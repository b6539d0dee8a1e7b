"""What makes a job the same job, so that it can be resumed."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grok1.config import VERSION
from grok1.errors import JobError

_NAMES = {
    "command": "command",
    "input": "content of the input",
    "checkpoint": "checkpoint",
    "tokenizer": "tokenizer",
    "grok1": "version of grok1",
    "jax": "version of JAX",
    "device": "kind of device",
    "result_version": "version of the result lines",
}
_CONTENT = {"input", "checkpoint", "tokenizer"}  # whose values are hashes, which tell a reader nothing
_IF_ABSENT = {"result_version": 1}  # what a journal that lacks the key was begun with


def versions() -> dict[str, str]:
    """The programs that the last bit of a result may depend on."""
    return {"grok1": VERSION, "jax": importlib.metadata.version("jax")}


def check_same(journal: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks that a journal is of the job that is to be resumed.

    Args:
        journal: its path, for the message.
        before: what was said when it was begun.
        now: what is known of the job now; what it does not say is not compared. Keys that are not things of their own
            are options.

    Raises:
        JobError: if they differ; it says in what.
    """
    plain = json.loads(json.dumps(dict(now)))  # as it was written and read: no tuples
    before = _IF_ABSENT | dict(before)
    differing = [_difference(key, before.get(key), value) for key, value in plain.items() if before.get(key) != value]
    if differing:
        raise JobError(
            f"{journal} belongs to another job ({'; '.join(differing)}): go on with that one, name another output, or "
            "begin anew with --restart"
        )


def _difference(key: str, before: Any, now: Any) -> str:
    name = _NAMES.get(key)
    if key in _CONTENT:
        return f"the {name} has changed"
    if name is not None:
        return f"the {name} was {before}, now it is {now}"
    option = f"--{key.replace('_', '-')}"
    return f"{option} was {_shown(before)}, now it is {_shown(now)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) if value else "not given"
    if value is None or isinstance(value, bool):
        return "given" if value else "not given"
    return str(value)
