"""Estimates of memory per device, and upper bounds on speed.

Memory is that of the arrays that loading creates and the engine keeps. Speed follows the roofline model: a step takes
as long as reading its bytes at full memory bandwidth or computing its operations at the peak rate, whichever is longer.
Communication between devices is ignored.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from functools import cached_property

import numpy as np

from grok1.config import ModelConfig
from grok1.network import ModelShard
from grok1.ops.kernels import xla_kernels
from grok1.params.sharding import mesh_device_order, possible_model_shards
from grok1.params.table import Kind, num_active_parameters
from grok1.params.tree import parameter_arrays
from grok1.plan.devices import Devices

_MAX_SHARDS = 256  # limit when searching for a mesh


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A model on a mesh of devices.

    Attributes:
        config: the model.
        devices: available devices; the mesh may leave some idle.
        mesh: sizes of the data and the model axis.
        dtype: name of the dtype of activations and of the KV cache.
        hosts: number of devices per host, or on CPUs per process, each with its own memory; None for a single host.
    """

    config: ModelConfig
    devices: Devices
    mesh: tuple[int, int]
    dtype: str
    hosts: tuple[int, ...] | None = None

    # Memory of one device

    @cached_property
    def _bytes_by_kind(self) -> Counter[Kind]:
        """Bytes of weights on one device, by kind."""
        found: Counter[Kind] = Counter()
        for array in parameter_arrays(self.config, np.dtype(self.dtype)):
            found[array.spec.kind] += math.prod(array.local_shape(self.mesh[1])) * array.dtype.itemsize
        return found

    @property
    def weight_bytes(self) -> int:
        """Size of the weights on one device."""
        return self._bytes_by_kind.total()

    @property
    def cache_bytes(self) -> int:
        """Size of the KV cache of one sequence of full context, on one of its devices."""
        shape = ModelShard(self.config, self.mesh[1]).cache_shape(1)
        return 2 * math.prod(shape) * np.dtype(self.dtype).itemsize

    @property
    def _cache_position_bytes(self) -> int:
        return self.cache_bytes // self.config.sequence_len

    @property
    def _chunk(self) -> int:
        """Maximum number of tokens of a sequence that one step processes."""
        return min(xla_kernels(self.devices.kind.platform).max_chunk, self.config.sequence_len)

    @property
    def workspace_bytes(self) -> int:
        """Approximate memory of the largest step on one device, in addition to weights and cache.

        Scoring a chunk keeps float32 logits of every position, and float32 gate and up activations of every selected
        expert.
        """
        config, chunk = self.config, self._chunk
        experts = 2 * config.num_selected_experts * config.ffn_size // self.mesh[1]
        return 4 * chunk * (config.vocab_size + experts + 8 * config.emb_size)

    # Memory of one device, or of a machine whose devices share it

    @property
    def _memories(self) -> tuple[int, int]:
        """Largest number of distinct shards, and of devices, that share one memory."""
        if not self.devices.kind.shares_memory:
            return 1, 1
        shards: dict[int, list[int]] = defaultdict(list)  # by host
        for row in self.rows:
            for shard, host in enumerate(row):
                shards[host].append(shard)
        return max(len(set(on_host)) for on_host in shards.values()), max(map(len, shards.values()))

    # Several hosts

    @cached_property
    def rows(self) -> list[list[int]]:
        """Host of each model shard, for each data row."""
        data, model = self.mesh
        hosts = [host for host, count in enumerate(self.hosts or (data * model,)) for _ in range(count)]
        order = mesh_device_order(self.mesh, hosts)
        return [[hosts[index] for index in order[row * model : (row + 1) * model]] for row in range(data)]

    @property
    def replicated_bytes(self) -> int:
        """Size of the additional copies of weights in a data row, where several shards have the same weights."""
        return self.mesh[1] * self.weight_bytes - dataclasses.replace(self, mesh=(1, 1), hosts=None).weight_bytes

    @property
    def idle(self) -> dict[int, int]:
        """Number of idle devices on each host that has any."""
        present = Counter(dict(enumerate(self.hosts or (self.devices.count,))))
        return present - Counter(host for row in self.rows for host in row)

    @property
    def crossing_bytes(self) -> int:
        """Bytes that each host sends to others per decoded token.

        Model shards sum activations twice per layer and once for the embedding, each with a ring all-reduce, and gather
        the float32 logits. Data rows exchange only sampled tokens.
        """
        config, shards = self.config, self.mesh[1]
        sampled = 4 if self.mesh[0] > 1 and len({host for row in self.rows for host in row}) > 1 else 0
        if all(len(set(row)) == 1 for row in self.rows):
            return sampled
        sums = (2 * config.num_layers + 1) * config.emb_size * np.dtype(self.dtype).itemsize
        return sampled + round((2 * sums + 4 * config.vocab_size) * (shards - 1) / shards)

    @property
    def fixed_bytes(self) -> int:
        """Size of weights and workspace in one memory."""
        weights, rows = self._memories
        return weights * self.weight_bytes + rows * self.workspace_bytes

    def needed_bytes(self, sequences: int = 1) -> int:
        """Return the bytes needed in one memory for `sequences` concurrent sequences of full context."""
        rows = -(-sequences // self.mesh[0])
        return self.fixed_bytes + rows * self._memories[1] * self.cache_bytes

    @property
    def sequences(self) -> int | None:
        """Number of concurrent sequences of full context that fit; None if memory is unknown."""
        if self.devices.usable_bytes is None:
            return None
        free = self.devices.usable_bytes - self.fixed_bytes
        return max(0, free // (self._memories[1] * self.cache_bytes)) * self.mesh[0]

    @property
    def fits(self) -> bool | None:
        """Whether a sequence of full context fits; None if memory is unknown."""
        return None if self.sequences is None else self.sequences > 0

    # Speed

    def decode_read_bytes(self, batch: int, context: int) -> int:
        """Return the bytes that one device reads in a decode step.

        Assumes that sequences select experts uniformly and independently, so that on average they select
        `experts * (1 - (1 - selected / experts) ** sequences)` distinct experts.

        Args:
            batch: number of sequences on the whole mesh.
            context: number of cached positions of each sequence.
        """
        rows = -(-batch // self.mesh[0])
        config = self.config
        unselected = (1 - config.num_selected_experts / config.num_experts) ** rows
        weights = self.weight_bytes - unselected * self._bytes_by_kind[Kind.EXPERTS]
        return round(weights) + rows * context * self._cache_position_bytes

    def decode_seconds(self, batch: int, context: int) -> float | None:
        """Return a lower bound in seconds for a decode step of `batch` sequences; None if speeds are unknown."""
        operations = -(-batch // self.mesh[0]) * self.operations(1, context)
        return self._seconds(self.decode_read_bytes(batch, context), operations)

    def decode_tokens_per_second(self, batch: int, context: int) -> float | None:
        """Return an upper bound in tokens/s for all of `batch` sequences; None if speeds are unknown."""
        seconds = self.decode_seconds(batch, context)
        return None if seconds is None else batch / seconds

    def prefill_seconds(self, tokens: int) -> float | None:
        """Return a lower bound in seconds for prefill, in chunks that each read the weights; None if unknown."""
        total = 0.0
        for start in range(0, tokens, self._chunk):
            count = min(self._chunk, tokens - start)
            read = self.decode_read_bytes(count * self.mesh[0], 0) + (start + count) * self._cache_position_bytes
            seconds = self._seconds(read, self.operations(count, start + count / 2))
            if seconds is None:
                return None
            total += seconds
        return total

    def prefill_tokens_per_second(self, tokens: int) -> float | None:
        """Return an upper bound in tokens/s for prefill of one prompt; None if speeds are unknown."""
        seconds = self.prefill_seconds(tokens)
        return None if seconds is None else tokens / seconds

    def operations(self, tokens: int, context: float) -> float:
        """Return the operations of one device for tokens that attend to `context` positions on average."""
        config = self.config
        attention = 4 * config.num_layers * config.q_size * context
        return tokens * (2 * num_active_parameters(config) + attention) / self.mesh[1]

    def _seconds(self, read_bytes: int, operations: float) -> float | None:
        kind = self.devices.kind
        if kind.bandwidth is None or kind.flops is None:
            return None
        sharing = self._memories[1]  # devices of one machine share its bandwidth and arithmetic units
        return max(read_bytes * sharing / kind.bandwidth, operations * sharing / kind.flops)


def next_fit(estimate: Estimate) -> Estimate | None:
    """Return the smallest change with which a model fits, or None if there is none.

    Tries other meshes of the same devices, then bfloat16 activations on them, then more devices of the kind.
    """
    estimate = dataclasses.replace(estimate, hosts=None) if estimate.devices.kind.shares_memory else estimate
    meshes = [(1, shards) for shards in possible_model_shards(estimate.config, _MAX_SHARDS)]
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
    """Return the estimate for the smallest number of devices on which a model fits.

    If it fits on none, returns the estimate for the largest number that the model can be split across.

    Args:
        config: the model.
        devices: the kind of device and its memory; the count is ignored.
        dtype: name of the dtype of activations and of the KV cache.
    """
    estimates = [
        Estimate(config, dataclasses.replace(devices, count=shards), (1, shards), dtype)
        for shards in possible_model_shards(config, 1 if devices.kind.shares_memory else _MAX_SHARDS)
    ]
    return next((estimate for estimate in estimates if estimate.fits), estimates[-1])


def widest_split(estimate: Estimate) -> Estimate:
    """Return the estimate for the largest number of devices that the model can be split across."""
    shards = possible_model_shards(estimate.config, _MAX_SHARDS)[-1]
    devices = dataclasses.replace(estimate.devices, count=max(shards, estimate.devices.count))
    return dataclasses.replace(estimate, devices=devices, mesh=(1, shards), hosts=None)
