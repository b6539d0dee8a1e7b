"""Measurement of the speed of a model, and of the memory bandwidth and compute rate of its devices."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from grok1.config import ModelConfig
from grok1.engine.chunks import PrefillChunk
from grok1.engine.engine import Engine
from grok1.engine.programs import BatchState
from grok1.errors import RequestError
from grok1.host.threads import num_threads
from grok1.model import Model
from grok1.ops.cpu import library as cpu
from grok1.params.weights import Panels, QuantizedMatrix, panels_shape
from grok1.plan.devices import present_devices
from grok1.plan.estimate import Estimate
from grok1.request import SamplingOptions

_WARM_STEPS = 2  # decode steps before the measured ones
_PREFILLS = 3  # number of measured prefills; fewer if they take longer than `_PREFILL_SECONDS`
_PREFILL_SECONDS = 10.0
READ_BYTES = 1 << 30
"""Size of the array read to measure memory bandwidth."""
MATRIX_SIZE = 2048
"""Size of the matrices multiplied to measure the compute rate of CPUs."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Measured limits of all devices of a model together.

    Attributes:
        read_bytes_per_second: rate of reading memory that is not cached.
        matrix_operations_per_second: rate of multiplying large matrices, counting additions and multiplications.
        matrix_product: description of the measured product.
    """

    read_bytes_per_second: float
    matrix_operations_per_second: float
    matrix_product: str


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Measured speed for one prompt length and number of sequences.

    Attributes:
        prompt_tokens: tokens of each sequence's prompt.
        batch: number of sequences.
        decode_steps: number of decode steps after prefill, of `batch` tokens each.
        prefill_seconds: time to prefill all prompts, one after the other.
        prefill_operations: number of multiplications and additions of prefill.
        prefill_bytes: bytes of weights that prefill reads, once per chunk of a prompt.
        time_to_first_token_seconds: time until the first token of the first prompt is on the host.
        decode_step_seconds: time of a decode step.
        decode_bytes_per_step: bytes of weights and KV cache that a decode step reads on all devices; see
            `Estimate.decode_read_bytes`.
        decode_operations_per_step: number of multiplications and additions of a decode step.
    """

    prompt_tokens: int
    batch: int
    decode_steps: int
    prefill_seconds: float
    prefill_operations: float
    prefill_bytes: int
    time_to_first_token_seconds: float
    decode_step_seconds: float
    decode_bytes_per_step: int
    decode_operations_per_step: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second, of all sequences together."""
        return self.prompt_tokens * self.batch / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Generated tokens per second, of all sequences together."""
        return self.batch / self.decode_step_seconds

    @property
    def decode_bytes_per_second(self) -> float:
        """Bytes of weights and KV cache read per second while decoding."""
        return self.decode_bytes_per_step / self.decode_step_seconds


def longest_prompt(config: ModelConfig, decode_steps: int) -> int:
    """Return the length of the longest prompt that leaves room for `decode_steps`; at least 1."""
    return max(1, config.sequence_len - decode_steps - _WARM_STEPS)


def check_measurable(
    config: ModelConfig, data_rows: int, room: int | None, prompt_tokens: int, batch: int, decode_steps: int
) -> None:
    """Check that a measurement is possible, before the model is loaded.

    Args:
        config: the model.
        data_rows: size of the data axis of the mesh.
        room: number of sequences that fit in memory; None if unknown.
        prompt_tokens: as for `measure`.
        batch: as for `measure`.
        decode_steps: as for `measure`.

    Raises:
        RequestError: if the context is too short, or `batch` does not fit in memory or on the mesh.
    """
    context, needed = config.sequence_len, prompt_tokens + decode_steps + _WARM_STEPS
    if needed > context:
        raise RequestError(
            f"{prompt_tokens} prompt tokens, {_WARM_STEPS} warm-up steps and {decode_steps} decode steps need {needed} "
            f"positions, but the context has {context}: lower --prompt or --decode"
        )
    if batch % data_rows:
        raise RequestError(
            f"batch size {batch} is not divisible by the {data_rows} data rows of the mesh: choose a multiple"
        )
    if room is not None and batch > room:
        raise RequestError(
            f"batch size {batch} does not fit in memory, which has room for the weights and {room} sequences of "
            f"{context} tokens: lower --batch"
        )


def measure(model: Model, prompt_tokens: int, batch: int, decode_steps: int) -> Measurement:
    """Measure prefill and then decode, after compiling every program and running it once.

    Args:
        model: the model.
        prompt_tokens: length of each sequence's random prompt.
        batch: number of sequences.
        decode_steps: number of decode steps to measure.

    Raises:
        RequestError: see `check_measurable`.
    """
    engine = model.engine
    check_measurable(model.config, engine.data_rows, model.max_sequences, prompt_tokens, batch, decode_steps)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.config.vocab_size, (batch, prompt_tokens)).astype(np.int32)
    state, _ = _prefill(engine, engine.new_batch(batch), prompts)  # compiles
    jax.block_until_ready(state)
    prefills: list[float] = []
    firsts: list[float] = []
    while len(prefills) < _PREFILLS and sum(prefills) < _PREFILL_SECONDS:
        start = time.perf_counter()
        state, first_token = _prefill(engine, state, prompts)
        jax.block_until_ready(state)
        prefills.append(time.perf_counter() - start)
        firsts.append(first_token - start)
    active = np.ones(batch, bool)
    state = _decode(engine, state, active, _WARM_STEPS)
    start = time.perf_counter()
    _decode(engine, state, active, decode_steps)
    step = (time.perf_counter() - start) / decode_steps
    estimate = estimate_of(model)
    of_all_shards = batch * model.mesh_shape[1]
    context = prompt_tokens + _WARM_STEPS + decode_steps // 2
    return Measurement(
        prompt_tokens=prompt_tokens,
        batch=batch,
        decode_steps=decode_steps,
        prefill_seconds=statistics.median(prefills),
        prefill_operations=of_all_shards * estimate.operations(prompt_tokens, prompt_tokens / 2),
        prefill_bytes=_prefill_bytes(estimate, engine, batch, prompt_tokens),
        time_to_first_token_seconds=statistics.median(firsts),
        decode_step_seconds=step,
        decode_bytes_per_step=estimate.decode_read_bytes(batch, context) * engine.mesh.size,
        decode_operations_per_step=of_all_shards * estimate.operations(1, context),
    )


def _decode(engine: Engine, state: BatchState, active: np.ndarray, steps: int) -> BatchState:
    """Decode as `generate` does: dispatch each step before waiting for the previous one."""
    before: jax.Array | None = None
    for _ in range(steps):
        state, sampled = engine.decode(state, active)
        jax.block_until_ready(before)
        before = sampled.tokens
    jax.block_until_ready(before)
    return state


def _prefill(engine: Engine, state: BatchState, prompts: np.ndarray) -> tuple[BatchState, float]:
    """Prefill a prompt into each slot, one per data row at a time; also return the time of the first token."""
    batch, length = prompts.shape
    slots_of_row = batch // engine.data_rows
    first_token: float | None = None
    before: jax.Array | None = None
    for slot in range(slots_of_row):
        slots = [row * slots_of_row + slot for row in range(engine.data_rows)]
        for start in range(0, length, engine.max_chunk):
            end = min(start + engine.max_chunk, length)
            options = SamplingOptions(ignore_eos=True)
            chunks = [
                PrefillChunk(slot, prompts[slot, start:end], start, (options, slot) if end == length else None)
                for slot in slots
            ]
            state, sampled, _ = engine.prefill(state, chunks)
            jax.block_until_ready(before)
            before = sampled.tokens
        if first_token is None:
            np.asarray(sampled.tokens)
            first_token = time.perf_counter()
    assert first_token is not None
    return state, first_token


def estimate_of(model: Model) -> Estimate:
    """Return the estimate for a loaded model on its devices."""
    engine = model.engine
    devices = dataclasses.replace(present_devices(engine.local_devices), count=engine.mesh.size)
    return Estimate(model.config, devices, model.mesh_shape, engine.dtype.name)


def _prefill_bytes(estimate: Estimate, engine: Engine, batch: int, tokens: int) -> int:
    chunks = [min(engine.max_chunk, tokens - start) for start in range(0, tokens, engine.max_chunk)]
    of_a_prompt = sum(estimate.decode_read_bytes(count * engine.data_rows, 0) for count in chunks)
    return of_a_prompt * engine.mesh.size * batch // engine.data_rows


def weight_bytes(model: Model) -> int:
    """Return the size of the model's weights on all devices, counting replicated weights once per device."""
    total = 0
    for array in jax.tree.leaves(model.engine.params):
        parts = array.sharding.devices_indices_map(array.shape)
        copies = set(map(str, parts.values())) if _platform(model) == "cpu" else parts  # data rows share memory
        total += len(copies) * math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    return total


def measure_limits(model: Model) -> Limits:
    """Measure the limits of a model's devices."""
    devices = list(model.engine.mesh.devices.flat)
    on_host = _platform(model) == "cpu"
    times = 1 if on_host else len(devices)  # CPU devices share memory and cores
    read = _host_read_rate(devices[0], model.engine.kernels.packs_weights) if on_host else _device_read_rate(devices[0])
    if model.engine.kernels.packs_weights:
        return Limits(read, _packed_rate(), "8-bit matrix product")
    rate = matrix_rate(devices[0], model.engine.dtype)
    return Limits(times * read, times * rate, f"{model.engine.dtype.name} matrix product")


def _platform(model: Model) -> str:
    return str(model.engine.mesh.devices.flat[0].platform)


def _best_rate(work: Callable[[], object], amount: float) -> float:
    """Return the highest rate at which `work` processes `amount`, after one warm-up run."""
    work()
    return amount / min(timeit.repeat(work, number=1))


def _read_bytes(device: jax.Device) -> int:
    free = present_devices([device]).usable_bytes
    return max(1 << 20, READ_BYTES if free is None else min(READ_BYTES, free // 4))


def _host_read_rate(device: jax.Device, native: bool) -> float:
    memory = np.ones(_read_bytes(device) // 2048 * 256, np.uint64)
    if native:
        return _best_rate(lambda: cpu.read(memory), memory.nbytes)
    parts = np.array_split(memory, num_threads())

    def read(part: np.ndarray) -> None:
        for start in range(0, len(part), 1 << 16):
            np.maximum.reduce(part[start : start + (1 << 16)])

    with ThreadPoolExecutor(len(parts)) as threads:
        return _best_rate(lambda: list(threads.map(read, parts)), memory.nbytes)


def _device_read_rate(device: jax.Device) -> float:
    memory = _on_device(device)
    largest = jax.jit(jnp.max)
    return _best_rate(lambda: largest(memory).block_until_ready(), memory.nbytes)


def device_copy_rate(device: jax.Device) -> float:
    """Measure the bytes per second that a device reads and writes while copying within its memory."""
    memory = _on_device(device)
    copy = jax.jit(jnp.copy)
    return _best_rate(lambda: copy(memory).block_until_ready(), 2.0 * memory.nbytes)


def _on_device(device: jax.Device) -> jax.Array:
    return jax.device_put(jnp.ones(_read_bytes(device) // 4, jnp.int32), device)


def _packed_rate() -> float:
    """Measure the operations per second of the native kernels, for many rows and a matrix that fits in cache."""
    size, rows = MATRIX_SIZE, 512
    panels = jnp.ones(panels_shape((1, size, size), 1), jnp.uint8)
    weight = QuantizedMatrix(panels, jnp.ones((1, 1, size), jnp.bfloat16), layout=Panels(size))
    product = jax.jit(cpu.multiply)
    x, index = jnp.ones((rows, size)), jnp.zeros(rows, jnp.int32)
    return _best_rate(lambda: product(x, weight, index).block_until_ready(), 2.0 * rows * size**2)


def matrix_rate(device: jax.Device, dtype: np.dtype) -> float:
    """Measure the operations per second of multiplying two large random matrices."""
    size = MATRIX_SIZE if device.platform == "cpu" else 4 * MATRIX_SIZE
    matrix = jax.device_put(jax.random.normal(jax.random.key(0), (size, size), dtype), device)
    product = jax.jit(jnp.dot)
    return _best_rate(lambda: product(matrix, matrix).block_until_ready(), 2.0 * size**3)
