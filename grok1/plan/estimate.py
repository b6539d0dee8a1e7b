"""Bytes of weights and cache on each device, and the speeds that memory and arithmetic allow.

Everything is counted from the arrays that loading makes and the engine keeps. Speeds are upper bounds: bytes that must
be read over bandwidth, or operations over the peak rate, whichever takes longer; exchange between devices costs nothing
here. What crosses from one host to another is told beside them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from functools import cached_property

import numpy as np

from grok1.config import ModelConfig
from grok1.network import ModelShard
from grok1.ops.kernels import xla_kernels
from grok1.params.sharding import mesh_device_order, possible_model_shards
from grok1.params.table import Kind, num_active_parameters
from grok1.params.tree import ParameterArray, parameter_arrays
from grok1.plan.devices import Devices

_MOST_SHARDS = 256  # that a search for a mesh looks at


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A model on a mesh of devices.

    Attributes:
        config: the model.
        devices: the devices; the mesh may leave some idle.
        mesh: sizes of the data and the model axis.
        dtype: name of the dtype of activations and of the key/value cache.
        hosts: how many of the devices each host has, or of processors each process, with the memory that is its own;
            None if all are on one.
    """

    config: ModelConfig
    devices: Devices
    mesh: tuple[int, int]
    dtype: str
    hosts: tuple[int, ...] | None = None

    # Memory, of one device

    @cached_property
    def _arrays(self) -> tuple[ParameterArray, ...]:
        return parameter_arrays(self.config, np.dtype(self.dtype))

    def _array_bytes(self, array: ParameterArray) -> int:
        return math.prod(array.local_shape(self.mesh[1])) * array.dtype.itemsize

    @cached_property
    def weight_bytes(self) -> int:
        """Weights on one device."""
        return sum(map(self._array_bytes, self._arrays))

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one sequence of full context on one device that holds it."""
        shape = ModelShard(self.config, self.mesh[1]).cache_shape(1)
        return 2 * math.prod(shape) * np.dtype(self.dtype).itemsize

    @property
    def _cache_position_bytes(self) -> int:
        return self.cache_bytes // self.config.sequence_len

    @property
    def _chunk(self) -> int:
        """The most tokens of a sequence that one step reads."""
        return min(xla_kernels(self.devices.kind.platform).max_chunk, self.config.sequence_len)

    @property
    def workspace_bytes(self) -> int:
        """What the steps themselves take at most on one device, about.

        Reading a chunk for its score has the float32 logits of every position; and the experts' activations, gate and
        up in float32, for each expert that a token selects.
        """
        config, chunk = self.config, self._chunk
        experts = 2 * config.num_selected_experts * config.ffn_size // self.mesh[1]
        return 4 * chunk * (config.vocab_size + experts + 8 * config.emb_size)

    # Memory, of one device or of a machine whose devices share it

    @property
    def _memories(self) -> tuple[int, int]:
        """How many devices' weights, and how many devices' caches, lie in one memory; the most of any host."""
        if not self.devices.kind.shares_memory:
            return 1, 1
        shards: dict[int, list[int]] = {}  # of each host
        for row in self.rows:
            for shard, host in enumerate(row):
                shards.setdefault(host, []).append(shard)
        return max(len(set(held)) for held in shards.values()), max(map(len, shards.values()))

    # Several hosts

    @cached_property
    def rows(self) -> list[list[int]]:
        """For each data row and each of its model shards, which host it is on."""
        data, model = self.mesh
        hosts = [host for host, count in enumerate(self.hosts or (data * model,)) for _ in range(count)]
        places = mesh_device_order(self.mesh, hosts)
        return [[hosts[place] for place in places[row * model : (row + 1) * model]] for row in range(data)]

    @property
    def replicated_bytes(self) -> int:
        """Bytes of weights that one data row holds beyond those of the model: what several shards hold alike."""
        return self.mesh[1] * self.weight_bytes - dataclasses.replace(self, mesh=(1, 1), hosts=None).weight_bytes

    @property
    def idle(self) -> dict[int, int]:
        """How many devices of each host the mesh leaves idle, for hosts where it does."""
        used = Counter(host for row in self.rows for host in row)
        left = {host: count - used[host] for host, count in enumerate(self.hosts or (self.devices.count,))}
        return {host: count for host, count in left.items() if count}

    @property
    def hosts_of_row(self) -> int:
        """The most hosts that the model shards of one data row are on."""
        return max(len(set(row)) for row in self.rows)

    @property
    def crossing_bytes(self) -> int:
        """Bytes that leave each host for the others, for each token of decoding.

        Two sums in every layer and one of the embedding, in the dtype of activations, each of which goes around a ring
        of the model shards, once to add up and once to tell; and the float32 logits of a host's part of the vocabulary.
        Between data rows go the sampled tokens alone.
        """
        config, shards = self.config, self.mesh[1]
        told = 4 if self.mesh[0] > 1 and len({host for row in self.rows for host in row}) > 1 else 0
        if self.hosts_of_row == 1:
            return told
        sums = (2 * config.num_layers + 1) * config.emb_size * np.dtype(self.dtype).itemsize
        return told + round((2 * sums + 4 * config.vocab_size) * (shards - 1) / shards)

    @property
    def fixed_bytes(self) -> int:
        """Weights and workspace, in one memory."""
        weights, rows = self._memories
        return weights * self.weight_bytes + rows * self.workspace_bytes

    def needed_bytes(self, sequences: int = 1) -> int:
        """What one memory must hold to continue that many sequences of full context at a time."""
        rows = -(-sequences // self.mesh[0])
        return self.fixed_bytes + rows * self._memories[1] * self.cache_bytes

    @property
    def sequences(self) -> int | None:
        """How many sequences of full context fit at a time; below 1 if none does, None if memory is not known."""
        if self.devices.usable_bytes is None:
            return None
        free = self.devices.usable_bytes - self.fixed_bytes
        return max(0, free // (self._memories[1] * self.cache_bytes)) * self.mesh[0]

    @property
    def fits(self) -> bool | None:
        """Whether a sequence of full context fits; None if it is not known how much memory there is."""
        return None if self.sequences is None else self.sequences > 0

    # Speed

    def decode_read_bytes(self, batch: int, context: int) -> int:
        """Bytes that one device has to read for a step of decoding.

        Experts are taken to be chosen evenly and independently, so that a batch of several sequences selects
        `experts * (1 - (1 - selected / experts) ** sequences)` of them on average; one sequence exactly `selected`.

        Args:
            batch: sequences on the whole mesh.
            context: positions that each has in the cache.
        """
        rows = -(-batch // self.mesh[0])
        config = self.config
        touched = 1 - (1 - config.num_selected_experts / config.num_experts) ** rows
        weights = 0.0
        for array in self._arrays:
            weights += self._array_bytes(array) * (touched if array.spec.kind is Kind.EXPERTS else 1)
        return round(weights) + rows * context * self._cache_position_bytes

    def decode_seconds(self, batch: int, context: int) -> float | None:
        """The least time of a step that gives each of `batch` sequences a token; None if it is not known."""
        operations = -(-batch // self.mesh[0]) * self.operations(1, context)
        return self._seconds(self.decode_read_bytes(batch, context), operations)

    def decode_tokens_per_second(self, batch: int, context: int) -> float | None:
        """The most tokens a second that `batch` sequences get together; None if it is not known."""
        seconds = self.decode_seconds(batch, context)
        return None if seconds is None else batch / seconds

    def prefill_seconds(self, tokens: int) -> float | None:
        """The least time to read a prompt of that many tokens; None if it is not known.

        Every chunk of it reads all weights once.
        """
        chunk = self._chunk
        total = 0.0
        for start in range(0, tokens, chunk):
            count = min(chunk, tokens - start)
            read = self.decode_read_bytes(count * self.mesh[0], 0) + (start + count) * self._cache_position_bytes
            seconds = self._seconds(read, self.operations(count, start + count / 2))
            if seconds is None:
                return None
            total += seconds
        return total

    def prefill_tokens_per_second(self, tokens: int) -> float | None:
        """The most tokens a second of reading one prompt of that length; None if it is not known."""
        seconds = self.prefill_seconds(tokens)
        return None if seconds is None else tokens / seconds

    def operations(self, tokens: int, context: float) -> float:
        """Multiplications and additions of one device for tokens of one sequence.

        Args:
            tokens: how many.
            context: positions that each sees, on average.
        """
        config = self.config
        attention = 4 * config.num_layers * config.q_size * context
        return tokens * (2 * num_active_parameters(config) + attention) / self.mesh[1]

    def _seconds(self, read_bytes: int, operations: float) -> float | None:
        kind = self.devices.kind
        if kind.bandwidth is None or kind.flops is None:
            return None
        sharing = self._memories[1]  # devices of one machine read one after the other
        return max(read_bytes * sharing / kind.bandwidth, operations * sharing / kind.flops)


def next_fit(estimate: Estimate) -> Estimate | None:
    """The smallest change with which a model fits that does not; None if there is none.

    It looks first for another mesh of the same devices, then for bfloat16 activations on them, then for more devices of
    the kind.
    """
    estimate = dataclasses.replace(estimate, hosts=None) if estimate.devices.kind.shares_memory else estimate
    meshes = [(1, shards) for shards in possible_model_shards(estimate.config, _MOST_SHARDS)]
    present = estimate.devices.count
    here = [mesh for mesh in meshes if mesh[1] <= present]
    narrow = dataclasses.replace(estimate, dtype="bfloat16")
    candidates = [dataclasses.replace(estimate, mesh=mesh) for mesh in here]
    candidates += [narrow, *(dataclasses.replace(narrow, mesh=mesh) for mesh in here)]
    for mesh in meshes:
        if mesh[1] > present and not estimate.devices.kind.shares_memory:
            more = dataclasses.replace(estimate.devices, count=mesh[1])
            candidates.append(dataclasses.replace(estimate, devices=more, mesh=mesh, hosts=None))
    return next((candidate for candidate in candidates if candidate.fits), None)


def smallest_fit(config: ModelConfig, devices: Devices, dtype: str) -> Estimate:
    """The smallest number of such devices on which a model fits, or the most that it can be divided over.

    Args:
        config: the model.
        devices: their count does not matter.
        dtype: of activations and of the cache.
    """
    estimates = [
        Estimate(config, dataclasses.replace(devices, count=shards), (1, shards), dtype)
        for shards in possible_model_shards(config, 1 if devices.kind.shares_memory else _MOST_SHARDS)
    ]
    return next((estimate for estimate in estimates if estimate.fits), estimates[-1])


def widest_split(estimate: Estimate) -> Estimate:
    """The estimate with the model divided over as many devices as it can be."""
    shards = possible_model_shards(estimate.config, _MOST_SHARDS)[-1]
    devices = dataclasses.replace(estimate.devices, count=max(shards, estimate.devices.count))
    return dataclasses.replace(estimate, devices=devices, mesh=(1, shards), hosts=None)
