"""The engine's steps as pure functions, and the table `PROGRAMS` that lists them.

A step takes a state, a cache or a batch, which is donated, and returns the updated state and its outputs. Each kind of
step is a row of `PROGRAMS`, from which the engine derives how to lower, compile, dispatch and replay it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grok1.engine.sampling import SampledTokens, SamplingState, sample, token_logprobs
from grok1.network import KVCache, ModelShard, network
from grok1.params.sharding import DATA_AXIS, MODEL_AXIS

_ROWS = PartitionSpec(DATA_AXIS)
_REPLICATED = PartitionSpec()
_CACHE = PartitionSpec(None, DATA_AXIS, MODEL_AXIS)

_COPY_BLOCK = 256  # positions


class StepKey(NamedTuple):
    """Key of a compiled program.

    Attributes:
        kind: a key of `PROGRAMS`.
        slots: number of slots of the cache or batch.
        rows: number of rows of the host arrays, over all data rows.
        length: number of tokens in a row.
        top_logprobs: number of most likely tokens to report.
    """

    kind: str
    slots: int
    rows: int = 0
    length: int = 0
    top_logprobs: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchState:
    """State of a batch of sequences on the devices, one per slot.

    Attributes:
        cache: keys and values, `[layers, slots, ...]`.
        tokens: int32 `[slots]`, the last token of each sequence, not yet in the cache.
        positions: int32 `[slots]`, positions of these tokens.
        sampling: sampling options of each sequence.
    """

    cache: KVCache
    tokens: jax.Array
    positions: jax.Array
    sampling: SamplingState


State = KVCache | BatchState
"""The state that a step takes, donated, and returns updated."""

AnyState = TypeVar("AnyState", KVCache, BatchState)


# States


def _new_cache(shard: ModelShard, slots: int) -> KVCache:
    layers, _, heads, *rest = shard.cache_shape(slots)
    shape = (layers, slots, heads * shard.shards, *rest)
    return KVCache(jnp.zeros(shape, shard.dtype), jnp.zeros(shape, shard.dtype))


def _new_batch(shard: ModelShard, slots: int) -> BatchState:
    tokens = jnp.zeros(slots, jnp.int32)
    sampling = jax.tree.map(jnp.asarray, SamplingState.empty(slots))
    return BatchState(_new_cache(shard, slots), tokens, tokens, sampling)


class StateKind(NamedTuple):
    """A kind of state.

    Attributes:
        new: creates a state with free slots, given a `ModelShard` and the number of slots.
        partition: partition specs over the mesh, a tree prefix of the state.
    """

    new: Callable[[ModelShard, int], State]
    partition: Any


CACHE_STATE = StateKind(_new_cache, _CACHE)
BATCH_STATE = StateKind(_new_batch, BatchState(_CACHE, _ROWS, _ROWS, _ROWS))  # type: ignore[arg-type]


# Steps: pure functions of a shard and a key, which are static, and of arrays. Chunks are passed as int32 arrays, one
# chunk per row: tokens `[rows, length]`, positions `[rows, length]`, negative for padding, and slots `[rows]`, indices
# within the data row.


def logits_step(
    shard: ModelShard, key: StepKey, params: hk.Params, cache: KVCache, tokens: jax.Array, positions: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Process `tokens` `[slots, length]` and return the logits `[slots, length, vocab]`."""
    logits, cache = network(shard).apply(params, tokens, positions, cache, True)
    return cache, logits


def score_step(
    shard: ModelShard,
    key: StepKey,
    params: hk.Params,
    cache: KVCache,
    tokens: jax.Array,
    positions: jax.Array,
    slots: jax.Array,
    targets: jax.Array,
) -> tuple[KVCache, SampledTokens]:
    """Process chunks and return the log-probabilities of `targets` `[rows, length]`."""
    logits, cache = network(shard).apply(params, tokens, positions, cache, True, slots)
    scored = token_logprobs(logits.reshape(targets.size, -1), targets.reshape(-1), key.top_logprobs)
    return cache, jax.tree.map(lambda array: array.reshape(*targets.shape, *array.shape[1:]), scored)


def prefill_step(
    shard: ModelShard,
    key: StepKey,
    params: hk.Params,
    state: BatchState,
    tokens: jax.Array,
    positions: jax.Array,
    slots: jax.Array,
    ends: jax.Array,
    sampling: SamplingState,
) -> tuple[BatchState, SampledTokens]:
    """Process chunks, and sample and store a token for each row where `ends`, bool `[rows]`, is true.

    `sampling` has the sampling options of each row.
    """
    logits, cache = network(shard).apply(params, tokens, positions, state.cache, False, slots)
    next_positions = jnp.max(positions, axis=1) + 1
    sampled = sample(logits, sampling, next_positions, key.top_logprobs)
    targets = jnp.where(ends, slots, state.tokens.shape[0])  # past the end: dropped

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        return array.at[targets].set(new, mode="drop")

    new_sampling = jax.tree.map(put, state.sampling, sampling)
    return BatchState(
        cache, put(state.tokens, sampled.tokens), put(state.positions, next_positions), new_sampling
    ), sampled


def copy_prefix_step(
    shard: ModelShard, key: StepKey, cache: KVCache, pairs: jax.Array, length: jax.Array
) -> tuple[KVCache, tuple[()]]:
    """Copy the first `length` positions of one slot to another.

    `pairs` is int32 `[data rows, 2]`: source and target slot, negative in data rows where nothing is copied.
    """
    source, target = jnp.maximum(pairs[0, 0], 0), jnp.maximum(pairs[0, 1], 0)
    max_seq_len = shard.config.sequence_len
    block = min(_COPY_BLOCK, max_seq_len)

    def copy_block(i: jax.Array, cache: KVCache) -> KVCache:
        start = jnp.minimum(i * block, max_seq_len - block)

        def copy(array: jax.Array) -> jax.Array:
            layers, _, heads, _, size = array.shape
            taken = lax.dynamic_slice(array, (0, source, 0, start, 0), (layers, 1, heads, block, size))
            return lax.dynamic_update_slice(array, taken, (0, target, 0, start, 0))

        return jax.tree.map(copy, cache)

    blocks = jnp.where(pairs[0, 0] < 0, 0, -(-length // block))
    return lax.fori_loop(0, blocks, copy_block, cache), ()


def decode_step(
    shard: ModelShard, key: StepKey, params: hk.Params, state: BatchState, active: jax.Array
) -> tuple[BatchState, SampledTokens]:
    """Process the last token of each sequence where `active`, bool `[slots]`, is true, and sample the next."""
    positions = jnp.where(active, state.positions, -1)
    logits, cache = network(shard).apply(params, state.tokens[:, None], positions[:, None], state.cache, False)
    next_positions = state.positions + 1
    sampled = sample(logits, state.sampling, next_positions, key.top_logprobs)
    tokens = jnp.where(active, sampled.tokens, state.tokens)
    positions = jnp.where(active, next_positions, state.positions)
    return BatchState(cache, tokens, positions, state.sampling), sampled


# The table


def host_partition(arrays: tuple[Any, ...]) -> Any:
    """Return the partition specs of a step's host arrays: split over the data rows, scalars replicated."""
    return jax.tree.map(lambda array: _ROWS if array.ndim else _REPLICATED, arrays)


def _gather_outputs(step: Callable[..., tuple[Any, Any]], *arguments: Any) -> tuple[Any, Any]:
    state, outputs = step(*arguments)
    return state, jax.tree.map(lambda array: lax.all_gather(array, DATA_AXIS, tiled=True), outputs)


@dataclasses.dataclass(frozen=True)
class Program:
    """A kind of step.

    Attributes:
        title: name in progress reports.
        step: per-device function of the `ModelShard`, the `StepKey`, the weights (if `takes_weights`), the state, and
            the host arrays, that returns the state and the outputs. None for a program that creates a state.
        state: the kind of state. A step on a cache also accepts a batch and updates its cache.
        host: returns empty arrays in the structure of the step's host arrays, given a key. They are split as
            `host_partition` says.
        takes_weights: whether the step takes the weights.
        replicate_outputs: whether every process gets the outputs of all data rows, not only of its own.
    """

    title: str
    step: Callable[..., tuple[Any, Any]] | None
    state: StateKind
    host: Callable[[StepKey], tuple[Any, ...]] = lambda key: ()
    takes_weights: bool = True
    replicate_outputs: bool = True

    def lower(
        self, key: StepKey, shard: ModelShard, mesh: Mesh, params: hk.Params, *, single_process: bool
    ) -> jax.stages.Lowered:
        """Lower the step for a mesh; the parameters may be abstract."""

        def shardings(specs: Any) -> Any:
            return jax.tree.map(partial(NamedSharding, mesh), specs)

        partition = self.state.partition
        new = partial(self.state.new, shard, key.slots)
        if self.step is None:
            return jax.jit(lambda: (new(), ()), out_shardings=(shardings(partition), ())).lower()
        step: Callable[..., tuple[Any, Any]] = partial(self.step, shard, key)
        host = self.host(key)
        arguments: tuple[Any, ...] = jax.eval_shape(lambda: (new(), *host))
        specs: tuple[Any, ...] = (partition, *host_partition(host))
        if self.takes_weights:
            arguments = (params, *arguments)
            specs = (jax.tree.map(lambda array: array.sharding.spec, params), *specs)
        outputs = _ROWS
        if self.replicate_outputs and not single_process:
            step, outputs = partial(_gather_outputs, step), _REPLICATED
        mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(partition, outputs), check_vma=False)
        donated = int(self.takes_weights)  # the state
        return jax.jit(mapped, in_shardings=shardings(specs), donate_argnums=donated).lower(*arguments)


def _int32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def _chunk_arrays(key: StepKey) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return empty tokens `[rows, length]`, positions `[rows, length]` and slots `[rows]` of a step's chunks."""
    return _int32(key.rows, key.length), np.full((key.rows, key.length), -1, np.int32), _int32(key.rows)


PROGRAMS: dict[str, Program] = {
    "new_cache": Program("cache", None, CACHE_STATE, takes_weights=False),
    "new_batch": Program("cache", None, BATCH_STATE, takes_weights=False),
    "logits": Program("reading", logits_step, CACHE_STATE, lambda key: _chunk_arrays(key)[:2], replicate_outputs=False),
    "score": Program(
        "scoring", score_step, CACHE_STATE, lambda key: (*_chunk_arrays(key), _int32(key.rows, key.length))
    ),
    "prefill": Program(
        "prefill",
        prefill_step,
        BATCH_STATE,
        lambda key: (*_chunk_arrays(key), np.zeros(key.rows, bool), SamplingState.empty(key.rows)),
    ),
    "copy_prefix": Program(
        "copying", copy_prefix_step, CACHE_STATE, lambda key: (_int32(key.rows, 2), _int32()), takes_weights=False
    ),
    "decode": Program("decoding", decode_step, BATCH_STATE, lambda key: (np.zeros(key.slots, bool),)),
}
"""All kinds of steps by name. To add one, write its function and add a row."""
