"""The loop of worker processes: they load what process 0 loads, and replay its steps.

Process 0 talks to the user. It sends what to load as a line of JSON, and then its steps.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from grok1.config import ModelConfig
from grok1.engine.replay import Step
from grok1.model import Model, load, random_model
from grok1.multihost.runtime import Runtime

_LOAD = b"load "


def tell_load(runtime: Runtime, mesh: tuple[int, int] | None, dtype: str | None, kernels: str) -> None:
    """Load the checkpoint in the worker processes; arguments as for `grok1.load`."""
    _tell(runtime, mesh=mesh, dtype=dtype, kernels=kernels)


def tell_random(
    runtime: Runtime, config: ModelConfig, mesh: tuple[int, int] | None, dtype: str | None, kernels: str
) -> None:
    """Create random weights in the worker processes; arguments as for `random_model`."""
    _tell(runtime, config=dataclasses.asdict(config), mesh=mesh, dtype=dtype, kernels=kernels)


def _tell(runtime: Runtime, **options: Any) -> None:
    runtime.send(_LOAD + json.dumps(options).encode())


def worker_loop(runtime: Runtime, checkpoint: Path, load_memory: int, threads: int | None) -> None:
    """Load what process 0 loads and replay its steps, until it ends this process.

    Args:
        runtime: of a process other than process 0.
        checkpoint: its path on this host.
        load_memory: as for `grok1.load`.
        threads: as for `grok1.load`.

    Raises:
        Grok1Error: as `grok1.load`.
    """
    model: Model | None = None
    while True:
        message = runtime.receive()
        if message.startswith(_LOAD):
            options = json.loads(message[len(_LOAD) :])
            config = options.pop("config", None)
            options["mesh"] = None if options["mesh"] is None else tuple(options["mesh"])
            model = None  # free its memory first
            if config is None:
                model = load(checkpoint, load_memory=load_memory, threads=threads, runtime=runtime, **options)
            else:
                model = random_model(ModelConfig(**config), threads=threads, runtime=runtime, **options)
        elif model is not None:
            model.engine.replay(Step.decode(message))
