"""The parameter tree in memory: its arrays, the files that each comes from, and how they are divided over a mesh.

The tree is the release's, but the layers of a parameter are one array with a leading axis of layers.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import haiku as hk
import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grok1.checkpoint.layout import TensorSpec, tensor_table
from grok1.config import ModelConfig
from grok1.quantize import QuantizedWeight
from grok1.sharding import MODEL_AXIS, AxisSplit, partition_spec, scales_split, shard_range, weight_split


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """One array of the parameter tree and the files that it comes from.

    Attributes:
        module: Haiku module with the layers in one, such as `transformer/decoder_layer/moe/linear`.
        name: the parameter's name in the module.
        scales: whether this is the array of scales of a quantised parameter.
        specs: the files, in order of the layers; one file for a parameter outside the layers.
        stacked: whether there is a leading axis of layers.
        file_shape: shape of the array in each file.
        file_dtype: dtype of the array in each file.
        dtype: dtype in memory.
        split: how the array is divided over the model shards.
    """

    module: str
    name: str
    scales: bool
    specs: tuple[TensorSpec, ...]
    stacked: bool
    file_shape: tuple[int, ...]
    file_dtype: np.dtype
    dtype: np.dtype
    split: AxisSplit | None

    @property
    def partition(self) -> PartitionSpec:
        """The partition of the array in memory."""
        return partition_spec(self.split, len(self.file_shape) + self.stacked)

    def file_key(self, shards: int, shard: int) -> tuple[slice, ...]:
        """The part of each file's array that a model shard holds."""
        key = [slice(0, length) for length in self.file_shape]
        if self.split is not None:
            axis = self.split.axis
            key[axis] = shard_range(self.file_shape[axis], self.split.units, shards, shard)
        return tuple(key)

    def memory_shape(self, key: tuple[slice, ...]) -> tuple[int, ...]:
        """Shape in memory of a part of each file's array, all layers of it."""
        return (*((len(self.specs),) if self.stacked else ()), *(part.stop - part.start for part in key))

    def local_shape(self, shards: int) -> tuple[int, ...]:
        """Shape of what a model shard holds in memory."""
        return self.memory_shape(self.file_key(shards, 0))

    def global_shape(self, shards: int) -> tuple[int, ...]:
        """Shape of the array over the whole mesh, with parts that several shards hold counted for each."""
        shape = list(self.local_shape(shards))
        if self.split is not None:
            shape[self.split.axis] *= shards
        return tuple(shape)


def stored_leaves(config: ModelConfig, dtype: np.dtype | type = np.float32) -> tuple[StoredLeaf, ...]:
    """All arrays of the parameter tree.

    Args:
        config: the model.
        dtype: dtype of the embedding matrix in memory; everything else stays as it is in the files.
    """
    files: dict[tuple[str, str], list[TensorSpec]] = defaultdict(list)
    for spec in tensor_table(config):
        files[spec.layer_module, spec.name].append(spec)
    leaves = []
    for (module, name), unordered in files.items():
        specs = tuple(sorted(unordered, key=lambda spec: spec.layer or 0))
        first = specs[0]
        leaf = StoredLeaf(
            module=module,
            name=name,
            scales=False,
            specs=specs,
            stacked=first.layer is not None,
            file_shape=first.shape,
            file_dtype=first.dtype,
            dtype=np.dtype(dtype) if name == "embeddings" else first.dtype,
            split=weight_split(module, config),
        )
        leaves.append(leaf)
        if first.scales_shape is not None:
            bfloat16 = np.dtype(ml_dtypes.bfloat16)
            leaves.append(
                dataclasses.replace(
                    leaf,
                    scales=True,
                    file_shape=first.scales_shape,
                    file_dtype=bfloat16,
                    dtype=bfloat16,
                    split=scales_split(module, config),
                )
            )
    return tuple(leaves)


def parameter_tree(leaves: tuple[StoredLeaf, ...], values: list[Any]) -> hk.Params:
    """A parameter tree with one value for each leaf, in the leaves' order."""
    tree: dict[str, dict[str, Any]] = defaultdict(dict)
    for leaf, value in zip(leaves, values, strict=True):
        parameters = tree[leaf.module]
        parameters[leaf.name] = QuantizedWeight(parameters[leaf.name], value) if leaf.scales else value
    return dict(tree)


def abstract_parameters(config: ModelConfig, mesh: Mesh, dtype: np.dtype | type = np.float32) -> hk.Params:
    """The parameter tree that `load_parameters` gives, with a `jax.ShapeDtypeStruct` for each array.

    Args:
        config: the model.
        mesh: a (data, model) mesh that the model divides over.
        dtype: dtype of the embedding matrix in memory.
    """
    leaves = stored_leaves(config, dtype)
    shards = mesh.shape[MODEL_AXIS]
    return parameter_tree(
        leaves,
        [
            jax.ShapeDtypeStruct(leaf.global_shape(shards), leaf.dtype, sharding=NamedSharding(mesh, leaf.partition))
            for leaf in leaves
        ],
    )
