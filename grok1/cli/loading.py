"""The model that the options of a command select: choosing, opening and loading it."""

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


def read_tokenizer(choice: ModelChoice) -> Tokenizer | None:
    """The chosen checkpoint's tokenizer; None if there is none.

    Raises:
        TokenizerError: if it cannot be read.
    """
    from grok1.text.tokenizer import Tokenizer, find_tokenizer

    path = find_tokenizer(choice.checkpoint, choice.tokenizer)
    return None if path is None else Tokenizer.read(path)


def open_model(choice: ModelChoice, terminal: Terminal) -> tuple[Checkpoint, Tokenizer | None]:
    """Opens the chosen checkpoint and reads its tokenizer, if it has one; all files are checked, no array is read.

    Raises:
        CheckpointError: if there is no checkpoint or it is damaged.
        ConfigError: if its config is invalid.
        TokenizerError: if the tokenizer cannot be read or has another vocabulary.
    """
    from grok1.checkpoint.reader import Checkpoint

    terminal.show_status("checking files")
    checkpoint = Checkpoint.open(choice.checkpoint)
    tokenizer = read_tokenizer(choice)
    if tokenizer is not None:
        tokenizer.check_vocabulary(checkpoint.config.vocab_size)
    terminal.clear()
    return checkpoint, tokenizer


def import_jax(terminal: Terminal, threads: int | None = None) -> None:
    """Imports JAX, after setting the environment variables that it reads then; Ctrl-C ends the process immediately.

    Without --verbose XLA does not log to stderr. XLA may use more of a GPU's memory than its default of three quarters.
    `threads` is the number of CPU threads; None uses one per physical core.
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
    """Starts JAX, which takes a second or more, and returns its devices.

    Raises:
        Grok1Error: if it finds none.
    """
    import_jax(terminal, threads)
    import jax

    try:
        return jax.devices()
    except Exception as error:  # RuntimeError; AssertionError for a platform whose plugin is not installed
        platforms = os.environ.get("JAX_PLATFORMS")
        found = " ".join(str(error).split())[:200] or type(error).__name__
        because = f"JAX_PLATFORMS is {platforms!r}; " if platforms else ""
        raise Grok1Error(
            f"JAX could not start its devices ({found}): {because}set JAX_PLATFORMS=cpu to run on the processor, "
            "or unset it to use what there is"
        ) from error


def tell_shortfall(model: Model, terminal: Terminal) -> None:
    """Prints a note if a model uses XLA's kernels because the native ones are unavailable, and if devices are idle."""
    if model.kernels_fallback is not None:
        terminal.note(f"XLA computes, which is slower than the kernels made for it: {model.kernels_fallback}")
    if model.idle:
        data, shards = model.mesh_shape
        count = len(model.idle)
        hosts = Counter(model.loads[device.process_index]["host"] for device in model.idle) if model.loads else {}
        where = ", ".join(f"{number} on {host}" for host, number in hosts.items())
        terminal.note(
            f"{count} of {count + data * shards} devices {'stays' if count == 1 else 'stay'} idle"
            f"{f' ({where})' if where else ''}: the mesh is {data},{shards}"
        )


def load_model(
    choice: ModelChoice, terminal: Terminal, source: Checkpoint | ModelConfig, tokenizer: Tokenizer | None = None
) -> tuple[Model, float]:
    """Loads the chosen model and shows progress.

    Args:
        choice: the model.
        terminal: where to show progress.
        source: the chosen checkpoint, or the config of a model of random weights.
        tokenizer: the chosen one; None if there is none.

    Returns:
        the model, and how many seconds it took, including the start of JAX.
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
    tell_shortfall(model, terminal)
    return model, time.perf_counter() - start
