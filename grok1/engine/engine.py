"""Compilation and dispatch of the steps in `grok1.engine.programs` on a mesh.

A step is one SPMD program over the whole mesh, compiled once per shape. A prefill step processes one chunk, padded to
one of a few lengths, or several chunks of a fixed length.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grok1.config import ModelConfig
from grok1.engine.chunks import LANE_TOKENS, PrefillChunk
from grok1.engine.programs import CACHE_STATE, PROGRAMS, AnyState, BatchState, State, StepKey, host_partition
from grok1.engine.replay import Step, StepSender
from grok1.engine.sampling import SampledTokens
from grok1.network import KVCache, ModelShard
from grok1.ops.kernels import xla_kernels
from grok1.ops.xla.kernels import Kernels
from grok1.params.sharding import DATA_AXIS, MODEL_AXIS, local_devices
from grok1.request import MAX_LOGPROBS

_MAX_LANE_TOKENS = 512  # of all lanes of a step: a longer step would delay the next token of every sequence

# XLA:CPU uses only 256 bits of 512-bit registers by default. The option has no effect on CPUs without them.
_COMPILER_OPTIONS: dict[str, dict[str, Any]] = {"cpu": {"xla_cpu_prefer_vector_width": 512}}


class Engine:
    """Compiles and runs the model's steps on a mesh."""

    def __init__(
        self,
        config: ModelConfig,
        params: hk.Params,
        mesh: Mesh,
        dtype: np.dtype | type = np.float32,
        progress: Callable[[str, str, int, int], None] | None = None,
        kernels: Kernels | None = None,
        sender: StepSender | None = None,
    ):
        """Create an engine without compiling anything.

        Args:
            config: the model.
            params: parameters on the mesh, from `load_parameters`, or from `abstract_parameters` to lower programs
                without running them.
            mesh: a (data, model) mesh.
            dtype: dtype of activations and of the cache.
            progress: called as `progress(stage, detail, done, total)`: with "compiling" and a program's title before it
                is compiled, with "running" and the title afterwards, and with "reading" during the prefill of a long
                prompt, where `done` and `total` count tokens.
            kernels: implementation of the operations for the parameters' layout; plain JAX by default.
            sender: sends every step to the other processes of the mesh, which `replay` it.
        """
        self.config = config
        self.mesh = mesh
        self.compile_seconds = 0.0
        self.compiled: dict[StepKey, jax.stages.Compiled] = {}
        self.replayed: dict[int, State] = {}  # by handle
        self._progress = progress or (lambda stage, detail, done, total: None)
        self._platform = mesh.devices.flat[0].platform
        self.params = params
        self.kernels = kernels or xla_kernels(self._platform)
        self._shard = ModelShard(config, mesh.shape[MODEL_AXIS], MODEL_AXIS, jnp.dtype(dtype), self.kernels)
        self._sender = sender
        self._single_process = len(self.local_devices) == mesh.size

    @property
    def dtype(self) -> np.dtype:
        """Dtype of activations and of the cache."""
        return np.dtype(self._shard.dtype)

    @property
    def local_devices(self) -> list[jax.Device]:
        """Devices of the mesh that belong to this process."""
        return local_devices(self.mesh.devices.flat)

    @property
    def data_rows(self) -> int:
        """Size of the mesh's data axis. The number of slots of a batch is a multiple of it."""
        return int(self.mesh.shape[DATA_AXIS])

    @property
    def max_chunk(self) -> int:
        """Maximum length of a chunk in tokens."""
        return min(self.kernels.max_chunk, self.config.sequence_len)

    def chunk_bucket(self, count: int) -> int:
        """Return the length to which a step with one lane pads a chunk of `count` tokens, 1 to `max_chunk`."""
        length = LANE_TOKENS
        while length < count:
            length *= 2
        return min(length, self.max_chunk)

    def lanes_for(self, tokens: float) -> int:
        """Return the number of lanes, a power of 2, for prompts with `tokens` tokens to process on average.

        There are just enough lanes for one such prompt, because an unused lane costs about as much as a used one.
        """
        lanes = self.kernels.min_lanes
        while lanes * LANE_TOKENS < min(tokens, _MAX_LANE_TOKENS):
            lanes *= 2
        return lanes

    # Steps. These methods return once the step is dispatched, before it completes. They donate the state they take.

    def new_cache(self, slots: int) -> KVCache:
        """Create a cache with `slots` slots, a multiple of `data_rows`."""
        return self._run(StepKey("new_cache", slots))[0]

    def new_batch(self, slots: int) -> BatchState:
        """Create a batch with `slots` free slots, a multiple of `data_rows`."""
        return self._run(StepKey("new_batch", slots))[0]

    def logits(self, cache: KVCache, tokens: np.ndarray, start: int) -> tuple[jax.Array, KVCache]:
        """Process tokens and return the logits at each of them.

        Args:
            cache: cache with `start` positions of each sequence.
            tokens: int32 `[slots, n]`, with n at most `max_chunk`.
            start: position of the first token.

        Returns:
            logits, float32 `[slots, n, vocab]`, only for this process's data rows if there are several processes; and
            the cache.
        """
        slots, count = tokens.shape
        key = StepKey("logits", slots, slots, 1 if count == 1 else self.chunk_bucket(count))
        padded, positions = PROGRAMS[key.kind].host(key)
        padded[:, :count] = tokens
        positions[:, :count] = np.arange(start, start + count)
        cache, logits = self._run(key, cache, padded, positions)
        local = logits if self._single_process else logits.addressable_data(0)
        return local[:, :count], cache

    def score(
        self, cache: KVCache, chunks: Sequence[PrefillChunk], lanes: int = 1, logprobs: bool = False
    ) -> tuple[KVCache, SampledTokens, list[int]]:
        """Process chunks and compute the log-probabilities of their targets.

        Args:
            cache: the cache.
            chunks: as for `prefill`, each with targets.
            lanes: as for `prefill`.
            logprobs: whether to report the 20 most likely tokens instead of only the most likely one.

        Returns:
            the cache, arrays `[rows, length]` for the targets, and the row of each chunk.
        """
        top_logprobs = max(1, self._top_logprobs(logprobs))
        key, rows, host = self._pack("score", chunks, lanes, cache.keys.shape[1], top_logprobs)
        *_, targets = host
        for chunk, row in zip(chunks, rows, strict=True):
            targets[row, : len(chunk.tokens)] = chunk.targets
        cache, scored = self._run(key, cache, *host)
        return cache, scored, rows

    def prefill(
        self, state: BatchState, chunks: Sequence[PrefillChunk], lanes: int = 1, logprobs: bool = False
    ) -> tuple[BatchState, SampledTokens, list[int]]:
        """Process chunks of prompts, and sample the first token after each prompt that ends.

        With one lane, the step is padded to the bucket of its longest chunk. With several lanes, each has `LANE_TOKENS`
        positions and all are computed, used or not, so that a chunk's result does not depend on the other chunks.

        Args:
            state: the batch.
            chunks: at most `lanes` chunks per data row. With one lane a chunk has at most `max_chunk` tokens; with
                several, at most `LANE_TOKENS`, and consecutive chunks of one prompt may share a step.
            lanes: number of lanes per data row.
            logprobs: whether to report the most likely tokens.

        Returns:
            the batch, the first tokens `[rows]`, and the row of each chunk. The tokens of chunks without `sampling` are
            undefined.
        """
        top_logprobs = self._top_logprobs(logprobs)
        key, rows, host = self._pack("prefill", chunks, lanes, state.tokens.shape[0], top_logprobs)
        *_, ends, sampling = host
        for chunk, row in zip(chunks, rows, strict=True):
            if chunk.sampling is not None:
                ends[row] = True
                sampling.put(row, *chunk.sampling)
        state, sampled = self._run(key, state, *host)
        return state, sampled, rows

    def decode(self, state: BatchState, active: np.ndarray, logprobs: bool = False) -> tuple[BatchState, SampledTokens]:
        """Process the last token of each active sequence and sample the next.

        Args:
            state: the batch.
            active: bool `[slots]`.
            logprobs: whether to report the most likely tokens.

        Returns:
            the batch and the new tokens `[slots]`, undefined for inactive slots.
        """
        return self._run(StepKey("decode", len(active), top_logprobs=self._top_logprobs(logprobs)), state, active)

    def copy_prefix(self, state: AnyState, source: int, target: int, length: int) -> AnyState:
        """Copy the first `length` positions of slot `source` to slot `target` of the same data row."""
        slots = _cache(state).keys.shape[1]
        row_slots = slots // self.data_rows
        if source // row_slots != target // row_slots:
            raise ValueError(f"cannot copy from slot {source} to slot {target}, which is in another data row")
        pairs = np.full((self.data_rows, 2), -1, np.int32)
        pairs[source // row_slots] = source % row_slots, target % row_slots
        return self._run(StepKey("copy_prefix", slots, self.data_rows), state, pairs, np.asarray(length, np.int32))[0]

    def report_prefill(self, done: int, total: int) -> None:
        """Report progress in the prefill of a prompt of `total` tokens, if it takes several steps."""
        if total > self.max_chunk:
            self._progress("reading", "prompt", done, total)

    def _top_logprobs(self, wanted: bool) -> int:
        return min(MAX_LOGPROBS, self.config.vocab_size) if wanted else 0

    def _pack(
        self, kind: str, chunks: Sequence[PrefillChunk], lanes: int, slots: int, top_logprobs: int
    ) -> tuple[StepKey, list[int], tuple[Any, ...]]:
        """Return the key of the step that processes chunks, the row of each chunk, and the step's host arrays."""
        longest = max(len(chunk.tokens) for chunk in chunks)
        length = LANE_TOKENS if lanes > 1 else self.chunk_bucket(longest)
        key = StepKey(kind, slots, self.data_rows * lanes, length, top_logprobs)
        host = PROGRAMS[kind].host(key)
        tokens, positions, slot_indices, *_ = host
        row_slots = slots // self.data_rows
        used = [0] * self.data_rows
        rows = []
        for chunk in chunks:
            data_row, slot = divmod(chunk.slot, row_slots)
            row, count = data_row * lanes + used[data_row], len(chunk.tokens)
            used[data_row] += 1
            if used[data_row] > lanes or count > length:
                raise ValueError(
                    f"{used[data_row]} chunks of up to {longest} tokens do not fit in {lanes} lanes of {length} tokens"
                )
            tokens[row, :count] = chunk.tokens
            positions[row, :count] = np.arange(chunk.start, chunk.end)
            slot_indices[row] = slot
            rows.append(row)
        return key, rows, host

    # Compilation and dispatch

    def cache_bytes(self, slots: int) -> int:
        """Return the size in bytes of a cache's shard on one device."""
        cache = jax.eval_shape(partial(CACHE_STATE.new, self._shard, slots))
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(cache)) // self.mesh.size

    def lower(self, key: StepKey) -> jax.stages.Lowered:
        """Lower the program of a step. The engine's parameters may be abstract."""
        program = PROGRAMS[key.kind]
        return program.lower(key, self._shard, self.mesh, self.params, single_process=self._single_process)

    def compile(self, key: StepKey) -> jax.stages.Compiled:
        """Compile the program of a step. The engine's parameters may be abstract."""
        return self.lower(key).compile(_COMPILER_OPTIONS.get(self._platform))

    def _run(self, key: StepKey, state: Any = None, *host: Any) -> Any:
        """Run a step in every process of the mesh, compiling it on first use.

        Args:
            key: key of the step.
            state: input state; None if the step creates one.
            host: NumPy arrays in the structure of the program's `host`.

        Returns:
            the state and the outputs.
        """
        program = PROGRAMS[key.kind]
        if self._sender is not None:
            handle = self._sender.send(key, None if state is None else _cache(state).keys, jax.tree.leaves(host))
        batch = state if isinstance(state, BatchState) and program.state is CACHE_STATE else None
        weights = [self.params] if program.takes_weights else []
        states = [] if state is None else [state if batch is None else batch.cache]
        if key not in self.compiled:
            self._progress("compiling", program.title, 0, 0)
            start = time.perf_counter()
            self.compiled[key] = self.compile(key)
            self.compile_seconds += time.perf_counter() - start
            self._progress("running", program.title, 0, 0)
        state, outputs = self.compiled[key](*weights, *states, *self._on_mesh(host))
        if batch is not None:
            state = dataclasses.replace(batch, cache=state)
        if self._sender is not None:
            self._sender.returned(handle, _cache(state).keys)
        return state, outputs

    def replay(self, step: Step) -> None:
        """Run a step that another process of the mesh has sent, and store its state in `replayed`.

        Does nothing if this process has no device in the mesh.
        """
        if not self.local_devices:
            return
        for handle in step.freed:
            self.replayed.pop(handle, None)
        key = StepKey(*step.key)
        host = jax.tree.unflatten(jax.tree.structure(PROGRAMS[key.kind].host(key)), step.arrays)
        self.replayed[step.handle] = self._run(key, self.replayed.pop(step.handle, None), *host)[0]

    def _on_mesh(self, host: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return host arrays as a program takes them; with several processes, each provides its devices' shards."""
        if jax.process_count() == 1:
            return host

        def put(spec: PartitionSpec, array: np.ndarray) -> jax.Array:
            sharding = NamedSharding(self.mesh, spec)
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return jax.tree.map(put, host_partition(host), host)


def _cache(state: State) -> KVCache:
    return state if isinstance(state, KVCache) else state.cache
