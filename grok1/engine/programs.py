"""The steps of the engine as pure functions, and the table that lists them.

A step takes the state of a cache or a batch, which is donated, and returns it updated, together with its outputs. Each
kind of step is a row of `PROGRAMS`; compiling, dispatching, lowering and replaying it in other processes derive from
that row.
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

from grok1.engine.chunks import ChunkRows, FirstTokens
from grok1.engine.sampling import SampledTokens, SamplingState, sample, token_logprobs
from grok1.network import KVCache, ModelShard, network
from grok1.params.sharding import DATA_AXIS, MODEL_AXIS

BATCH = PartitionSpec(DATA_AXIS)
REPLICATED = PartitionSpec()
_CACHE = PartitionSpec(None, DATA_AXIS, MODEL_AXIS)

_COPY_BLOCK = 256  # positions


class StepKey(NamedTuple):
    """Identifies a compiled program.

    Attributes:
        kind: a key of `PROGRAMS`.
        slots: number of slots of the cache or batch.
        rows: number of rows of the host arrays, over all data rows, if that is not `slots`.
        length: number of tokens in a row.
        top_logprobs: number of likeliest tokens to report.
    """

    kind: str
    slots: int
    rows: int = 0
    length: int = 0
    top_logprobs: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchState:
    """The sequences of a batch on the devices, one in each slot.

    Attributes:
        cache: keys and values, `[layers, slots, ...]`.
        tokens: int32 `[slots]`, the last token of each sequence, which is not in the cache yet.
        positions: int32 `[slots]`, the positions of those tokens.
        sampling: the sequences' sampling options.
    """

    cache: KVCache
    tokens: jax.Array
    positions: jax.Array
    sampling: SamplingState


State = KVCache | BatchState
"""The donated argument of a step, which returns it updated."""

AnyState = TypeVar("AnyState", KVCache, BatchState)


# States


def _new_cache(shard: ModelShard, slots: int) -> KVCache:
    config = shard.config
    heads = shard.num_kv_heads * shard.shards  # of all shards
    shape = (config.num_layers, slots, heads, config.sequence_len, config.key_size)
    return KVCache(jnp.zeros(shape, shard.dtype), jnp.zeros(shape, shard.dtype))


def _new_batch(shard: ModelShard, slots: int) -> BatchState:
    tokens = jnp.zeros(slots, jnp.int32)
    sampling = jax.tree.map(jnp.asarray, SamplingState.empty(slots))
    return BatchState(_new_cache(shard, slots), tokens, tokens, sampling)


class StateKind(NamedTuple):
    """A kind of state.

    Attributes:
        new: creates one with free slots, from a `ModelShard` and a number of slots.
        partition: how it is split over the mesh, a tree that is a prefix of the state's.
    """

    new: Callable[[ModelShard, int], State]
    partition: Any

    def abstract(self, shard: ModelShard, mesh: Mesh, slots: int) -> Any:
        """The state with a `jax.ShapeDtypeStruct` for each array."""
        shapes = jax.eval_shape(partial(self.new, shard, slots))

        def place(spec: PartitionSpec, part: Any) -> Any:
            return jax.tree.map(partial(_abstract, mesh, spec), part)

        return jax.tree.map(place, self.partition, shapes, is_leaf=is_spec)


def _abstract(mesh: Mesh, spec: PartitionSpec, array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))


def is_spec(value: object) -> bool:
    """Whether a value is a leaf of a tree of partitions."""
    return isinstance(value, PartitionSpec)


CACHE_STATE = StateKind(_new_cache, _CACHE)
BATCH_STATE = StateKind(_new_batch, BatchState(_CACHE, BATCH, BATCH, BATCH))  # type: ignore[arg-type]


# Steps: pure functions of a shard and a key, which are static, and of arrays


def logits_step(
    shard: ModelShard, key: StepKey, params: hk.Params, cache: KVCache, tokens: jax.Array, positions: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Read `tokens` `[slots, length]` and return the logits at each of them."""
    logits, cache = network(shard).apply(params, tokens, positions, cache, True)
    return cache, logits


def score_step(
    shard: ModelShard, key: StepKey, params: hk.Params, cache: KVCache, chunks: ChunkRows, targets: jax.Array
) -> tuple[KVCache, SampledTokens]:
    """Read chunks and return the log-probabilities of `targets` `[rows, length]`."""
    logits, cache = network(shard).apply(params, chunks.tokens, chunks.positions, cache, True, chunks.slots)
    scored = token_logprobs(logits.reshape(targets.size, -1), targets.reshape(-1), key.top_logprobs)
    return cache, jax.tree.map(lambda array: array.reshape(*targets.shape, *array.shape[1:]), scored)


def prefill_step(
    shard: ModelShard, key: StepKey, params: hk.Params, state: BatchState, chunks: ChunkRows, first: FirstTokens
) -> tuple[BatchState, SampledTokens]:
    """Read chunks, and sample and store the first token of the prompts that end with one of them."""
    logits, cache = network(shard).apply(params, chunks.tokens, chunks.positions, state.cache, False, chunks.slots)
    next_positions = jnp.max(chunks.positions, axis=1) + 1
    sampled = sample(logits, first.sampling, next_positions, key.top_logprobs)
    slots = jnp.where(first.wanted, chunks.slots, state.tokens.shape[0])  # past the end: dropped

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        return array.at[slots].set(new, mode="drop")

    sampling = jax.tree.map(put, state.sampling, first.sampling)
    tokens, positions = put(state.tokens, sampled.tokens), put(state.positions, next_positions)
    return BatchState(cache, tokens, positions, sampling), sampled


def copy_prefix_step(
    shard: ModelShard, key: StepKey, cache: KVCache, pairs: jax.Array, length: jax.Array
) -> tuple[KVCache, tuple[()]]:
    """Copy the first `length` positions of one slot to another.

    Args:
        shard: static.
        key: static.
        cache: donated.
        pairs: int32 `[data rows, 2]`, source and target slot; negative for data rows without a copy.
        length: int32 scalar.
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
    """Read the last token of each `active` sequence, bool `[slots]`, and sample the next."""
    positions = jnp.where(active, state.positions, -1)
    logits, cache = network(shard).apply(params, state.tokens[:, None], positions[:, None], state.cache, False)
    next_positions = state.positions + 1
    sampled = sample(logits, state.sampling, next_positions, key.top_logprobs)
    tokens = jnp.where(active, sampled.tokens, state.tokens)
    positions = jnp.where(active, next_positions, state.positions)
    return BatchState(cache, tokens, positions, state.sampling), sampled


# The table


def host_partition(arrays: tuple[Any, ...]) -> Any:
    """How the host arrays of a step are split over the mesh: over its data rows, but for scalars."""
    return jax.tree.map(lambda array: BATCH if array.ndim else REPLICATED, arrays)


def _gather_outputs(step: Callable[..., tuple[Any, Any]], *arguments: Any) -> tuple[Any, Any]:
    state, outputs = step(*arguments)
    return state, jax.tree.map(lambda array: lax.all_gather(array, DATA_AXIS, tiled=True), outputs)


def _no_arrays(key: StepKey) -> tuple[Any, ...]:
    return ()


@dataclasses.dataclass(frozen=True)
class Program:
    """A kind of step.

    Attributes:
        title: name in progress reports.
        step: the step of one device, a function of the `ModelShard`, the `StepKey`, the weights if it takes them, the
            state, and the host arrays; it returns the state and its outputs. None to create a state.
        state: the state it takes and returns. A step on a cache also takes a batch, and updates its cache.
        host: for a key, the arrays that come from the host, in their structure and without content. They are split
            as `host_partition` says.
        takes_weights: whether it takes the weights.
        replicate_outputs: whether every process gets all outputs, rather than those of its own data rows.
    """

    title: str
    step: Callable[..., tuple[Any, Any]] | None
    state: StateKind
    host: Callable[[StepKey], tuple[Any, ...]] = _no_arrays
    takes_weights: bool = True
    replicate_outputs: bool = True

    def jit(self, key: StepKey, shard: ModelShard, mesh: Mesh, params: hk.Params, *, single_process: bool) -> Any:
        """The jitted program, which runs the step on every device's part of its arguments."""

        def shardings(specs: Any) -> Any:
            return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)

        partition = self.state.partition
        if self.step is None:
            new = partial(self.state.new, shard, key.slots)
            return jax.jit(lambda: (new(), ()), out_shardings=(shardings(partition), ()))
        step: Callable[..., tuple[Any, Any]] = partial(self.step, shard, key)
        specs: tuple[Any, ...] = (partition, *host_partition(self.host(key)))
        if self.takes_weights:
            specs = (jax.tree.map(lambda array: array.sharding.spec, params), *specs)
        outputs = BATCH
        if self.replicate_outputs and not single_process:
            step, outputs = partial(_gather_outputs, step), REPLICATED
        mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(partition, outputs), check_vma=False)
        return jax.jit(mapped, in_shardings=shardings(specs), donate_argnums=int(self.takes_weights))

    def abstract_arguments(self, key: StepKey, shard: ModelShard, mesh: Mesh) -> tuple[Any, ...]:
        """The arguments after the weights, with a `jax.ShapeDtypeStruct` for each array."""
        if self.step is None:
            return ()
        host = self.host(key)
        placed = jax.tree.map(partial(_abstract, mesh), host_partition(host), host, is_leaf=is_spec)
        return self.state.abstract(shard, mesh, key.slots), *placed


def _int32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


PROGRAMS: dict[str, Program] = {
    "new_cache": Program("cache", None, CACHE_STATE, takes_weights=False),
    "new_batch": Program("cache", None, BATCH_STATE, takes_weights=False),
    "logits": Program(
        "reading",
        logits_step,
        CACHE_STATE,
        lambda key: (_int32(key.slots, key.length), _int32(key.slots, key.length)),
        replicate_outputs=False,
    ),
    "score": Program(
        "scoring",
        score_step,
        CACHE_STATE,
        lambda key: (ChunkRows.empty(key.rows, key.length), _int32(key.rows, key.length)),
    ),
    "prefill": Program(
        "prefill",
        prefill_step,
        BATCH_STATE,
        lambda key: (ChunkRows.empty(key.rows, key.length), FirstTokens.empty(key.rows)),
    ),
    "copy_prefix": Program(
        "copying",
        copy_prefix_step,
        CACHE_STATE,
        lambda key: (_int32(key.rows, 2), _int32()),
        takes_weights=False,
    ),
    "decode": Program("decoding", decode_step, BATCH_STATE, lambda key: (np.zeros(key.slots, bool),)),
}
"""All kinds of steps. To add one, write its function and add a row."""
