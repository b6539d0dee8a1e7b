"""The errors that a user can cause.

Each carries one sentence that says what was found, what was expected and what to do. They are raised where the
cause is known and caught once, in `grok1.cli`, which prints the sentence and exits with status 1.
"""


class Grok1Error(Exception):
    """Base of every error that a user can cause; `str(error)` is the sentence the user reads."""


class ConfigError(Grok1Error):
    """A model config that cannot be built, or a `config.json` that cannot be read."""


class CheckpointError(Grok1Error):
    """A checkpoint that is missing, damaged, not in the release's format, or that cannot be written."""


class TokenizerError(Grok1Error):
    """A tokenizer that is missing, unreadable or made for another vocabulary."""


class MeshError(Grok1Error):
    """A device mesh that the devices or the model cannot be divided by."""


class DeviceKindError(Grok1Error):
    """A kind of device that is not known, or whose memory is not."""


class TooSmallError(Grok1Error):
    """Devices without room for a model."""


class KernelsError(Grok1Error):
    """Kernels that were asked for and cannot be had."""


class CompileError(Grok1Error):
    """A program that the compiler cannot make for a device, or a compiler that is not installed."""


class RequestError(Grok1Error, ValueError):
    """A request that cannot be served: an empty or too long prompt, or a sampling option out of range."""


class JobError(Grok1Error):
    """A file of rows that cannot be worked on, or results that cannot be kept."""


class MultihostError(Grok1Error):
    """Processes that cannot work together, or of which one is gone."""
