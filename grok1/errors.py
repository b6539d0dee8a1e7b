"""The errors that a user can cause.

Their messages are one sentence: what was found, what was expected, and how to fix it. They are raised where the cause
is known and caught once, in `grok1.cli`.
"""


class Grok1Error(Exception):
    """Base class; `str(error)` is the sentence that the user reads."""


class ConfigError(Grok1Error):
    """An invalid model config, or a `config.json` that cannot be read."""


class CheckpointError(Grok1Error):
    """A checkpoint that is missing, damaged or not in the release's format, or that cannot be written."""


class TokenizerError(Grok1Error):
    """A tokenizer that is missing, cannot be read, or has another vocabulary than the model."""


class MeshError(Grok1Error):
    """A device mesh that does not fit the devices or the model."""


class DeviceKindError(Grok1Error):
    """A kind of device that is unknown, or whose memory is."""


class TooSmallError(Grok1Error):
    """Devices with too little memory for a model."""


class KernelsError(Grok1Error):
    """Native kernels that are unavailable."""


class CompileError(Grok1Error):
    """A program that cannot be compiled for a device, or a compiler that is not installed."""


class RequestError(Grok1Error, ValueError):
    """An invalid request: an empty or too long prompt, or a sampling option out of range."""


class JobError(Grok1Error):
    """A file of rows that cannot be processed, or results that cannot be written."""


class MultihostError(Grok1Error):
    """Processes that cannot run together, or of which one has died."""
