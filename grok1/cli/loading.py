"""Opening and loading of the model that the options of a command select."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grok1.cli.terminal import Terminal
from grok1.config import ModelConfig
from grok1.errors import Grok1Error
from grok1.host.memory import DEFAULT_LOAD_MEMORY
from grok1.host.threads import set_threads
from grok1.plan.devices import GPU_MEMORY_FRACTION

if TYPE_CHECKING:
    import jax

    from grok1.checkpoint.reader import Checkpoint
    from grok1.model import Model
    from grok1.multihost.runtime import Runtime
    from grok1.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """Values of the options that select a model.

    Attributes:
        checkpoint: directory that contains `ckpt-0`, or the `ckpt-0` directory itself.
        tokenizer: SentencePiece model file; None searches in and next to the checkpoint.
        mesh: sizes of the (data, model) axes; None for the default mesh.
        dtype: dtype of activations and of the KV cache; None for the default of the devices.
        load_memory: host memory limit in bytes for loading, in addition to the weights.
        kernels: kernel implementation.
        threads: number of CPU threads; None for one per physical core.
        runtime: connection to the other processes that load the model, if there are several.
    """

    checkpoint: Path
    tokenizer: Path | None
    mesh: tuple[int, int] | None = None
    dtype: str | None = None
    load_memory: int = DEFAULT_LOAD_MEMORY
    kernels: str = "auto"
    threads: int | None = None
    runtime: Runtime | None = None


def read_tokenizer(choice: ModelChoice) -> Tokenizer | None:
    """Return the tokenizer of the selected checkpoint, or None if it has none.

    Raises:
        TokenizerError: if it cannot be read.
    """
    from grok1.text.tokenizer import Tokenizer, find_tokenizer

    path = find_tokenizer(choice.checkpoint, choice.tokenizer)
    return None if path is None else Tokenizer.read(path)


def open_model(choice: ModelChoice, terminal: Terminal) -> tuple[Checkpoint, Tokenizer | None]:
    """Open the selected checkpoint and its tokenizer, if it has one, checking the structure of all files.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged.
        ConfigError: if its config is invalid.
        TokenizerError: if the tokenizer cannot be read or does not match the model's vocabulary.
    """
    from grok1.checkpoint.reader import Checkpoint

    terminal.show_status("checking the checkpoint")
    checkpoint = Checkpoint.open(choice.checkpoint)
    tokenizer = read_tokenizer(choice)
    if tokenizer is not None:
        tokenizer.check_vocabulary(checkpoint.config.vocab_size)
    terminal.clear()
    return checkpoint, tokenizer


def import_jax(terminal: Terminal, threads: int | None = None) -> None:
    """Set the environment variables that JAX reads on import, and import it; Ctrl-C ends the process immediately.

    Without --verbose, XLA does not log to stderr. XLA may allocate more GPU memory than its default of 75%.

    Args:
        terminal: the output streams.
        threads: number of CPU threads; None for one per physical core.
    """
    terminal.show_status("starting JAX")
    set_threads(threads)
    if not terminal.verbose:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(GPU_MEMORY_FRACTION)
    with terminal.importing():
        import jax  # noqa: F401


def start_jax(terminal: Terminal, threads: int | None = None) -> Sequence[jax.Device]:
    """Start JAX and return its devices.

    Raises:
        Grok1Error: if JAX finds no devices.
    """
    import_jax(terminal, threads)
    import jax

    try:
        return jax.devices()
    except Exception as error:  # RuntimeError; AssertionError for a platform whose plugin is not installed
        platforms = os.environ.get("JAX_PLATFORMS")
        found = " ".join(str(error).split())[:200] or type(error).__name__
        setting = f' with JAX_PLATFORMS="{platforms}"' if platforms else ""
        raise Grok1Error(
            f"JAX found no usable device{setting} ({found}): set JAX_PLATFORMS=cpu to run on the CPU, or unset it to "
            "use the available devices"
        ) from error


def note_shortfall(model: Model, terminal: Terminal) -> None:
    """Print a note if native kernels are unavailable, and if devices are idle."""
    if model.kernels_fallback is not None:
        terminal.note(f"Using XLA kernels, which are slower than native kernels: {model.kernels_fallback}")
    if model.idle:
        data, shards = model.mesh_shape
        count = len(model.idle)
        hosts = Counter(model.loads[device.process_index]["host"] for device in model.idle) if model.loads else {}
        where = ", ".join(f"{number} on {host}" for host, number in hosts.items())
        terminal.note(
            f"{count} of {count + data * shards} devices {'is' if count == 1 else 'are'} not used by the mesh "
            f"{data},{shards}{f': {where}' if where else ''}."
        )


def load_model(
    choice: ModelChoice, terminal: Terminal, source: Checkpoint | ModelConfig, tokenizer: Tokenizer | None = None
) -> tuple[Model, float]:
    """Load the selected model and show progress.

    Args:
        choice: the options that select the model.
        terminal: the output streams.
        source: the checkpoint, or the config of a model with random weights.
        tokenizer: the tokenizer, if there is one.

    Returns:
        the model, and the time in seconds, including starting JAX.
    """
    start = time.perf_counter()
    start_jax(terminal, choice.threads)
    with terminal.importing():
        from grok1.model import load, random_model
        from grok1.model.worker import tell_load, tell_random

    shared: dict[str, Any] = {"mesh": choice.mesh, "dtype": choice.dtype, "kernels": choice.kernels}
    own: dict[str, Any] = {"threads": choice.threads, "progress": terminal.progress, "runtime": choice.runtime}
    if isinstance(source, ModelConfig):
        if choice.runtime is not None:
            tell_random(choice.runtime, source, **shared)
        model = random_model(source, **shared, **own)
    else:
        if choice.runtime is not None:
            tell_load(choice.runtime, **shared)
        model = load(source, tokenizer=tokenizer, load_memory=choice.load_memory, **shared, **own)
    terminal.clear()
    note_shortfall(model, terminal)
    return model, time.perf_counter() - start
