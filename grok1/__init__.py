"""grok1: run the released Grok-1 checkpoint, on any JAX mesh.

    import grok1

    model = grok1.load("checkpoints")
    for piece in model.stream("The answer to life, the universe and everything is"):
        print(piece, end="", flush=True)

`import grok1` alone does not import JAX; the names below do when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from grok1.config import PRESETS, VERSION, ModelConfig
from grok1.errors import (
    CheckpointError,
    ConfigError,
    Grok1Error,
    MeshError,
    RequestError,
    TokenizerError,
)
from grok1.request import Request, SamplingOptions, TokenLogprobs

if TYPE_CHECKING:
    from grok1.model import Completion, CompletionStream, Model, Progress, Score, Timings, load

__version__ = VERSION

_FROM_MODEL = ("Completion", "CompletionStream", "Model", "Progress", "Score", "Timings", "load")

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Completion",
    "CompletionStream",
    "ConfigError",
    "Grok1Error",
    "MeshError",
    "Model",
    "ModelConfig",
    "Progress",
    "Request",
    "RequestError",
    "SamplingOptions",
    "Score",
    "Timings",
    "TokenLogprobs",
    "TokenizerError",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _FROM_MODEL:
        return getattr(importlib.import_module("grok1.model"), name)
    raise AttributeError(f"module 'grok1' has no attribute {name!r}")
