"""Random weights made on the devices, to measure and to try things without a checkpoint."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

_SCALE = 2.0**-12  # of the bytes' values: products of a few thousand of them come out near 1
_SPREAD = {"embeddings": 0.02, "w": 0.05}  # of the float arrays: the embedding matrix and the routers


def random_parameters(abstract: hk.Params, seed: int = 0) -> hk.Params:
    """Fills a tree of parameters with random values, each device its own part of each array and nothing beside.

    Bytes are even over all their values, norms are 1, and routers are such that the experts of different tokens differ.

    Args:
        abstract: a `jax.ShapeDtypeStruct` with its sharding for each array, as `abstract_parameters` gives it.
        seed: of the values.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    filled = [_fill(path, leaf, seed + i) for i, (path, leaf) in enumerate(leaves)]
    jax.block_until_ready(filled)
    return jax.tree_util.tree_unflatten(tree, filled)


def _fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    name = next(key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey))
    fill = partial(_values, leaf.shape, np.dtype(leaf.dtype), _SPREAD.get(name))
    return jax.jit(fill, out_shardings=leaf.sharding)(np.uint32(seed))


def _values(shape: tuple[int, ...], dtype: np.dtype, spread: float | None, seed: jax.Array) -> jax.Array:
    if dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type((_hash(shape, seed) >> 24).astype(jnp.uint8), dtype)
    if spread is None:
        return jnp.ones(shape, dtype)
    if dtype == jnp.bfloat16 and len(shape) > 2:  # scales; an embedding matrix has two axes
        return jnp.full(shape, _SCALE, dtype)
    uniform = _hash(shape, seed).astype(jnp.float32) * (2.0 / 2**32) - 1.0
    return (spread * uniform).astype(dtype)


def _hash(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Bits that look random, uint32, from each place and the seed alone: computed where they are stored."""
    bits = jnp.zeros(shape, jnp.uint32)
    for axis, length in enumerate(shape):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        bits += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride if length > 1 else 0)
    bits = (bits ^ (seed * np.uint32(0x9E3779B1))) * np.uint32(0x85EBCA77)
    bits = (bits ^ (bits >> 15)) * np.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE3D)
    return bits ^ (bits >> 16)
