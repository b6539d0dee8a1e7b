"""Compiler reports on the decode and prefill steps, without a checkpoint or devices.

The engine's programs are compiled with abstract arrays, for virtual CPU devices or for descriptions of GPUs or TPUs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
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
from grok1.plan.devices import DEVICE_KINDS, make_virtual_devices

_SQUARE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

TOPOLOGIES = {
    kind: {math.prod(map(int, name.split("x"))): name for name in names}
    for kind, names in (("v5e", _SQUARE), ("v5p", _CUBE), ("v6e", _SQUARE))
}
"""Topologies of TPU slices, by kind and number of chips. Each chip is one JAX device.

TPU v4 is excluded because the compiler describes two devices per chip, but JAX runs one.
"""


@dataclasses.dataclass(frozen=True)
class _GPU:
    """Properties of an NVIDIA GPU that XLA needs to compile for it, from the CUDA programming guide and data sheets.

    Attributes:
        name: JAX's full name of the device.
        capability: major version of the compute capability.
        multiprocessors: number of multiprocessors.
        lanes: float32 units per multiprocessor.
        shared_memory: bytes per multiprocessor.
        cache: bytes of L2 cache.
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
    "h800-80gb": _H100,  # differs only in links and float64; Pallas recognizes the name of the H100
    "h200": dataclasses.replace(_H100, name="NVIDIA H200"),
}
GPUS = tuple(_GPUS)
"""The kinds of GPU that programs can be compiled for."""

_GPUS_OF_HOST = 8

# Keep libtpu from querying the host, which fails without a TPU, and from locking devices.
_LIBTPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The compiler's report on a step; all bytes are per device.

    Attributes:
        name: "decode" or "prefill".
        device: JAX's name of the target device kind.
        kernels: "xla", or the platform of the native kernels.
        sequences: number of sequences, over all data rows.
        tokens: number of tokens per sequence in the step.
        weight_bytes: size of the parameters, including scales.
        cache_bytes: size of keys and values.
        argument_bytes: size of parameters, cache, tokens and options in the compiler's layout. On TPUs it has tiles of
            32 x 128 int8 or 8 x 128 bfloat16 elements, which the release's shapes fill without padding.
        output_bytes: size of all outputs.
        alias_bytes: size of outputs that reuse the memory of an argument.
        temporary_bytes: size of temporary buffers.
        code_bytes: size of the program; 0 if the compiler does not report it.
        peak_bytes: arguments, new outputs and temporaries, or the peak that the compiler reports if that is larger.
        layer_seconds: the compiler's estimate of the time of one layer plus everything outside the layers, since it
            counts a loop once; None if it gives no estimate, as on GPUs and CPUs.
        collectives: collective operations.
        compile_seconds: time to lower and compile, short if the program is in the compilation cache.
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
    """Compile the decode step, then the prefill step; nothing is allocated on a device.

    Args:
        config: the model.
        mesh: a (data, model) mesh; its devices may be descriptions.
        dtype: dtype of activations and of the cache.
        slots: number of sequences decoded together, a multiple of the mesh's data axis.
        prefill_tokens: number of tokens per data row in a prefill step, limited to `Engine.max_chunk`.
        progress: called with a step's name before it is lowered.

    Raises:
        CompileError: if a step does not fit in the memory of its device.
        MeshError: if `slots` is not a multiple of the mesh's data axis.
    """
    kernels = kernels_without_packing(mesh.devices.flat[0].platform)
    engine = Engine(config, abstract_parameters(config, mesh, dtype), mesh, dtype, kernels=kernels)
    rows = engine.data_rows
    if slots < 1 or slots % rows:
        raise MeshError(f"cannot divide {slots} sequences among {rows} data rows, expected a multiple of {rows}")
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
    """Return the bytes per device of a tree of arrays, or of `jax.ShapeDtypeStruct`s with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _compile(engine: Engine, key: StepKey) -> jax.stages.Compiled:
    try:
        return engine.compile(key)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(". ")
        raise CompileError(
            f"the {key.kind} step does not fit on the device ({reason}); use more model shards, fewer sequences "
            "or a device with more memory"
        ) from None


def _estimated_seconds(program: jax.stages.Compiled) -> float | None:
    try:
        analysis: Any = program.cost_analysis()
    except (RuntimeError, NotImplementedError):  # not every compiler has a cost analysis
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
    """Make a (data, model) mesh of virtual CPU devices.

    Raises:
        MeshError: if JAX has started with too few devices, or the model cannot be split across them.
    """
    count = shape[0] * shape[1]
    jax.config.update("jax_platforms", "cpu")
    make_virtual_devices(count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise MeshError(
            f"mesh {shape[0]},{shape[1]} needs {count} virtual devices, but JAX has {len(devices)}; "
            f"set JAX_NUM_CPU_DEVICES={count} in the environment"
        )
    return make_mesh(config, shape, devices)


def topology_mesh(kind: str, config: ModelConfig, shape: tuple[int, int]) -> Mesh:
    """Make a (data, model) mesh of the devices of a described TPU slice, in the order of real ones.

    Raises:
        CompileError: if the TPU compiler is not installed or rejects the slice.
        MeshError: if `TOPOLOGIES` has no such slice, or the model cannot be split across it.
    """
    name = topology_name(kind, shape[0] * shape[1])
    if importlib.util.find_spec("libtpu") is None:
        raise CompileError("libtpu, the compiler for TPUs, is not installed; run pip install '.[tpu]'")
    for variable, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if name == "1x1" else {}
    refusal = f"TPUs rejects {kind}:{name}", "end other programs that use libtpu, or install another version of it"
    return make_mesh(config, shape, _describe("tpu", f"{kind}:{name}", refusal, **bounds))


def gpu_compiler_is_installed() -> bool:
    """Return whether programs can be compiled for NVIDIA GPUs."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None for version in (12, 13))


def gpu_mesh(kind: str, config: ModelConfig, shape: tuple[int, int]) -> Mesh:
    """Make a (data, model) mesh of described NVIDIA GPUs of a kind in `GPUS`, eight per host.

    Raises:
        CompileError: if the GPU compiler is not installed or rejects the GPUs.
        MeshError: if there are more GPUs than on one host, but not whole hosts; or the model cannot be split across
            them.
    """
    count = shape[0] * shape[1]
    if count > _GPUS_OF_HOST and count % _GPUS_OF_HOST:
        raise MeshError(f"--count is {count}, expected a multiple of {_GPUS_OF_HOST}, the number of GPUs per host")
    if not gpu_compiler_is_installed():
        raise CompileError("JAX's CUDA plugin, the compiler for GPUs, is not installed; run pip install '.[cuda12]'")
    hosts = max(1, count // _GPUS_OF_HOST)
    options = {"target_config": _target_config(kind), "topology": f"1x{hosts}x{count // hosts}"}
    refusal = f"GPUs rejects {count} x {kind}", "install another version of JAX and its CUDA plugin"
    return make_mesh(config, shape, _describe("cuda", kind, refusal, **options))


def _describe(platform: str, name: str, refusal: tuple[str, str], **options: Any) -> list[jax.Device]:
    """Describe the devices of a topology to a platform's compiler.

    Args:
        platform: JAX's name of the platform.
        name: name of the topology.
        refusal: parts of the error message: what follows "the compiler for", and the remedy.
        options: options of the topology.

    Raises:
        CompileError: if the compiler rejects the topology.
    """
    jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc(name, platform, **options).devices
    except (RuntimeError, ValueError) as error:  # RuntimeError includes NotImplementedError
        reason = str(error).splitlines()[0].rstrip(". ")
        raise CompileError(f"the compiler for {refusal[0]} ({reason}); {refusal[1]}") from None


def _target_config(kind: str) -> str:
    """Return XLA's description of a GPU, a `GpuTargetConfigProto` in text format."""
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
    """Return the shape of the TPU slice with `count` chips, such as "4x8".

    Raises:
        MeshError: if the kind or the size is unknown.
    """
    if kind not in TOPOLOGIES:
        raise MeshError(f'unknown kind of TPU slice "{kind}", expected one of {", ".join(TOPOLOGIES)}')
    slices = TOPOLOGIES[kind]
    if count not in slices:
        raise MeshError(f"there is no {kind} slice of {count} chips, expected one of {', '.join(map(str, slices))}")
    return slices[count]
