"""The compiler's own account of a decode and a prefill step, without a checkpoint and without the devices.

The programs are the engine's, lowered for abstract arrays: on virtual devices of the processor, or for GPUs or a slice
of TPUs that are described to their compiler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from grok1.config import ModelConfig
from grok1.engine.engine import Engine
from grok1.engine.programs import StepKey
from grok1.errors import CompileError, MeshError
from grok1.ops.kernels import kernels_without_packing
from grok1.params.sharding import make_mesh
from grok1.params.tree import abstract_parameters
from grok1.plan.collectives import Collectives, collectives
from grok1.plan.devices import DEVICE_KINDS

_SQUARE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

TOPOLOGIES = {
    kind: {int(np.prod([int(side) for side in name.split("x")])): name for name in names}
    for kind, names in (("v5e", _SQUARE), ("v5p", _CUBE), ("v6e", _SQUARE))
}
"""The slices of each kind of TPU, by their number of chips; a chip of these kinds is one JAX device.

For TPU v4, whose chips JAX runs as one device too, the compiler describes two devices a chip: it is left out.
"""


@dataclasses.dataclass(frozen=True)
class _GPU:
    """What XLA wants to know of an NVIDIA GPU to compile for it, as the CUDA programming guide and its maker tell.

    Attributes:
        name: JAX's name of such a device, in full.
        capability: compute capability, major version.
        multiprocessors: how many there are.
        lanes: of float32 in each.
        shared_memory: bytes in each.
        cache: bytes of the second-level cache.
        clock: GHz.
    """

    name: str
    capability: int
    multiprocessors: int
    lanes: int
    shared_memory: int
    cache: int
    clock: float


_H100 = _GPU("NVIDIA H100 80GB HBM3", 9, 132, 128, 228 << 10, 50 << 20, 1.98)
_GPUS = {
    "a100-40gb": _GPU("NVIDIA A100-SXM4-40GB", 8, 108, 64, 164 << 10, 40 << 20, 1.41),
    "a100-80gb": _GPU("NVIDIA A100-SXM4-80GB", 8, 108, 64, 164 << 10, 40 << 20, 1.41),
    "h100-80gb": _H100,
    "h800-80gb": _H100,  # but for links and float64 the same, and Pallas knows its name
    "h200": dataclasses.replace(_H100, name="NVIDIA H200"),
}
GPUS = tuple(_GPUS)
"""The kinds of GPU that can be described to the compiler."""

_GPUS_OF_HOST = 8

# What libtpu asks of the machine otherwise, with complaints where it is no TPU host; and that others may use it too,
# which it refuses for the sake of the devices that nobody opens here.
_LIBTPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of a step; all bytes are those of one device.

    The compiler's arguments are as large as the arrays that the step takes: to the byte on processors, and within
    0.001 % on TPUs, where the axes of the release fill the tiles of 32 x 128 int8 and 8 x 128 bfloat16 elements that
    memory is laid out in. Of the preset `tiny`, tiles half empty add 1.6 % on 8 TPUs.

    Attributes:
        name: "decode" or "prefill".
        device: JAX's name of the kind of device that it is compiled for.
        kernels: "xla", or the platform whose kernels it runs.
        sequences: how many the step works for, over all data rows.
        tokens: of each sequence that the step reads.
        weight_bytes: of the parameters, scales counted.
        cache_bytes: of keys and values.
        argument_bytes: what the step takes as the compiler lays it out: parameters, cache, tokens and options.
        output_bytes: what it gives.
        alias_bytes: the part of the output that takes the place of an argument.
        temporary_bytes: what it needs besides while it runs.
        code_bytes: of the program itself; 0 where the compiler does not say.
        peak_bytes: the most that the device holds: arguments, new outputs and temporaries, or the compiler's own
            peak if that is larger.
        layer_seconds: the compiler's own estimate of the time of one layer and of all that is no layer, together: it
            counts a loop once; None where it does not say, as for GPUs and processors.
        collectives: the exchanges between devices.
        compile_seconds: time to lower and to compile; short if the compilation cache held the program.
    """

    name: str
    device: str
    kernels: str
    sequences: int
    tokens: int
    weight_bytes: int
    cache_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    code_bytes: int
    peak_bytes: int
    layer_seconds: float | None
    collectives: tuple[Collectives, ...]
    compile_seconds: float


def compile_steps(
    config: ModelConfig,
    mesh: Mesh,
    dtype: np.dtype | type,
    *,
    slots: int,
    prefill_tokens: int,
    progress: Callable[[str], None] | None = None,
) -> Iterator[CompiledStep]:
    """Compiles the decode step, then the prefill step; nothing is allocated on a device.

    Args:
        config: the model.
        mesh: a (data, model) mesh, of devices that may be descriptions only.
        dtype: dtype of activations and of the cache.
        slots: sequences that are decoded together, a multiple of the mesh's data axis.
        prefill_tokens: tokens that a prefill step reads for each data row; at most 512 are read at a time.
        progress: is called with a step's name before it is lowered.

    Raises:
        CompileError: if the compiler knows that a step needs more memory than its device has.
        MeshError: if the slots do not divide by the data axis.
    """
    kernels = kernels_without_packing(mesh.devices.flat[0].platform)
    engine = Engine(config, abstract_parameters(config, mesh, dtype), mesh, dtype, kernels=kernels)
    rows = engine.data_rows
    if slots < 1 or slots % rows:
        raise MeshError(f"{slots} sequences do not divide by the mesh's {rows} data rows: use a multiple of {rows}")
    length = engine.chunk_bucket(min(prefill_tokens, engine.max_chunk))
    for key in (StepKey("decode", slots), StepKey("prefill", slots, rows, length)):
        if progress is not None:
            progress(key.kind)
        start = time.perf_counter()
        program = _compile(engine, key)
        seconds = time.perf_counter() - start
        yield CompiledStep(
            name=key.kind,
            device=mesh.devices.flat[0].device_kind,
            kernels=engine.kernels.backend,
            sequences=slots,
            tokens=key.length or 1,
            weight_bytes=device_bytes(engine.params),
            cache_bytes=engine.cache_bytes(slots),
            layer_seconds=_estimated_seconds(program),
            collectives=collectives(program.as_text() or ""),
            compile_seconds=seconds,
            **_memory(program),
        )


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays or of `jax.ShapeDtypeStruct`s with their shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def _compile(engine: Engine, key: StepKey) -> jax.stages.Compiled:
    try:
        return engine.compile(key)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(". ")
        raise CompileError(
            f"the {key.kind} step does not fit its device ({reason}): use more model shards, fewer sequences "
            "or a device with more memory"
        ) from None


def _estimated_seconds(program: jax.stages.Compiled) -> float | None:
    try:
        analysis: Any = program.cost_analysis()
    except (RuntimeError, NotImplementedError):  # not every compiler has one
        return None
    seconds = (analysis or {}).get("optimal_seconds", 0.0)
    return seconds if seconds > 0 else None


def _memory(program: jax.stages.Compiled) -> dict[str, int]:
    analysis: Any = program.memory_analysis()
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    aliased, temporaries = analysis.alias_size_in_bytes, analysis.temp_size_in_bytes
    return {
        "argument_bytes": arguments,
        "output_bytes": outputs,
        "alias_bytes": aliased,
        "temporary_bytes": temporaries,
        "code_bytes": analysis.generated_code_size_in_bytes,
        "peak_bytes": max(arguments + outputs - aliased + temporaries, analysis.peak_memory_in_bytes),
    }


def virtual_cpu_mesh(config: ModelConfig, shape: tuple[int, int]) -> Mesh:
    """A mesh of as many virtual devices of the processor as it needs.

    JAX makes them when it starts: a process has the number that it first asked for.

    Args:
        config: the model.
        shape: sizes of the data and the model axis.

    Raises:
        MeshError: if JAX has started with fewer, or the model does not divide.
    """
    count = shape[0] * shape[1]
    jax.config.update("jax_platforms", "cpu")
    _make_virtual_devices(count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise MeshError(
            f"mesh {shape[0]},{shape[1]} needs {count} virtual devices, but JAX has {len(devices)} here: "
            f"start anew with JAX_NUM_CPU_DEVICES={count} in the environment"
        )
    return make_mesh(config, shape, devices)


def topology_mesh(kind: str, config: ModelConfig, shape: tuple[int, int]) -> Mesh:
    """A mesh of the described devices of a whole TPU slice, in the order in which `make_mesh` takes real ones.

    Args:
        kind: a key of `TOPOLOGIES`.
        config: the model.
        shape: sizes of the data and the model axis; their product is a slice's number of chips.

    Raises:
        CompileError: if the TPU compiler is not installed or refuses the slice.
        MeshError: if there is no slice of that size, or the model does not divide.
    """
    name = topology_name(kind, shape[0] * shape[1])
    if importlib.util.find_spec("libtpu") is None:
        raise CompileError("the compiler for TPUs, libtpu, is not installed: pip install '.[tpu]'")
    for variable, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if name == "1x1" else {}
    refusal = f"TPUs refuses {kind}:{name}", "end other programs that use libtpu, or install another version of it"
    return make_mesh(config, shape, _describe("tpu", f"{kind}:{name}", refusal, **bounds))


def gpu_compiler_is_installed() -> bool:
    """Whether programs can be compiled for NVIDIA GPUs."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None for version in (12, 13))


def gpu_mesh(kind: str, config: ModelConfig, shape: tuple[int, int]) -> Mesh:
    """A mesh of described NVIDIA GPUs, eight to a host.

    Args:
        kind: one of `GPUS`, which is one of `DEVICE_KINDS`, too.
        config: the model.
        shape: sizes of the data and the model axis.

    Raises:
        CompileError: if the compiler for GPUs is not installed or refuses them.
        MeshError: if they are more than a host has and no whole hosts, or the model does not divide.
    """
    count = shape[0] * shape[1]
    if count > _GPUS_OF_HOST and count % _GPUS_OF_HOST:
        raise MeshError(
            f"{count} GPUs are no whole hosts of {_GPUS_OF_HOST}: use --count with a multiple of {_GPUS_OF_HOST}"
        )
    if not gpu_compiler_is_installed():
        raise CompileError("the compiler for GPUs is not installed: pip install '.[cuda]'")
    hosts = max(1, count // _GPUS_OF_HOST)
    options = {"target_config": _target_config(kind), "topology": f"1x{hosts}x{count // hosts}"}
    refusal = f"GPUs refuses {count} x {kind}", "install another version of JAX with its plugin for CUDA"
    return make_mesh(config, shape, _describe("cuda", kind, refusal, **options))


def _describe(platform: str, name: str, refusal: tuple[str, str], **options: Any) -> list[jax.Device]:
    """Devices that are described to the compiler of a platform.

    Args:
        platform: as JAX calls it.
        name: of the topology.
        refusal: what is refused then, after "the compiler for", and what to do about it.
        options: of the topology.

    Raises:
        CompileError: if the compiler refuses them.
    """
    jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc(name, platform, **options).devices
    except (RuntimeError, ValueError) as error:  # NotImplementedError is the first
        reason = str(error).splitlines()[0].rstrip(". ")
        raise CompileError(f"the compiler for {refusal[0]} ({reason}): {refusal[1]}") from None


def _target_config(kind: str) -> str:
    """XLA's description of a GPU, `GpuTargetConfigProto` as text."""
    gpu, figures = _GPUS[kind], DEVICE_KINDS[kind]
    assert figures.memory_bytes is not None
    assert figures.bandwidth is not None
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {gpu.shared_memory - 1024}
          shared_memory_per_core: {gpu.shared_memory}
          threads_per_core_limit: 2048
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          core_count: {gpu.multiprocessors}
          fpus_per_core: {gpu.lanes}
          clock_rate_ghz: {gpu.clock}
          l2_cache_size: {gpu.cache}
          memory_bandwidth: {round(figures.bandwidth)}
          device_memory_size: {figures.memory_bytes}
          cuda_compute_capability {{ major: {gpu.capability} }}
        }}
        platform_name: "CUDA"
        device_description_str: "{gpu.name}"
        runtime_version {{ major: 12 minor: 8 }}
        dnn_version_info {{ major: 9 minor: 8 }}
    """


def topology_name(kind: str, count: int) -> str:
    """The shape of a TPU slice of that many chips, such as "4x8".

    Raises:
        MeshError: if there is no such kind or no such slice of it.
    """
    if kind not in TOPOLOGIES:
        raise MeshError(f"no TPU slices are known of kind {kind!r}: choose one of {', '.join(TOPOLOGIES)}")
    slices = TOPOLOGIES[kind]
    if count not in slices:
        raise MeshError(f"there is no {kind} slice of {count} chips: choose one of {', '.join(map(str, slices))}")
    return slices[count]


def _make_virtual_devices(count: int) -> None:
    """Lets JAX start with `count` virtual devices, unless it has started or the user chose a number."""
    chosen = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen:
        with contextlib.suppress(RuntimeError):  # JAX has started: its devices are what there is
            jax.config.update("jax_num_cpu_devices", count)
