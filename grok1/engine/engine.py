"""The compiled steps: reading prompts, joining sequences to a batch, and decoding one token for each of them.

A prompt is read in chunks of a few fixed lengths into a cache of its own, which is then copied into the slots of the
batch that continues it. Every step is one program over the whole mesh, compiled once for each of its shapes.
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
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grok1.config import ModelConfig
from grok1.engine.request import MAX_LOGPROBS, SamplingOptions
from grok1.engine.sampling import SampledTokens, SamplingState, sample, token_logprobs
from grok1.network import KVCache, ModelShard, network
from grok1.sharding import DATA_AXIS, MODEL_AXIS

MAX_CHUNK = 512
"""The most tokens of a sequence that one step reads."""

_MIN_CHUNK = 16

# XLA:CPU uses half of a 512-bit register unless told otherwise; where there are none this changes nothing.
_COMPILER_OPTIONS = {"cpu": {"xla_cpu_prefer_vector_width": 512}}

_CACHE = PartitionSpec(None, DATA_AXIS, MODEL_AXIS)
_BATCH = PartitionSpec(DATA_AXIS)
_REPLICATED = PartitionSpec()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchState:
    """The sequences that are being continued, one a slot, on the devices.

    Attributes:
        cache: keys and values, `[layers, slots, ...]`.
        tokens: int32 `[slots]`, each sequence's last token, which is not in the cache yet.
        positions: int32 `[slots]`, the positions of those tokens.
        sampling: each sequence's sampling options.
    """

    cache: KVCache
    tokens: jax.Array
    positions: jax.Array
    sampling: SamplingState


_STATE: Any = BatchState(_CACHE, _BATCH, _BATCH, _BATCH)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt that has been read, ready to be continued any number of times.

    Attributes:
        cache: its keys and values; every data row of the mesh holds them.
        logits: float32 `[data rows, vocab]`, what may come next.
        length: its number of tokens.
    """

    cache: KVCache
    logits: jax.Array
    length: int


class Engine:
    """A model on a mesh, and its compiled steps."""

    def __init__(
        self,
        config: ModelConfig,
        params: hk.Params,
        mesh: Mesh,
        dtype: np.dtype | type = np.float32,
        progress: Callable[[str, str, int, int], None] | None = None,
    ):
        """Args are kept as they are.

        Args:
            config: the model.
            params: its parameters on the mesh, as `load_parameters` gives them; to lower programs without running
                them, as `abstract_parameters` does.
            mesh: a (data, model) mesh.
            dtype: dtype of activations and of the cache.
            progress: is called with what a long step does: "compiling" and a program's name before it is compiled,
                "running" and that name when it has been, "reading" with the tokens of a prompt done and to do.
        """
        self.config = config
        self.mesh = mesh
        self.capacity = config.sequence_len
        self.compile_seconds = 0.0
        self._progress = progress or (lambda stage, detail, done, total: None)
        self._platform = mesh.devices.flat[0].platform
        self.params = params
        self._param_specs = jax.tree.map(lambda array: array.sharding.spec, params)
        self._shard = ModelShard(config, mesh.shape[MODEL_AXIS], MODEL_AXIS, jnp.dtype(dtype))
        self._network = network(self._shard)
        self._programs: dict[tuple[object, ...], Any] = {}

    @property
    def data_rows(self) -> int:
        """Size of the mesh's data axis: the number of slots of a batch is a multiple of it."""
        return int(self.mesh.shape[DATA_AXIS])

    # Reading

    def new_cache(self, batch: int) -> KVCache:
        """A cache for `batch` sequences, a multiple of `data_rows`; its content means nothing yet."""
        abstract = self.abstract_cache(batch)

        def zeros() -> KVCache:
            return jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), abstract)

        placed = NamedSharding(self.mesh, _CACHE)
        return self._run(("cache", batch), "cache", lambda: jax.jit(zeros, out_shardings=placed))

    def abstract_cache(self, batch: int) -> KVCache:
        """What `new_cache` gives, with a `jax.ShapeDtypeStruct` for each array."""
        config, shard = self.config, self._shard
        heads = shard.num_kv_heads * shard.shards
        shape = (config.num_layers, batch, heads, self.capacity, config.key_size)
        array = jax.ShapeDtypeStruct(shape, shard.dtype, sharding=NamedSharding(self.mesh, _CACHE))
        return KVCache(array, array)  # type: ignore[arg-type]

    def read(self, cache: KVCache, tokens: np.ndarray, start: int) -> tuple[jax.Array, KVCache]:
        """Reads tokens into a cache and gives the logits at every one of them.

        Args:
            cache: holds `start` positions of each sequence; it is consumed.
            tokens: int32 `[batch, n]`, with n at most `max_chunk`.
            start: position of the first token.

        Returns:
            float32 `[batch, n, vocab]`, and the cache.
        """
        logits, cache = self._read(cache, tokens, start, every_position=True)
        return logits[:, : tokens.shape[1]], cache

    def prefill(self, tokens: Sequence[int]) -> Prompt:
        """Reads a prompt of 1 to `capacity` tokens.

        Args:
            tokens: the prompt's token ids.
        """
        ids = np.asarray(tokens, np.int32)
        cache = self.new_cache(self.data_rows)
        logits = None
        for start in range(0, len(ids), self.max_chunk):
            if start:
                jax.block_until_ready(logits)  # so that progress is true, and Ctrl-C comes through
                self._progress("reading", "prompt", start, len(ids))
            chunk = np.tile(ids[start : start + self.max_chunk], (self.data_rows, 1))
            logits, cache = self._read(cache, chunk, start, every_position=False)
        assert logits is not None
        return Prompt(cache, logits, len(ids))

    def score(self, tokens: Sequence[int]) -> SampledTokens:
        """The log-probability of each of 2 to `capacity` tokens but the first, given all before it.

        Returns:
            NumPy arrays with an entry for each token but the first.
        """
        ids = np.asarray(tokens, np.int32)
        cache = self.new_cache(self.data_rows)
        parts = []
        for start in range(0, len(ids) - 1, self.max_chunk):
            chunk = ids[start : start + self.max_chunk][: len(ids) - 1 - start]
            targets = ids[start + 1 : start + 1 + len(chunk)]
            logits, cache = self._read(cache, np.tile(chunk, (self.data_rows, 1)), start, every_position=True)
            padded = np.zeros(logits.shape[1], np.int32)
            padded[: len(chunk)] = targets
            key = ("score", logits.shape[1])
            scored = jax.device_get(self._run(key, "scoring", lambda: jax.jit(self._score_step), logits, padded))
            parts.append(SampledTokens(*(array[: len(chunk)] for array in jax.tree.leaves(scored))))
        return jax.tree.map(lambda *pieces: np.concatenate(pieces), *parts)

    @property
    def max_chunk(self) -> int:
        """The most tokens that one step reads."""
        return min(MAX_CHUNK, self.capacity)

    def chunk_length(self, count: int) -> int:
        """The compiled length that `count` tokens are padded to."""
        if count == 1:
            return 1
        length = _MIN_CHUNK
        while length < count:
            length *= 2
        return min(length, self.max_chunk)

    def _read(
        self, cache: KVCache, tokens: np.ndarray, start: int, *, every_position: bool
    ) -> tuple[jax.Array, KVCache]:
        batch, count = tokens.shape
        length = self.chunk_length(count)
        padded = np.zeros((batch, length), np.int32)
        padded[:, :count] = tokens
        positions = np.full((batch, length), -1, np.int32)
        positions[:, :count] = np.arange(start, start + count)
        return self._run(
            ("read", batch, length, every_position),
            "prefill",
            lambda: self._read_program(every_position),
            self.params,
            cache,
            padded,
            positions,
        )

    def _read_program(self, every_position: bool) -> Any:
        return self._over_mesh(
            partial(self._read_step, every_position=every_position),
            (self._param_specs, _CACHE, _BATCH, _BATCH),
            (_BATCH, _CACHE),
            donate=(1,),
        )

    def _read_step(
        self, params: hk.Params, cache: KVCache, tokens: jax.Array, positions: jax.Array, every_position: bool
    ) -> tuple[jax.Array, KVCache]:
        return self._network.apply(params, tokens, positions, cache, every_position)

    def _score_step(self, logits: jax.Array, targets: jax.Array) -> SampledTokens:
        return token_logprobs(logits[0], targets, min(MAX_LOGPROBS, self.config.vocab_size))

    # Continuing

    def new_batch(self, slots: int) -> BatchState:
        """A batch of free slots.

        Args:
            slots: a multiple of `data_rows`.
        """
        batch = NamedSharding(self.mesh, _BATCH)
        zeros = np.zeros(slots, np.int32)
        return BatchState(
            cache=self.new_cache(slots),
            tokens=jax.device_put(zeros, batch),
            positions=jax.device_put(zeros, batch),
            sampling=jax.device_put(SamplingState.empty(slots), batch),
        )

    def insert(
        self, state: BatchState, prompt: Prompt, slot: int, options: SamplingOptions, seed: int
    ) -> tuple[BatchState, SampledTokens]:
        """Lets a slot continue a prompt and draws the first token.

        Args:
            state: the batch; it is consumed.
            prompt: a prompt that has been read; it can be used again.
            slot: which slot; whatever it held is gone.
            options: how to sample.
            seed: of the sequence's random stream.

        Returns:
            the batch, and the sequence's first token as arrays with a leading axis of 1.
        """
        wanted = self._top_logprobs(options.logprobs is not None)
        return self._run(
            ("insert", state.tokens.shape[0], wanted),
            "sampling",
            lambda: self._over_mesh(
                partial(self._insert_step, top_logprobs=wanted),
                (_STATE, _CACHE, _BATCH, _REPLICATED, _REPLICATED, _REPLICATED),
                (_STATE, _REPLICATED),
                donate=(0,),
            ),
            state,
            prompt.cache,
            prompt.logits,
            np.int32(prompt.length),
            np.int32(slot),
            SamplingState.of(options, seed),
        )

    def _insert_step(
        self,
        state: BatchState,
        cache: KVCache,
        logits: jax.Array,
        length: jax.Array,
        slot: jax.Array,
        sampling: SamplingState,
        top_logprobs: int,
    ) -> tuple[BatchState, SampledTokens]:
        first = sample(logits[:1], sampling, length[None], top_logprobs)
        local_slots = state.tokens.shape[0]
        place = slot - (lax.axis_index(DATA_AXIS) * local_slots if self.data_rows > 1 else 0)
        mine = (place >= 0) & (place < local_slots)
        place = jnp.clip(place, 0, local_slots - 1)

        def put(whole: jax.Array, new: jax.Array, axis: int = 0) -> jax.Array:
            old = lax.dynamic_slice_in_dim(whole, place, 1, axis)
            return lax.dynamic_update_slice_in_dim(whole, jnp.where(mine, new, old), place, axis)

        joined = BatchState(
            cache=jax.tree.map(partial(put, axis=1), state.cache, cache),
            tokens=put(state.tokens, first.tokens),
            positions=put(state.positions, length[None]),
            sampling=jax.tree.map(put, state.sampling, sampling),
        )
        return joined, first

    def decode(self, state: BatchState, active: np.ndarray, logprobs: bool = False) -> tuple[BatchState, SampledTokens]:
        """Reads each active sequence's last token and draws its next.

        Returns at once; the arrays are ready when the devices are.

        Args:
            state: the batch; it is consumed.
            active: bool `[slots]`; nothing is computed for the other slots.
            logprobs: whether to report the likeliest tokens.

        Returns:
            the batch and the new tokens, `[slots]`; those of inactive slots mean nothing.
        """
        wanted = self._top_logprobs(logprobs)
        return self._run(
            ("decode", len(active), wanted),
            "decoding",
            lambda: self._decode_program(wanted),
            self.params,
            state,
            active,
        )

    def _decode_program(self, top_logprobs: int) -> Any:
        return self._over_mesh(
            partial(self._decode_step, top_logprobs=top_logprobs),
            (self._param_specs, _STATE, _BATCH),
            (_STATE, _BATCH),
            donate=(1,),
        )

    def _decode_step(
        self, params: hk.Params, state: BatchState, active: jax.Array, top_logprobs: int
    ) -> tuple[BatchState, SampledTokens]:
        positions = jnp.where(active, state.positions, -1)
        logits, cache = self._network.apply(params, state.tokens[:, None], positions[:, None], state.cache, False)
        following = state.positions + 1
        sampled = sample(logits, state.sampling, following, top_logprobs)
        tokens = jnp.where(active, sampled.tokens, state.tokens)
        positions = jnp.where(active, following, state.positions)
        return BatchState(cache, tokens, positions, state.sampling), sampled

    # Compiling

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """What every program of this engine is compiled with, for `jax.stages.Lowered.compile`."""
        return _COMPILER_OPTIONS.get(self._platform)

    def lower_decode(self, slots: int) -> jax.stages.Lowered:
        """The program that `decode` runs, not compiled yet, for parameters that may be abstract.

        Args:
            slots: of the batch, a multiple of `data_rows`.
        """
        return self._decode_program(0).lower(self.params, *self._abstract_batch(slots))

    def lower_prefill(self, length: int) -> jax.stages.Lowered:
        """The program by which `prefill` reads tokens, not compiled yet, for parameters that may be abstract.

        Args:
            length: number of tokens, 1 to `max_chunk`; the program's is `chunk_length` of it.
        """
        return self._read_program(every_position=False).lower(self.params, *self._abstract_chunk(length))

    def _abstract_batch(self, slots: int) -> tuple[BatchState, jax.ShapeDtypeStruct]:
        """What `decode` takes beside the parameters, as `jax.ShapeDtypeStruct`: the batch and its active slots."""
        batch = NamedSharding(self.mesh, _BATCH)

        def placed(array: jax.ShapeDtypeStruct) -> Any:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=batch)

        tokens = placed(jax.ShapeDtypeStruct((slots,), jnp.int32))
        sampling = jax.tree.map(placed, jax.eval_shape(lambda: SamplingState.empty(slots)))
        state = BatchState(self.abstract_cache(slots), tokens, tokens, sampling)
        return state, placed(jax.ShapeDtypeStruct((slots,), jnp.bool_))

    def _abstract_chunk(self, length: int) -> tuple[KVCache, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """What a step of `prefill` takes beside the parameters: the cache, tokens and positions."""
        shape = (self.data_rows, self.chunk_length(length))
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(self.mesh, _BATCH))
        return self.abstract_cache(self.data_rows), tokens, tokens

    def _top_logprobs(self, wanted: bool) -> int:
        return min(MAX_LOGPROBS, self.config.vocab_size) if wanted else 0

    def _over_mesh(self, step: Callable[..., Any], specs: tuple, results: tuple, donate: tuple[int, ...]) -> Any:
        """A jitted program that runs `step` on every device's part of its arguments."""
        mapped = jax.shard_map(step, mesh=self.mesh, in_specs=specs, out_specs=results, check_vma=False)
        placed = jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
        )
        return jax.jit(mapped, in_shardings=placed, donate_argnums=donate)

    def _run(self, key: tuple[object, ...], name: str, make: Callable[[], Any], *arguments: Any) -> Any:
        """Runs the program of that key, which `make` gives the first time."""
        if key not in self._programs:
            self._progress("compiling", name, 0, 0)
            start = time.perf_counter()
            self._programs[key] = make().lower(*arguments).compile(self.compiler_options)
            self.compile_seconds += time.perf_counter() - start
            self._progress("running", name, 0, 0)
        return self._programs[key](*arguments)
