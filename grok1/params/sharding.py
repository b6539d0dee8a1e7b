"""Meshes of any (data, model) shape, on one host or several, and how a model is sharded over one.

Sequences are split over the `data` axis and weights over the `model` axis: expert width and vocabulary evenly; heads
and scale groups evenly while there are enough of them, and beyond that neighboring shards hold the same ones.

Model shards exchange activations twice in every layer, data rows almost nothing. So the model shards of a row are on
one host where possible, and only rows that fit on no single host span several.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from grok1.config import SCALE_GROUPS, ModelConfig
from grok1.errors import MeshError
from grok1.params.table import Axis

DATA_AXIS = "data"
MODEL_AXIS = "model"


MESH_AXES = {"vocab": MODEL_AXIS, "ffn": MODEL_AXIS, "q_heads": MODEL_AXIS, "kv_heads": MODEL_AXIS}
"""The axis of the mesh that each logical axis of a parameter is divided over; other axes are whole on every device."""


def shard_range(length: int, units: int, shards: int, shard: int) -> slice:
    """Return the part of an axis that one shard holds.

    There are as many parts as the greatest common divisor of units and shards; with more shards than parts, neighboring
    shards hold the same one.

    Args:
        length: length of the whole axis, a multiple of `units`.
        units: number of indivisible units.
        shards: number of model shards.
        shard: index of the shard.
    """
    parts = math.gcd(units, shards)
    size = length // parts
    first = shard * parts // shards * size
    return slice(first, first + size)


def axis_range(axis: Axis, shards: int, shard: int) -> slice:
    """Return the part of a parameter's axis that one of `shards` model shards holds."""
    if axis.name not in MESH_AXES:
        return slice(0, axis.size)
    return shard_range(axis.size, axis.size // axis.unit, shards, shard)


def indivisible(config: ModelConfig, shards: int) -> str | None:
    """Why a model cannot be divided into `shards` model shards; None if it can."""
    heads = math.gcd(config.num_q_heads, shards)  # parts of the query heads
    if heads != shards and heads % SCALE_GROUPS:
        return f"its {config.num_q_heads} query heads are not divisible by {shards}"
    for name, size in (
        ("units of expert width", config.ffn_size),
        ("vocabulary pieces", config.vocab_size),
    ):
        if size % shards:
            return f"its {size} {name} are not divisible by {shards}"
    for name, size in (("key/value heads", config.num_kv_heads), ("scale groups", SCALE_GROUPS)):
        if size % shards and shards % size:
            return f"{shards} is neither a divisor nor a multiple of its {size} {name}"
    return None


def possible_model_shards(config: ModelConfig, most: int) -> list[int]:
    """Return the numbers of model shards up to `most` that a model can be divided into, ascending."""
    return [shards for shards in range(1, most + 1) if indivisible(config, shards) is None]


def default_mesh_shape(
    config: ModelConfig,
    num_devices: int,
    hosts: Sequence[int] | None = None,
    fits: Callable[[int], bool | None] = lambda shards: False,
) -> tuple[int, int]:
    """Return the largest number of devices that the model can be split across, on the model axis: (1, model shards).

    On several hosts, if the model fits on one: data rows of as many shards as the smallest host has devices for.

    Args:
        config: the model.
        num_devices: number of devices.
        hosts: number of devices on each host; None if all are on one.
        fits: whether the model fits when divided into that many shards.
    """
    if hosts is not None and len(hosts) > 1:
        shards = possible_model_shards(config, min(hosts))[-1]
        if fits(shards):
            return sum(count // shards for count in hosts), shards
    return 1, possible_model_shards(config, num_devices)[-1]


def mesh_device_order(shape: tuple[int, int], hosts: Sequence[int]) -> list[int]:
    """Return the devices of a mesh, row by row.

    Each host provides as many whole rows as it has devices for; any rows still missing combine the remaining devices of
    several hosts. The first device is always among them.

    Args:
        shape: sizes of the data and the model axis, which need no more devices than there are.
        hosts: the host of each device.

    Returns:
        indices of the devices, `data * model` of them.
    """
    data, model = shape
    groups = {host: [i for i, of in enumerate(hosts) if of == host] for host in dict.fromkeys(hosts)}
    everywhere = [index for group in groups.values() for index in group]
    rows: list[list[int]] = []
    if everywhere and len(groups[hosts[0]]) < model:  # the first host has too few devices for a row
        rows.append(everywhere[:model])
        groups = {host: [index for index in group if index not in rows[0]] for host, group in groups.items()}
    for group in groups.values():
        while len(group) >= model and len(rows) < data:
            rows.append(group[:model])
            del group[:model]
    rest = [index for group in groups.values() for index in group]
    while len(rows) < data:
        rows.append(rest[:model])
        del rest[:model]
    return [index for row in rows for index in row]


def check_mesh_shape(config: ModelConfig, shape: tuple[int, int], num_devices: int) -> None:
    """Check that a model can be divided over a mesh.

    Args:
        config: the model.
        shape: sizes of the data and the model axis.
        num_devices: number of devices.

    Raises:
        MeshError: if there are too few devices or the model does not divide; the message names a mesh that works.
    """
    data, model = shape
    _, shards = default_mesh_shape(config, min(model, num_devices) if model > 0 else 1)
    fallback = f"{max(1, min(data, num_devices // shards))},{shards}"
    if data < 1 or model < 1:
        raise MeshError(f"mesh is {data},{model}, expected two numbers above 0, such as {fallback}")
    reason = indivisible(config, model)
    if reason is not None:
        raise MeshError(f"mesh {data},{model} needs {model} model shards, but {reason}; use --mesh {fallback}")
    if data * model > num_devices:
        available = "device is" if num_devices == 1 else "devices are"
        raise MeshError(
            f"mesh {data},{model} needs {data * model} devices, but only {num_devices} {available} available; "
            f"use --mesh {fallback}"
        )


def make_mesh(
    config: ModelConfig,
    shape: tuple[int, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    hosts: Sequence[int] | None = None,
) -> Mesh:
    """A (data, model) mesh that the model can be divided over.

    Args:
        config: the model.
        shape: sizes of the data and the model axis; by default as many devices as possible on the model axis.
        devices: the devices to use, the first of them if there are more than needed; by default all.
        hosts: the host of each device; by default all are on one.

    Raises:
        MeshError: if there are too few devices or the model does not divide; the message names a mesh that works.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    if shape is None:
        shape = default_mesh_shape(config, len(devices))
    data, model = shape
    check_mesh_shape(config, shape, len(devices))
    order = mesh_device_order(shape, [0] * len(devices) if hosts is None else hosts)
    return Mesh(np.asarray([devices[index] for index in order]).reshape(data, model), (DATA_AXIS, MODEL_AXIS))


def local_devices(devices: Iterable[jax.Device]) -> list[jax.Device]:
    """Return the devices among `devices` that belong to this process."""
    return [device for device in devices if device.process_index == jax.process_index()]


def hosts_of(devices: Sequence[jax.Device], host_of_process: Sequence[int]) -> list[int]:
    """Return the host of each device; the devices of a TPU slice, which fast links connect, count as one host.

    Args:
        devices: of all processes.
        host_of_process: the host of each process.
    """
    if devices[0].platform == "tpu":
        return [int(getattr(device, "slice_index", 0) or 0) for device in devices]
    return [host_of_process[device.process_index] for device in devices]


def counts(hosts: Sequence[int]) -> tuple[int, ...]:
    """Number of devices on each host, in order of first appearance."""
    return tuple(Counter(hosts).values())
