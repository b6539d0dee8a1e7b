"""The fingerprint of a job: two runs with equal fingerprints produce the same results, so one can resume the other."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from grok1.checkpoint.audit.fingerprint import fingerprint
from grok1.checkpoint.reader import Checkpoint
from grok1.config import VERSION
from grok1.errors import JobError
from grok1.jobs.journal import Journal
from grok1.jobs.source import Source
from grok1.text.tokenizer import Tokenizer

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
_HASHES = {"input", "checkpoint", "tokenizer"}  # values that mean nothing to a reader
_IF_ABSENT = {"result_version": 1}  # values for journals that predate the key
_UNKNOWN_IF_ABSENT = {"kernels"}  # keys that older journals lack, with any value


def job_fingerprint(
    command: str, source: Source, checkpoint: Checkpoint, tokenizer: Tokenizer | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that determines the results of a job, except the devices; `source` has been read to its end."""
    return {
        "command": command,
        "input": source.sha256,
        "checkpoint": fingerprint(checkpoint),
        "tokenizer": tokenizer.sha256 if tokenizer is not None else None,
        "grok1": VERSION,
        "jax": importlib.metadata.version("jax"),
        "format": source.format,
        **options,
    }


def compare(journal: Journal | None, fingerprint: Mapping[str, Any]) -> None:
    """Check that a journal, if it has been started, belongs to a job.

    Args:
        journal: of an output; None without an output.
        fingerprint: the job's, or a part of it; only its keys are compared. Keys that are not in `_NAMES` are names of
            options.

    Raises:
        JobError: if they differ; the message lists the differences.
    """
    if journal is None or journal.job is None:
        return
    now = json.loads(json.dumps(dict(fingerprint)))  # lists for tuples, as in the journal
    before = _IF_ABSENT | {key: now.get(key) for key in _UNKNOWN_IF_ABSENT} | journal.job
    differing = [_difference(key, before.get(key), value) for key, value in now.items() if before.get(key) != value]
    if differing:
        raise JobError(
            f"{journal.path} belongs to another job: {'; '.join(differing)}; resume that job, choose another output, "
            "or start over with --restart"
        )


def _difference(key: str, before: Any, now: Any) -> str:
    name = _NAMES.get(key)
    if key in _HASHES:
        return f"the {name} has changed"
    if name is not None:
        return f"the {name} was {before} and is now {now}"
    option = f"--{key.replace('_', '-')}"
    return f"{option} was {_shown(before)} and is now {_shown(now)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) if value else "not given"
    if value is None or isinstance(value, bool):
        return "given" if value else "not given"
    return str(value)
