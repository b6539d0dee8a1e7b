"""The model that the options of a command select."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from grok1.host.memory import DEFAULT_LOAD_MEMORY

if TYPE_CHECKING:
    from grok1.multihost.runtime import Runtime


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """Which model to load, and how.

    Attributes:
        checkpoint: folder that holds `ckpt-0`, or is it.
        tokenizer: a SentencePiece model; None looks in and beside the checkpoint.
        mesh: sizes of the (data, model) axes; None uses all devices.
        dtype: of activations and the KV cache; None chooses by device.
        load_memory: host memory limit in bytes for loading, in addition to the weights.
        kernels: the kernel implementation; "auto" chooses.
        threads: number of CPU threads; None uses one per physical core.
        runtime: the processes that load it together, of which this is process 0; None if there is only one.
    """

    checkpoint: Path
    tokenizer: Path | None
    mesh: tuple[int, int] | None = None
    dtype: str | None = None
    load_memory: int = DEFAULT_LOAD_MEMORY
    kernels: str = "auto"
    threads: int | None = None
    runtime: Runtime | None = None
