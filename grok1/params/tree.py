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

from grok1.config import ModelConfig
from grok1.params.sharding import MODEL_AXIS, AxisSplit, partition_spec, scales_split, shard_range, weight_split
from grok1.params.table import TensorSpec, tensor_table
from grok1.params.weights import Panels, QuantizedMatrix, panels_shape


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
        packed: whether it is packed in memory, in panels.
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
    packed: bool = False

    @property
    def memory_split(self) -> AxisSplit | None:
        """How the array in memory is divided: a packed one by its panels or its quads of rows."""
        if self.split is None or not self.packed:
            return self.split
        return dataclasses.replace(self.split, axis=-3 if self.split.axis == -1 else -2)

    @property
    def partition(self) -> PartitionSpec:
        """The partition of the array in memory."""
        return partition_spec(self.memory_split, len(self.file_shape) + self.stacked + self.packed)

    def scale_groups(self, rows: int) -> tuple[int, int]:
        """Scale groups among so many rows that a model shard holds of a quantised matrix, and the rows of each."""
        scales = self.specs[0].scales_shape
        if scales is None:
            raise ValueError(f"{self.module} {self.name} is not quantised")
        group_rows = min(rows, self.specs[0].shape[-2] // scales[-2])
        return rows // group_rows, group_rows

    def file_key(self, shards: int, shard: int) -> tuple[slice, ...]:
        """The part of each file's array that a model shard holds."""
        key = [slice(0, length) for length in self.file_shape]
        if self.split is not None:
            axis = self.split.axis
            key[axis] = shard_range(self.file_shape[axis], self.split.units, shards, shard)
        return tuple(key)

    def memory_shape(self, key: tuple[slice, ...]) -> tuple[int, ...]:
        """Shape in memory of a part of each file's array, all layers of it."""
        shape = (*((len(self.specs),) if self.stacked else ()), *(part.stop - part.start for part in key))
        return panels_shape(shape, self.scale_groups(shape[-2])[0]) if self.packed else shape

    def local_shape(self, shards: int) -> tuple[int, ...]:
        """Shape of what a model shard holds in memory."""
        return self.memory_shape(self.file_key(shards, 0))

    def global_shape(self, shards: int) -> tuple[int, ...]:
        """Shape of the array over the whole mesh, with parts that several shards hold counted for each."""
        shape = list(self.local_shape(shards))
        if self.memory_split is not None:
            shape[self.memory_split.axis] *= shards
        return tuple(shape)


def stored_leaves(
    config: ModelConfig, dtype: np.dtype | type = np.float32, packed: bool = False
) -> tuple[StoredLeaf, ...]:
    """All arrays of the parameter tree.

    Args:
        config: the model.
        dtype: dtype of the embedding matrix in memory; everything else stays as it is in the files.
        packed: whether quantised weights are to be packed in memory.
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
            dtype=_dtype_in_memory(first, np.dtype(dtype), packed),
            split=weight_split(module, config),
            packed=packed and first.scales_shape is not None,
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
                    packed=False,
                )
            )
    return tuple(leaves)


def _dtype_in_memory(spec: TensorSpec, embedding_dtype: np.dtype, packed: bool) -> np.dtype:
    if spec.name == "embeddings":
        return embedding_dtype
    return np.dtype(np.uint8) if packed and spec.scales_shape is not None else spec.dtype


def parameter_tree(leaves: tuple[StoredLeaf, ...], values: list[Any], shards: int) -> hk.Params:
    """A parameter tree with one value for each leaf, in the leaves' order, for so many model shards."""
    tree: dict[str, dict[str, Any]] = defaultdict(dict)
    weight_leaf = leaves[0]
    for leaf, value in zip(leaves, values, strict=True):
        parameters = tree[leaf.module]
        if not leaf.scales:
            weight_leaf, parameters[leaf.name] = leaf, value
        elif weight_leaf.packed:
            rows = weight_leaf.file_key(shards, 0)[-2]
            _, group_rows = weight_leaf.scale_groups(rows.stop - rows.start)
            parameters[leaf.name] = QuantizedMatrix(parameters[leaf.name], value, layout=Panels(group_rows))
        else:
            parameters[leaf.name] = QuantizedMatrix(parameters[leaf.name], value)
    return dict(tree)


def abstract_parameters(
    config: ModelConfig, mesh: Mesh, dtype: np.dtype | type = np.float32, packed: bool = False
) -> hk.Params:
    """The parameter tree that `load_parameters` gives, with a `jax.ShapeDtypeStruct` for each array.

    Args:
        config: the model.
        mesh: a (data, model) mesh that the model divides over.
        dtype: dtype of the embedding matrix in memory.
        packed: whether quantised weights are packed in memory.
    """
    leaves = stored_leaves(config, dtype, packed)
    shards = mesh.shape[MODEL_AXIS]
    return parameter_tree(
        leaves,
        [
            jax.ShapeDtypeStruct(leaf.global_shape(shards), leaf.dtype, sharding=NamedSharding(mesh, leaf.partition))
            for leaf in leaves
        ],
        shards,
    )
