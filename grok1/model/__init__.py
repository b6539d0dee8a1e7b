"""The Python API: `load` a checkpoint, and a `Model` that completes and scores text."""

from grok1.model.load import load, random_model
from grok1.model.model import Model
from grok1.model.results import Completion, CompletionStream, Score, Timings, TokenScores
from grok1.progress import Progress, ProgressCallback
from grok1.request import Request

__all__ = [
    "Completion",
    "CompletionStream",
    "Model",
    "Progress",
    "ProgressCallback",
    "Request",
    "Score",
    "Timings",
    "TokenScores",
    "load",
    "random_model",
]
