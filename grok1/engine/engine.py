"""The compiled steps: reading prompts, joining sequences to a batch, and decoding one token for each of them.

A prompt is read into the slot of the batch that continues it, in parts of a few fixed lengths, one prompt or several at
a time; what two prompts have in common is copied from one's slot to the other's. Every step is one program over the
whole mesh, compiled once for each of its shapes.
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
from grok1.engine.replay import Step, StepSender
from grok1.engine.sampling import SampledTokens, SamplingState, sample, token_logprobs
from grok1.network import KVCache, ModelShard, network
from grok1.ops.kernels import xla_kernels
from grok1.ops.xla.kernels import Kernels
from grok1.params.sharding import DATA_AXIS, MODEL_AXIS, local_devices
from grok1.request import MAX_LOGPROBS, SamplingOptions

LANE_TOKENS = 16
"""Tokens in each lane of a step that reads several parts of prompts, and the shortest step that reads one."""


_MAX_LANE_TOKENS = 512  # of a step with several lanes: with more the first token of a prompt would wait long
_COPY_BLOCK = 256  # positions

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
class PromptPart:
    """Some tokens of a prompt, to be read into a slot of a batch.

    Attributes:
        slot: which slot.
        tokens: the token ids, int32 `[count]`.
        start: position of the first of them; the slot's cache holds all before it.
        ending: how to sample and the seed of the random stream if the prompt ends here and is to be continued.
    """

    slot: int
    tokens: np.ndarray
    start: int
    ending: tuple[SamplingOptions, int] | None


@dataclasses.dataclass(frozen=True)
class ScoredPart:
    """Some tokens of a text, to be read into a slot of a cache, and the tokens that follow each.

    Attributes:
        slot: which slot.
        tokens: the token ids, int32 `[count]`.
        start: position of the first of them; the slot holds all before it.
        targets: int32 `[count]`, whose log-probabilities are wanted.
    """

    slot: int
    tokens: np.ndarray
    start: int
    targets: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Lanes:
    """Parts as a step takes them, NumPy arrays with a row for each part or for none.

    Attributes:
        tokens: int32 `[rows, length]`.
        positions: the same, negative for padding.
        slots: int32 `[rows]`, counted within the data row.
    """

    tokens: Any
    positions: Any
    slots: Any

    @classmethod
    def empty(cls, rows: int, length: int) -> _Lanes:
        return cls(np.zeros((rows, length), np.int32), np.full((rows, length), -1, np.int32), np.zeros(rows, np.int32))

    def put(self, row: int, part: PromptPart | ScoredPart, slots: int) -> None:
        """Puts a part in a row; `slots` is the number of slots of a data row."""
        count = len(part.tokens)
        self.tokens[row, :count] = part.tokens
        self.positions[row, :count] = np.arange(part.start, part.start + count)
        self.slots[row] = part.slot % slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Endings:
    """Which rows of `_Lanes` end a prompt, bool `[rows]`, and how the first tokens of these are drawn."""

    ends: Any
    sampling: SamplingState

    @classmethod
    def empty(cls, rows: int) -> _Endings:
        return cls(np.zeros(rows, bool), SamplingState.empty(rows))

    def put(self, row: int, options: SamplingOptions, seed: int) -> None:
        self.ends[row] = True
        of_one = jax.tree.leaves(SamplingState.of(options, seed))
        for whole, one in zip(jax.tree.leaves(self.sampling), of_one, strict=True):
            whole[row] = one[0]


Held = KVCache | BatchState
"""What a step takes over and gives back."""

# What each kind of step takes from the host, as far as its structure goes.
_HOST_ARRAYS: dict[object, tuple[Any, ...]] = {
    "cache": (),
    "batch": (),
    "read": (0, 0),
    "score": (_Lanes(0, 0, 0), 0),
    "prompts": (_Lanes(0, 0, 0), _Endings(0, SamplingState(0, 0, 0, 0, 0))),  # type: ignore[arg-type]
    "copy": (0, 0),
    "decode": (0,),
}


class Engine:
    """A model on a mesh, and its compiled steps."""

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
        """Args are kept as they are.

        Args:
            config: the model.
            params: its parameters on the mesh, as `load_parameters` gives them. To lower programs without running them,
                as `abstract_parameters` gives them.
            mesh: a (data, model) mesh.
            dtype: dtype of activations and of the cache.
            progress: is called with what a long step does: "compiling" and a program's name before it is compiled,
                "running" and that name when it has been, "reading" with the tokens of a prompt done and to do.
            kernels: implementation of the operations, which reads the parameters' layout; by default plain JAX.
            sender: tells other processes that the mesh spans of every step, for them to `repeat`.
        """
        self.config = config
        self.mesh = mesh
        self.capacity = config.sequence_len
        self.compile_seconds = 0.0
        self._progress = progress or (lambda stage, detail, done, total: None)
        self._platform = mesh.devices.flat[0].platform
        self.params = params
        self._param_specs = jax.tree.map(lambda array: array.sharding.spec, params)
        self.kernels = kernels or xla_kernels(self._platform)
        self._shard = ModelShard(config, mesh.shape[MODEL_AXIS], MODEL_AXIS, jnp.dtype(dtype), self.kernels)
        self._network = network(self._shard)
        self._programs: dict[tuple[object, ...], Any] = {}
        self._sender = sender
        self._repeated: dict[int, Held] = {}
        self._alone = len(self.local_devices) == mesh.size

    @property
    def dtype(self) -> np.dtype:
        """Dtype of activations and of the cache."""
        return np.dtype(self._shard.dtype)

    @property
    def local_devices(self) -> list[jax.Device]:
        """The mesh's devices that are this process's."""
        return local_devices(self.mesh.devices.flat)

    @property
    def data_rows(self) -> int:
        """Size of the mesh's data axis: the number of slots of a batch is a multiple of it."""
        return int(self.mesh.shape[DATA_AXIS])

    # Reading

    def new_cache(self, batch: int) -> KVCache:
        """A cache for `batch` sequences, a multiple of `data_rows`; its content means nothing yet."""
        return self._run(("cache", batch))[0]

    def _zeros_program(self, batch: int) -> Any:
        return jax.jit(lambda: (self._zeros(batch), ()), out_shardings=(self._placed(_CACHE), ()))

    def _zeros(self, batch: int) -> KVCache:
        return jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), self.abstract_cache(batch))

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
            float32 `[batch, n, vocab]`, on a mesh of several processes of this one's data rows alone; and the cache.
        """
        batch, count = tokens.shape
        length = self.chunk_length(count)
        padded = np.zeros((batch, length), np.int32)
        padded[:, :count] = tokens
        positions = np.full((batch, length), -1, np.int32)
        positions[:, :count] = np.arange(start, start + count)
        cache, logits = self._run(("read", batch, length), cache, padded, positions)
        here = logits if self._alone else logits.addressable_data(0)
        return here[:, :count], cache

    def _read_step(
        self, params: hk.Params, cache: KVCache, tokens: jax.Array, positions: jax.Array
    ) -> tuple[KVCache, jax.Array]:
        logits, cache = self._network.apply(params, tokens, positions, cache, True)
        return cache, logits

    def score_parts(
        self, cache: KVCache, parts: Sequence[ScoredPart], lanes: int = 1, logprobs: bool = False
    ) -> tuple[KVCache, SampledTokens, list[int]]:
        """Reads parts of texts into their slots and tells how likely the tokens are that follow.

        Returns at once; the arrays are ready when the devices are.

        Args:
            cache: it is consumed.
            parts: as for `read_prompts`.
            lanes: as for `read_prompts`.
            logprobs: whether to report the 20 likeliest tokens rather than the one.

        Returns:
            the cache, arrays `[rows, length]` for the tokens that follow, and the row of each part.
        """
        slots = cache.keys.shape[1]
        read, places = self._pack(parts, lanes, slots)
        targets = np.zeros_like(read.tokens)
        for part, place in zip(parts, places, strict=True):
            targets[place, : len(part.targets)] = part.targets
        top = max(1, self._top_logprobs(logprobs))
        cache, scored = self._run(("score", slots, *targets.shape, top), cache, read, targets)
        return cache, scored, places

    def _score_step(
        self, params: hk.Params, cache: KVCache, read: _Lanes, targets: jax.Array, top_logprobs: int
    ) -> tuple[KVCache, SampledTokens]:
        logits, cache = self._network.apply(params, read.tokens, read.positions, cache, True, read.slots)
        scored = token_logprobs(logits.reshape(targets.size, -1), targets.reshape(-1), top_logprobs)
        return cache, jax.tree.map(lambda array: array.reshape(*targets.shape, *array.shape[1:]), scored)

    def lanes_for(self, tokens: float) -> int:
        """How many lanes a step should have, where prompts have that many tokens to be read on average.

        A power of 2, as many as such a prompt needs: a step costs about the same for a used lane as for one that is
        not.
        """
        lanes = self.kernels.min_lanes
        while lanes * LANE_TOKENS < min(tokens, _MAX_LANE_TOKENS):
            lanes *= 2
        return lanes

    @property
    def max_chunk(self) -> int:
        """The most tokens that one step reads."""
        return min(self.kernels.max_chunk, self.capacity)

    def chunk_length(self, count: int) -> int:
        """The compiled length that `count` tokens are padded to."""
        return 1 if count == 1 else self.part_bucket(count)

    # Continuing

    def new_batch(self, slots: int) -> BatchState:
        """A batch of free slots.

        Args:
            slots: a multiple of `data_rows`.
        """
        return self._run(("batch", slots))[0]

    def _batch_program(self, slots: int) -> Any:
        def free() -> BatchState:
            tokens = jnp.zeros(slots, jnp.int32)
            sampling = jax.tree.map(jnp.asarray, SamplingState.empty(slots))
            return BatchState(self._zeros(slots), tokens, tokens, sampling)

        return jax.jit(lambda: (free(), ()), out_shardings=(self._placed(_STATE), ()))

    def read_prompts(
        self, state: BatchState, parts: Sequence[PromptPart], lanes: int = 1, logprobs: bool = False
    ) -> tuple[BatchState, SampledTokens, list[int]]:
        """Reads parts of prompts into their slots, and draws the first token of those that end.

        A step of one lane is as long as its longest part needs. A step of several is of `LANE_TOKENS` for each, however
        many are used, so that what is computed for a part depends on nothing that is read beside it.

        Returns at once; the arrays are ready when the devices are.

        Args:
            state: the batch; it is consumed.
            parts: at most `lanes` of each data row. Of one lane, none is longer than `max_chunk`; of several, none than
                `LANE_TOKENS`, and parts of one prompt may follow each other in one step.
            lanes: parts that the step has room for on each data row.
            logprobs: whether to report the likeliest tokens.

        Returns:
            the batch, the first tokens, and for each part where its token is among them; the token of a part that
            does not end its prompt means nothing.
        """
        read, places = self._pack(parts, lanes, state.tokens.shape[0])
        endings = _Endings.empty(len(read.slots))
        for part, place in zip(parts, places, strict=True):
            if part.ending is not None:
                endings.put(place, *part.ending)
        wanted = self._top_logprobs(logprobs)
        state, first = self._run(("prompts", state.tokens.shape[0], *read.tokens.shape, wanted), state, read, endings)
        return state, first, places

    def _pack(
        self, parts: Sequence[PromptPart] | Sequence[ScoredPart], lanes: int, slots: int
    ) -> tuple[_Lanes, list[int]]:
        """Parts in lanes, for a batch of `slots`, and the row of each."""
        row_slots = slots // self.data_rows
        length = LANE_TOKENS if lanes > 1 else self.part_bucket(max(len(part.tokens) for part in parts))
        packed = _Lanes.empty(self.data_rows * lanes, length)
        used = [0] * self.data_rows
        places = []
        for part in parts:
            row = part.slot // row_slots
            places.append(row * lanes + used[row])
            used[row] += 1
            if used[row] > lanes or len(part.tokens) > length:
                raise ValueError(f"{used[row]} parts of up to {len(part.tokens)} tokens in {lanes} lanes of {length}")
            packed.put(places[-1], part, row_slots)
        return packed, places

    def part_bucket(self, count: int) -> int:
        """The length of a step of one lane that reads `count` tokens, 1 to `max_chunk`."""
        length = LANE_TOKENS
        while length < count:
            length *= 2
        return min(length, self.max_chunk)

    def _prompt_program(self, top_logprobs: int) -> Any:
        return self._over_mesh(partial(self._prompt_step, top_logprobs=top_logprobs), _STATE, (_BATCH, _BATCH))

    def _prompt_step(
        self, params: hk.Params, state: BatchState, read: _Lanes, endings: _Endings, top_logprobs: int
    ) -> tuple[BatchState, SampledTokens]:
        logits, cache = self._network.apply(params, read.tokens, read.positions, state.cache, False, read.slots)
        following = jnp.max(read.positions, axis=1) + 1
        first = sample(logits, endings.sampling, following, top_logprobs)
        places = jnp.where(endings.ends, read.slots, state.tokens.shape[0])  # past the end: dropped

        def put(whole: jax.Array, new: jax.Array) -> jax.Array:
            return whole.at[places].set(new, mode="drop")

        sampling = jax.tree.map(put, state.sampling, endings.sampling)
        return BatchState(cache, put(state.tokens, first.tokens), put(state.positions, following), sampling), first

    def report_reading(self, done: int, total: int) -> None:
        """Tells the caller's `progress` how far a prompt has been read, if it is longer than any step."""
        if total > self.max_chunk:
            self._progress("reading", "prompt", done, total)

    def copy_beginning(self, cache: KVCache, source: int, target: int, length: int) -> KVCache:
        """Copies what one slot of a cache holds to another slot of the same data row.

        Args:
            cache: it is consumed.
            source: from this slot.
            target: to this one.
            length: how many positions.
        """
        slots = cache.keys.shape[1]
        row_slots = slots // self.data_rows
        if source // row_slots != target // row_slots:
            raise ValueError(f"slots {source} and {target} are of different data rows")
        pairs = np.full((self.data_rows, 2), -1, np.int32)
        pairs[source // row_slots] = source % row_slots, target % row_slots
        return self._run(("copy", slots), cache, pairs, np.int32(length))[0]

    def _copy_step(self, cache: KVCache, pair: jax.Array, length: jax.Array) -> tuple[KVCache, tuple[()]]:
        source, target = jnp.maximum(pair[0, 0], 0), jnp.maximum(pair[0, 1], 0)
        block = min(_COPY_BLOCK, self.capacity)

        def copy_block(i: jax.Array, cache: KVCache) -> KVCache:
            start = jnp.minimum(i * block, self.capacity - block)

            def copy(array: jax.Array) -> jax.Array:
                layers, _, heads, _, size = array.shape
                taken = lax.dynamic_slice(array, (0, source, 0, start, 0), (layers, 1, heads, block, size))
                return lax.dynamic_update_slice(array, taken, (0, target, 0, start, 0))

            return jax.tree.map(copy, cache)

        blocks = jnp.where(pair[0, 0] < 0, 0, -(-length // block))
        return lax.fori_loop(0, blocks, copy_block, cache), ()

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
        return self._run(("decode", len(active), wanted), state, active)

    def _decode_program(self, top_logprobs: int) -> Any:
        return self._over_mesh(partial(self._decode_step, top_logprobs=top_logprobs), _STATE, (_BATCH,))

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

    def lower_prefill(self, slots: int, length: int) -> jax.stages.Lowered:
        """The program by which a prompt is read, not compiled yet, for parameters that may be abstract.

        Args:
            slots: of the batch, a multiple of `data_rows`.
            length: number of tokens, 1 to `max_chunk`.
        """
        return self._prompt_program(0).lower(self.params, *self._abstract_prompt(slots, length))

    def _abstract_batch(self, slots: int) -> tuple[BatchState, jax.ShapeDtypeStruct]:
        """What `decode` takes beside the parameters, as `jax.ShapeDtypeStruct`: the batch and its active slots."""
        batch = NamedSharding(self.mesh, _BATCH)

        def placed(array: jax.ShapeDtypeStruct) -> Any:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=batch)

        tokens = placed(jax.ShapeDtypeStruct((slots,), jnp.int32))
        sampling = jax.tree.map(placed, jax.eval_shape(lambda: SamplingState.empty(slots)))
        state = BatchState(self.abstract_cache(slots), tokens, tokens, sampling)
        return state, placed(jax.ShapeDtypeStruct((slots,), jnp.bool_))

    def _abstract_prompt(self, slots: int, length: int) -> tuple[BatchState, _Lanes, _Endings]:
        """What the program by which a prompt is read takes beside the parameters, as `jax.ShapeDtypeStruct`."""
        state, _ = self._abstract_batch(slots)
        batch = NamedSharding(self.mesh, _BATCH)
        parts = _Lanes.empty(self.data_rows, self.part_bucket(length)), _Endings.empty(self.data_rows)
        read, endings = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=batch), parts
        )
        return state, read, endings

    def _top_logprobs(self, wanted: bool) -> int:
        return min(MAX_LOGPROBS, self.config.vocab_size) if wanted else 0

    def _over_mesh(
        self, step: Callable[..., Any], held: Any, host: tuple[Any, ...], *, weights: bool = True, told: bool = True
    ) -> Any:
        """A jitted program that runs `step` on every device's part of its arguments.

        Args:
            step: takes the parameters, what is held and what comes from the host; gives what is held and results.
            held: the partition of what is held.
            host: of what comes from the host.
            weights: whether it takes the parameters.
            told: whether the results are small, and known to every process of the mesh.
        """
        specs = (self._param_specs, held, *host) if weights else (held, *host)
        results = _BATCH
        if told and not self._alone:
            results, alone = _REPLICATED, step

            def step(*arguments: Any) -> Any:
                kept, rows = alone(*arguments)
                return kept, jax.tree.map(lambda array: lax.all_gather(array, DATA_AXIS, tiled=True), rows)

        mapped = jax.shard_map(step, mesh=self.mesh, in_specs=specs, out_specs=(held, results), check_vma=False)
        return jax.jit(mapped, in_shardings=self._placed(specs), donate_argnums=int(weights))

    def _placed(self, specs: Any) -> Any:
        """Shardings of a tree of partitions."""
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
        )

    def _program(self, kind: object, sizes: Sequence[int]) -> tuple[str, Any]:
        """A jitted program, not compiled yet, and what it is called while it is."""
        match kind:
            case "cache":
                return "cache", self._zeros_program(*sizes)
            case "batch":
                return "cache", self._batch_program(*sizes)
            case "read":
                return "reading", self._over_mesh(self._read_step, _CACHE, (_BATCH, _BATCH), told=False)
            case "score":
                step = partial(self._score_step, top_logprobs=sizes[-1])
                return "scoring", self._over_mesh(step, _CACHE, (_BATCH, _BATCH))
            case "prompts":
                return "prefill", self._prompt_program(sizes[-1])
            case "copy":
                return "copying", self._over_mesh(self._copy_step, _CACHE, (_BATCH, _REPLICATED), weights=False)
            case "decode":
                return "decoding", self._decode_program(sizes[-1])
        raise ValueError(f"there are no steps of the kind {kind}")

    # Running

    def _run(self, key: tuple[Any, ...], held: Held | None = None, *host: Any) -> Any:
        """Runs a step in every process of the mesh.

        Args:
            key: the kind of step, and the sizes that its program is made for.
            held: what it takes over; None if it makes it.
            host: NumPy arrays in the structure that `_HOST_ARRAYS` gives for its kind.

        Returns:
            what is held now, and the results.
        """
        if self._sender is None:
            return self._dispatch(key, held, *host)
        handle = self._sender.send(key, None if held is None else _owner(held), jax.tree.leaves(host))
        given, results = self._dispatch(key, held, *host)
        self._sender.given(handle, _owner(given))
        return given, results

    def repeat(self, step: Step) -> None:
        """Runs a step that another process of the mesh has sent; its results stay on the devices.

        There is nothing to run if no device of the mesh is this process's.
        """
        if not self.local_devices:
            return
        for handle in step.freed:
            self._repeated.pop(handle, None)
        held = self._repeated.pop(step.handle, None)
        host = jax.tree.unflatten(jax.tree.structure(_HOST_ARRAYS[step.key[0]]), step.arrays)
        if step.key[0] == "copy" and isinstance(held, BatchState):
            cache = self._dispatch(step.key, held.cache, *host)[0]
            self._repeated[step.handle] = dataclasses.replace(held, cache=cache)
        else:
            self._repeated[step.handle] = self._dispatch(step.key, held, *host)[0]

    def _dispatch(self, key: tuple[Any, ...], held: Held | None, *host: Any) -> Any:
        """Runs the part of a step that is this process's, with its program compiled the first time."""
        arguments: tuple[Any, ...] = host if held is None else (held, *self._on_mesh(key[0], host))
        if held is not None and key[0] != "copy":
            arguments = (self.params, *arguments)
        if key not in self._programs:
            name, program = self._program(key[0], key[1:])
            self._progress("compiling", name, 0, 0)
            start = time.perf_counter()
            self._programs[key] = program.lower(*arguments).compile(self.compiler_options)
            self.compile_seconds += time.perf_counter() - start
            self._progress("running", name, 0, 0)
        return self._programs[key](*arguments)

    def _on_mesh(self, kind: object, host: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arrays of the host as a program takes them: of several processes each brings its own devices' part.

        All are split over the data rows but the length of a copy.
        """
        if jax.process_count() == 1:
            return host

        def put(array: np.ndarray) -> jax.Array:
            placed = NamedSharding(self.mesh, _BATCH if array.ndim else _REPLICATED)
            return jax.make_array_from_callback(array.shape, placed, lambda index: array[index])

        return jax.tree.map(lambda array: put(np.asarray(array)), host)


def _owner(held: Held) -> jax.Array:
    """The array whose life is that of what is held."""
    return (held if isinstance(held, KVCache) else held.cache).keys
