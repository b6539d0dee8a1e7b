"""Run the released Grok-1 checkpoint on any JAX mesh.

    import grok1

    model = grok1.load("checkpoints")
    for piece in model.stream("The answer to life, the universe and everything is"):
        print(piece, end="", flush=True)

Names are imported on first use, so `import grok1` is fast and does not import JAX.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # not imported from `typing`, because nothing is imported before `__main__` handles Ctrl-C
if TYPE_CHECKING:
    from grok1.config import PRESETS, ModelConfig
    from grok1.config import VERSION as __version__
    from grok1.errors import CheckpointError, ConfigError, Grok1Error, MeshError, RequestError, TokenizerError
    from grok1.model import Completion, CompletionStream, Model, Progress, Score, Timings, load
    from grok1.request import Request, SamplingOptions, TokenLogprobs

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
    "__version__",
    "load",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module("grok1.config").VERSION
    if name in __all__:
        for module in ("errors", "config", "request", "model"):  # only the last one imports JAX
            found = vars(importlib.import_module(f"grok1.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module 'grok1' has no attribute {name!r}")
