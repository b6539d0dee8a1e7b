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

from grok1.checkpoint.audit.fingerprint import difference, identity
from grok1.checkpoint.load import load_parameters
from grok1.checkpoint.reader import Checkpoint
from grok1.config import DTypeName, KernelsName, ModelConfig, default_dtype
from grok1.engine.compilation_cache import enable_compilation_cache
from grok1.engine.engine import Engine
from grok1.engine.replay import StepSender
from grok1.errors import CheckpointError, MultihostError
from grok1.host import memory
from grok1.host.threads import thread_count
from grok1.model.model import Model
from grok1.multihost.runtime import Runtime
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
    """Loads a checkpoint onto the devices there are.

        model = grok1.load("checkpoints", mesh=(1, 8))
        print(model.complete("The answer is", max_tokens=8).text)

    Args:
        checkpoint: folder that holds `ckpt-0`, or is it; or an opened checkpoint.
        tokenizer: a SentencePiece model, or a tokenizer; by default `tokenizer.model` in or beside the checkpoint.
            Without one the model takes and gives token ids only.
        mesh: sizes of the (data, model) axes; by default all devices on `model`, as far as the model divides.
        dtype: of activations and the key/value cache; by default bfloat16 on accelerators, float32 on CPUs.
        devices: the devices to use; by default all.
        load_memory: bytes of host memory beyond the weights that loading may take at a time; at least 16 MB.
        kernels: "native" for the platform's own kernels, "xla" for what XLA makes of plain JAX; "auto" takes the first
            where they can be had.
        threads: number of CPU threads of the kernels; by default one for each physical core that the process may
            use. XLA's own are set when JAX starts: see `grok1.host.threads`.
        progress: is called while files are checked, weights loaded and programs compiled, also later by the model's
            methods, from whichever thread does the work.
        runtime: the processes that load it together, each the part of its own devices; every one of them calls this
            with the same mesh, dtype and kernels. See `grok1.multihost` and `grok1.model.worker`.

    Raises:
        CheckpointError: if there is no checkpoint or it is damaged, or that of another process is another.
        ConfigError: if its `config.json` describes no possible model.
        KernelsError: if the native kernels were asked for and cannot be had.
        MeshError: if the model cannot be divided so.
        MultihostError: if the devices are not those of the processes of `runtime`.
        TokenizerError: if the tokenizer cannot be read or has another vocabulary.
        TooSmallError: if there is too little memory; no weight has been read then.
        ValueError: if `load_memory` is too little.
    """
    report = _reporter(progress)
    if isinstance(checkpoint, Checkpoint):
        opened = checkpoint
    else:
        report("checking", str(checkpoint))
        opened = Checkpoint.open(Path(checkpoint))
    config = opened.config
    text = _open_tokenizer(opened, tokenizer) if runtime is None or runtime.leads else None
    if runtime is not None:
        _require_same_checkpoint(runtime, opened)
    device_config = _DeviceConfig.choose(config, mesh, dtype, devices, kernels, threads, runtime)
    start = time.perf_counter()
    if not device_config.takes_part:
        params = device_config.abstract(config)
    else:
        params = load_parameters(
            opened,
            device_config.mesh,
            device_config.dtype,
            lambda done, total: _report_loading(runtime, report, done, total),
            load_memory,
            device_config.kernels.pack_box,
        )
    if runtime is not None:
        seconds = time.perf_counter() - start
        loads = runtime.exchange(
            "loaded",
            {"host": runtime.hosts[runtime.process_id], "bytes_read": opened.bytes_read, "seconds": seconds},
            lambda: _report_loading(runtime, report, 1, 1),
        )
        return device_config.model(config, params, report, text, loads)
    return device_config.model(config, params, report, text)


def random_model(
    config: ModelConfig,
    *,
    seed: int = 0,
    mesh: tuple[int, int] | None = None,
    dtype: DTypeName | None = None,
    devices: Sequence[jax.Device] | None = None,
    kernels: KernelsName = "auto",
    threads: int | None = None,
    progress: ProgressCallback | None = None,
    runtime: Runtime | None = None,
) -> Model:
    """A model of random weights made on the devices, without a checkpoint and without a tokenizer.

    Args:
        config: the model.
        seed: of the weights.
        mesh: as for `load`, as are all others.
        dtype: of activations and the key/value cache.
        devices: the devices to use.
        kernels: what computes.
        threads: number of CPU threads of the kernels.
        progress: is called as by `load`.
        runtime: as for `load`.

    Raises:
        KernelsError: as `load`.
        MeshError: as `load`.
        TooSmallError: as `load`.
    """
    report = _reporter(progress)
    device_config = _DeviceConfig.choose(config, mesh, dtype, devices, kernels, threads, runtime)
    report("loading", "random weights")
    params = device_config.abstract(config)
    if device_config.takes_part:
        params = random_parameters(
            config, device_config.mesh, device_config.dtype, device_config.kernels.packs_weights, seed
        )
    return device_config.model(config, params, report, None)


def _require_same_checkpoint(runtime: Runtime, opened: Checkpoint) -> None:
    """Makes sure that all processes have the same checkpoint.

    Raises:
        CheckpointError: if one has another.
    """
    known = runtime.exchange("checkpoint", identity(opened))
    for process, other in enumerate(known):
        name = difference(known[0], other)
        if name is not None:
            raise CheckpointError(
                f"{runtime.name_of(process)} sees another checkpoint than {runtime.name_of(0)}: {name} differs "
                f"({_of(other, name)} there, {_of(known[0], name)} here); copy the checkpoint again, or use one folder"
            )


def _of(known: Mapping[str, str], name: str) -> str:
    told = known.get(name, "none")
    return told if len(told) <= 60 else f"{told[:57]}..."


def _report_loading(runtime: Runtime | None, report: Callable[..., None], done: int, total: int) -> None:
    """Reports how far this process is, or of several processes the slowest."""
    if runtime is None:
        report("loading", "", done, total)
        return
    runtime.report_loading(done, total)
    process, done, total = runtime.slowest()
    report("loading", f"slowest is {runtime.name_of(process)}", done, total)


def _reporter(progress: ProgressCallback | None) -> Callable[..., None]:
    """What takes the fields of a `Progress` and hands it to the caller's `progress`, if there is one."""

    def report(stage: Any, detail: str, done: int = 0, total: int = 0) -> None:
        if progress is not None:
            progress(Progress(stage, detail, done, total))

    return report


@dataclasses.dataclass(frozen=True)
class _DeviceConfig:
    """The devices that a model runs on and how it runs on them; it fits their memory."""

    mesh: Mesh
    dtype: np.dtype
    kernels: Kernels
    fallback: str | None
    room: int | None
    idle: list[jax.Device]
    runtime: Runtime | None

    @classmethod
    def choose(
        cls,
        config: ModelConfig,
        mesh: tuple[int, int] | None,
        dtype: DTypeName | None,
        devices: Sequence[jax.Device] | None,
        kernels: KernelsName,
        threads: int | None,
        runtime: Runtime | None,
    ) -> _DeviceConfig:
        everywhere = list(jax.devices() if devices is None else devices)
        kind = np.dtype(dtype or default_dtype(everywhere[0].platform))
        present, memories = _present(everywhere, runtime)
        hosts = hosts_of(everywhere, runtime.host_of) if runtime is not None else None
        if mesh is None:

            def fits(shards: int) -> bool | None:
                return Estimate(config, present, (1, shards), kind.name).fits

            mesh = default_mesh_shape(config, len(everywhere), None if hosts is None else counts(hosts), fits)
        device_mesh = make_mesh(config, mesh, everywhere, hosts)
        enable_compilation_cache()  # before the kernels of a GPU are tried, which compiles some
        chosen = choose_kernels(config, device_mesh, kernels)
        if runtime is not None:
            chosen = _agreed_kernels(runtime, chosen, everywhere[0].platform)
        sequences = room(Estimate(config, present, mesh, kind.name, memories))
        chosen.kernels.set_threads(threads or thread_count())
        taken = set(device_mesh.devices.flat)
        idle = [device for device in everywhere if device not in taken]
        return cls(device_mesh, kind, chosen.kernels, chosen.fallback, sequences, idle, runtime)

    @property
    def takes_part(self) -> bool:
        """Whether the mesh has devices of this process."""
        return bool(local_devices(self.mesh.devices.flat))

    def abstract(self, config: ModelConfig) -> Any:
        """The parameters as `jax.ShapeDtypeStruct`."""
        return abstract_parameters(config, self.mesh, self.dtype, self.kernels.packs_weights)

    def model(
        self,
        config: ModelConfig,
        params: Any,
        report: Callable[..., None],
        tokenizer: Tokenizer | None,
        loads: Sequence[Mapping[str, Any]] = (),
    ) -> Model:
        """The model of parameters that are there."""
        sender = StepSender(self.runtime.send) if self.runtime is not None and self.runtime.leads else None
        engine = Engine(config, params, self.mesh, self.dtype, report, self.kernels, sender)
        return Model(engine, tokenizer, self.room, self.fallback, self.idle, loads)


def _present(devices: Sequence[jax.Device], runtime: Runtime | None) -> tuple[Devices, tuple[int, ...] | None]:
    """The devices with the memory that is free on them, the least of any process, and whose have memory of their own.

    Processes on one host share its memory evenly.
    """
    present = dataclasses.replace(present_devices(local_devices(devices) or jax.local_devices()), count=len(devices))
    if runtime is None:
        return present, None
    found = jax.process_index(), jax.process_count()
    if found != (runtime.process_id, runtime.cluster.num_processes):
        raise MultihostError(
            f"{runtime.name_of(runtime.process_id)} of {runtime.cluster.num_processes} is process {found[0]} of "
            f"{found[1]} by its devices: give all hosts devices of one kind, and start TPU slices with --distributed"
        )
    free = present.usable_bytes
    if free is not None and present.kind.shares_memory:
        free //= runtime.host_of.count(runtime.host_of[runtime.process_id])
    known = [count for count in runtime.exchange("memory", free) if count is not None]
    processes = counts([device.process_index for device in devices])
    return dataclasses.replace(present, usable_bytes=min(known, default=None)), processes


def _agreed_kernels(runtime: Runtime, chosen: ChosenKernels, platform: str) -> ChosenKernels:
    """The kernels of every process: the platform's own if all have them."""
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
