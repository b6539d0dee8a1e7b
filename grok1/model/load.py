"""Loads a checkpoint, or random weights, onto the devices of this process or of several."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grok1.checkpoint.audit.fingerprint import compare, fingerprint_parts
from grok1.checkpoint.load import load_parameters
from grok1.checkpoint.reader import Checkpoint
from grok1.config import DTypeName, KernelsName, ModelConfig, default_dtype
from grok1.engine.compilation_cache import enable_compilation_cache
from grok1.engine.engine import Engine
from grok1.engine.replay import StepSender
from grok1.errors import CheckpointError, MultihostError
from grok1.host import memory
from grok1.host.threads import num_threads
from grok1.model.model import Model
from grok1.multihost.runtime import Runtime, connect_devices
from grok1.ops.kernels import ChosenKernels, choose_kernels, xla_kernels
from grok1.ops.xla.kernels import Kernels
from grok1.params.random import random_parameters
from grok1.params.sharding import counts, default_mesh_shape, hosts_of, local_devices, make_mesh
from grok1.params.tree import abstract_parameters
from grok1.plan.devices import Devices, present_devices
from grok1.plan.estimate import Estimate
from grok1.plan.verdict import room
from grok1.progress import Progress, ProgressCallback
from grok1.text.tokenizer import Tokenizer, find_tokenizer


def load(
    checkpoint: str | Path | Checkpoint = "checkpoints",
    *,
    tokenizer: str | Path | Tokenizer | None = None,
    mesh: tuple[int, int] | None = None,
    dtype: DTypeName | None = None,
    devices: Sequence[jax.Device] | None = None,
    load_memory: int = memory.DEFAULT_LOAD_MEMORY,
    kernels: KernelsName = "auto",
    threads: int | None = None,
    progress: ProgressCallback | None = None,
    runtime: Runtime | None = None,
) -> Model:
    """Load a checkpoint.

        model = grok1.load("checkpoints", mesh=(1, 8))
        print(model.complete("The answer is", max_tokens=8).text)

    Args:
        checkpoint: directory with the tensor files or with `ckpt-0`, or an opened checkpoint.
        tokenizer: a SentencePiece model, or a tokenizer; by default `tokenizer.model` in or beside the checkpoint.
            Without one the model works with token ids only.
        mesh: sizes of the (data, model) axes; by default the largest number of devices, on the model axis, that the
            model can be split across.
        dtype: of activations and the KV cache; by default bfloat16 on accelerators, float32 on CPUs.
        devices: the devices to use; by default all.
        load_memory: host memory limit for loading in bytes, in addition to the weights; at least 16 MB.
        kernels: "native" (written for the platform) or "xla" (plain JAX); "auto" is native if available.
        threads: number of CPU threads of the kernels; by default one for each physical core that the process may
            use. XLA's own are set when JAX starts: see `grok1.host.threads`.
        progress: called while files are checked, weights are loaded and programs are compiled, also later by the
            model's methods, in the thread that does the work.
        runtime: the processes that load it together, each for its own devices. All of them call this function with the
            same mesh, dtype and kernels; see `grok1.multihost` and `grok1.model.worker`.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged, or differs between processes.
        ConfigError: if its `config.json` is invalid.
        KernelsError: if native kernels were requested and are not available.
        MeshError: if the model cannot be split across this mesh.
        MultihostError: if the devices are not those of the processes of `runtime`.
        TokenizerError: if the tokenizer cannot be read or has another vocabulary.
        TooSmallError: if there is too little memory; no weight has been read then.
        ValueError: if `load_memory` is too little.
    """
    report = _reporter(progress)
    if not isinstance(checkpoint, Checkpoint):
        report("checking", str(checkpoint))
        checkpoint = Checkpoint.open(Path(checkpoint))
    text = _open_tokenizer(checkpoint, tokenizer) if runtime is None or runtime.leads else None
    if runtime is not None:
        _require_same_checkpoint(runtime, checkpoint)
    device_config = _DeviceConfig.choose(checkpoint.config, mesh, dtype, devices, kernels, threads, runtime)
    start = time.perf_counter()
    params = device_config.abstract_parameters()
    if device_config.takes_part:
        params = load_parameters(
            checkpoint,
            device_config.mesh,
            device_config.dtype,
            lambda done, total: _report_loading(runtime, report, done, total),
            load_memory,
            device_config.kernels.pack_box,
        )
    loads = []
    if runtime is not None:
        seconds = time.perf_counter() - start
        loads = runtime.exchange(
            "loaded",
            {"host": runtime.hosts[runtime.process_id], "bytes_read": checkpoint.bytes_read, "seconds": seconds},
            lambda: _report_loading(runtime, report, 1, 1),
        )
    return device_config.model(params, report, text, loads)


def random_model(
    config: ModelConfig, *, seed: int = 0, progress: ProgressCallback | None = None, **options: Any
) -> Model:
    """Create a model with random weights, without a tokenizer.

    Args:
        config: the model.
        seed: of the weights.
        progress: as for `load`.
        **options: `mesh`, `dtype`, `devices`, `kernels`, `threads` and `runtime`, as for `load`.

    Raises:
        KernelsError, MeshError, TooSmallError: as `load`.
    """
    report = _reporter(progress)
    device_config = _DeviceConfig.choose(config, **options)
    report("loading", "random weights")
    params = device_config.abstract_parameters()
    if device_config.takes_part:
        packs = device_config.kernels.packs_weights
        params = random_parameters(config, device_config.mesh, device_config.dtype, packs, seed)
    return device_config.model(params, report, None)


def _require_same_checkpoint(runtime: Runtime, opened: Checkpoint) -> None:
    """Check that all processes use the same checkpoint; raises CheckpointError if not."""
    known = runtime.exchange("checkpoint", fingerprint_parts(opened))
    for process, other in enumerate(known):
        name = compare(known[0], other)
        if name is not None:
            raise CheckpointError(
                f"the checkpoint of {runtime.name_of(process)} differs from that of {runtime.name_of(0)} in {name} "
                f"({_shortened(other.get(name))}, expected {_shortened(known[0].get(name))}); copy it again, or use a "
                "shared directory"
            )


def _shortened(value: str | None) -> str:
    text = value or "none"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _report_loading(runtime: Runtime | None, report: Callable[..., None], done: int, total: int) -> None:
    """Report the progress of this process, or of the slowest of several."""
    if runtime is None:
        report("loading", "", done, total)
        return
    runtime.report_loading(done, total)
    process, done, total = runtime.slowest()
    report("loading", f"slowest is {runtime.name_of(process)}", done, total)


def _reporter(progress: ProgressCallback | None) -> Callable[..., None]:
    """A function that takes the fields of a `Progress` and passes it to `progress`."""

    def report(stage: Any, detail: str, done: int = 0, total: int = 0) -> None:
        if progress is not None:
            progress(Progress(stage, detail, done, total))

    return report


@dataclasses.dataclass(frozen=True)
class _DeviceConfig:
    """How a model runs on its devices, in whose memory it fits; see `Model` and `load` for the attributes."""

    config: ModelConfig
    mesh: Mesh
    dtype: np.dtype
    kernels: Kernels
    kernels_fallback: str | None
    max_sequences: int | None
    idle: list[jax.Device]
    runtime: Runtime | None

    @classmethod
    def choose(
        cls,
        config: ModelConfig,
        mesh: tuple[int, int] | None = None,
        dtype: DTypeName | None = None,
        devices: Sequence[jax.Device] | None = None,
        kernels: KernelsName = "auto",
        threads: int | None = None,
        runtime: Runtime | None = None,
    ) -> _DeviceConfig:
        devices = list(jax.devices() if devices is None else devices)
        platform = devices[0].platform
        activation_dtype = np.dtype(dtype or default_dtype(platform))
        present, memories = _present(devices, runtime)
        hosts = hosts_of(devices, runtime.host_of) if runtime is not None else None
        if mesh is None:

            def fits(shards: int) -> bool | None:
                return Estimate(config, present, (1, shards), activation_dtype.name).fits

            mesh = default_mesh_shape(config, len(devices), None if hosts is None else counts(hosts), fits)
        device_mesh = make_mesh(config, mesh, devices, hosts)
        enable_compilation_cache()  # before the kernels of a GPU are tried, which compiles some
        chosen = choose_kernels(config, device_mesh, kernels)
        if runtime is not None:
            chosen = _agreed_kernels(runtime, chosen, platform)
            if local_devices(device_mesh.devices.flat):
                connect_devices(device_mesh)
        sequences = room(Estimate(config, present, mesh, activation_dtype.name, memories))
        chosen.kernels.set_threads(threads or num_threads())
        on_mesh = set(device_mesh.devices.flat)
        idle = [device for device in devices if device not in on_mesh]
        return cls(config, device_mesh, activation_dtype, chosen.kernels, chosen.fallback, sequences, idle, runtime)

    @property
    def takes_part(self) -> bool:
        """Whether the mesh has devices of this process."""
        return bool(local_devices(self.mesh.devices.flat))

    def abstract_parameters(self) -> Any:
        """Return the parameters as `jax.ShapeDtypeStruct`."""
        return abstract_parameters(self.config, self.mesh, self.dtype, self.kernels.packs_weights)

    def model(
        self,
        params: Any,
        report: Callable[..., None],
        tokenizer: Tokenizer | None,
        loads: Sequence[Mapping[str, Any]] = (),
    ) -> Model:
        """Return the model with these parameters."""
        sender = StepSender(self.runtime.send) if self.runtime is not None and self.runtime.leads else None
        engine = Engine(self.config, params, self.mesh, self.dtype, report, self.kernels, sender)
        return Model(engine, tokenizer, self.max_sequences, self.kernels_fallback, self.idle, loads)


def _present(devices: Sequence[jax.Device], runtime: Runtime | None) -> tuple[Devices, tuple[int, ...] | None]:
    """The devices, with the least memory available on one in any process, and the number of devices of each process.

    Processes on one host share its memory evenly. The numbers are None for a single process.
    """
    present = dataclasses.replace(present_devices(local_devices(devices) or jax.local_devices()), count=len(devices))
    if runtime is None:
        return present, None
    found = jax.process_index(), jax.process_count()
    if found != (runtime.process_id, runtime.cluster.num_processes):
        raise MultihostError(
            f"{runtime.name_of(runtime.process_id)} of {runtime.cluster.num_processes} is process {found[0]} of "
            f"{found[1]} by its devices; use devices of the same kind on all hosts, and --distributed on TPU slices"
        )
    free = present.usable_bytes
    if free is not None and present.kind.shares_memory:
        free //= runtime.host_of.count(runtime.host_of[runtime.process_id])
    known = [count for count in runtime.exchange("memory", free) if count is not None]
    processes = counts([device.process_index for device in devices])
    return dataclasses.replace(present, usable_bytes=min(known, default=None)), processes


def _agreed_kernels(runtime: Runtime, chosen: ChosenKernels, platform: str) -> ChosenKernels:
    """Return the kernels for all processes: native ones if they are available everywhere."""
    everybody = runtime.exchange("kernels", {"native": chosen.native, "fallback": chosen.fallback})
    lacking = [process for process, other in enumerate(everybody) if not other["native"]]
    if not chosen.native or not lacking:
        return chosen
    reason = everybody[lacking[0]]["fallback"] or "it has none that are faster"
    return ChosenKernels(xla_kernels(platform), f"{runtime.name_of(lacking[0])} cannot use them, as {reason}")


def _open_tokenizer(checkpoint: Checkpoint, given: str | Path | Tokenizer | None) -> Tokenizer | None:
    if isinstance(given, Tokenizer):
        tokenizer = given
    else:
        path = find_tokenizer(checkpoint.directory, None if given is None else Path(given))
        if path is None:
            return None
        tokenizer = Tokenizer.read(path)
    tokenizer.check_vocabulary(checkpoint.config.vocab_size)
    return tokenizer
