"""Errors caused by user input or the environment.

Each message is one sentence that says what was found, what was expected, and how to fix it. Errors are raised where the
cause is known and caught once, in `grok1.cli`.
"""

from __future__ import annotations

import json


def json_value(value: object) -> str:
    """Return a value in JSON notation, in which messages show values."""
    return json.dumps(value, default=str, ensure_ascii=False)


class Grok1Error(Exception):
    """Base class; `str(error)` is the message for the user."""


class ConfigError(Grok1Error):
    """An invalid model config, or a `config.json` that cannot be read."""


class CheckpointError(Grok1Error):
    """A checkpoint that is missing, damaged or not in the release's format, or that cannot be written."""


class TokenizerError(Grok1Error):
    """A tokenizer that is missing, cannot be read, or does not match the model's vocabulary."""


class MeshError(Grok1Error):
    """A device mesh that does not fit the devices or the model."""


class DeviceKindError(Grok1Error):
    """A device whose kind or memory size is unknown."""


class TooSmallError(Grok1Error):
    """Devices with too little memory for a model."""


class KernelsError(Grok1Error):
    """Native kernels that are unavailable."""


class CompileError(Grok1Error):
    """A program that cannot be compiled for a device, or a missing compiler."""


class RequestError(Grok1Error, ValueError):
    """An invalid request: an empty or too long prompt, or a sampling option out of range."""


class JobError(Grok1Error):
    """An input file that cannot be processed, or results that cannot be written."""


class MultihostError(Grok1Error):
    """Cooperating processes that cannot connect or disagree, or of which one has died."""
