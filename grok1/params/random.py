"""Random weights made on the devices, to measure and to experiment without a checkpoint."""

from __future__ import annotations

import math
from functools import partial

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grok1.config import ModelConfig
from grok1.params.sharding import MODEL_AXIS
from grok1.params.table import Format, Kind
from grok1.params.tree import ParameterArray, abstract_arrays, parameter_arrays, parameter_tree

_SCALE = 2.0**-12  # of the bytes' values: products of a few thousand of them come out near 1
_SPREAD = {Kind.EMBEDDING: 0.02, Kind.ROUTER: 0.05}


def random_parameters(
    config: ModelConfig, mesh: Mesh, dtype: np.dtype | type = np.float32, packed: bool = False, seed: int = 0
) -> hk.Params:
    """A parameter tree of random values, made by each device for its own shards without further memory.

    Bytes are uniform over all their values, norms are 1, and routers are such that the experts of different tokens
    differ.

    Args:
        config: the model.
        mesh: a (data, model) mesh that the model divides over.
        dtype: dtype of the embedding matrix in memory.
        packed: whether quantized parameters are in panels in memory.
        seed: of the values.
    """
    arrays = parameter_arrays(config, dtype, packed)
    filled = []
    for i, (array, leaf) in enumerate(zip(arrays, abstract_arrays(arrays, mesh), strict=True)):
        fill = jax.jit(partial(_values, array, leaf.shape), out_shardings=leaf.sharding)
        filled.append(fill(np.uint32(seed + i)))
    jax.block_until_ready(filled)
    return parameter_tree(arrays, filled, mesh.shape[MODEL_AXIS])


def _values(array: ParameterArray, shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    if array.scales:
        return jnp.full(shape, _SCALE, array.dtype)
    if array.spec.format is not Format.FLOAT32:
        return jax.lax.bitcast_convert_type((_hash(shape, seed) >> 24).astype(jnp.uint8), array.dtype)
    if array.spec.kind is Kind.NORMS:
        return jnp.ones(shape, array.dtype)
    uniform = _hash(shape, seed).astype(jnp.float32) * (2.0 / 2**32) - 1.0
    return (_SPREAD[array.spec.kind] * uniform).astype(array.dtype)


def _hash(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Pseudorandom bits, uint32, computed on each device from an element's index and the seed."""
    bits = jnp.zeros(shape, jnp.uint32)
    for axis, length in enumerate(shape):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        bits += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride if length > 1 else 0)
    bits = (bits ^ (seed * np.uint32(0x9E3779B1))) * np.uint32(0x85EBCA77)
    bits = (bits ^ (bits >> 15)) * np.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE3D)
    return bits ^ (bits >> 16)
