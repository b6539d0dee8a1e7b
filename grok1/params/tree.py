"""The parameter tree in memory: its arrays, the files that each comes from, and how they are divided over a mesh.

The tree is the release's, except that the layers of a parameter are one array with a leading axis of layers.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import haiku as hk
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grok1.config import ModelConfig
from grok1.params.sharding import MESH_AXES, MODEL_AXIS, axis_range
from grok1.params.table import Axis, Kind, ParameterSpec, TensorFile, parameter_table, tensor_table
from grok1.params.weights import Panels, QuantizedMatrix, panels_shape


@dataclasses.dataclass(frozen=True)
class ParameterArray:
    """One array of the parameter tree: a parameter's values or its scales, all layers of it.

    Attributes:
        spec: the parameter.
        files: the files that it comes from, in order of the layers; one file for a parameter outside the layers.
        scales: whether this is the array of scales of a quantized parameter.
        dtype: dtype in memory.
        packed: whether the values are in panels in memory.
    """

    spec: ParameterSpec
    files: tuple[TensorFile, ...]
    scales: bool
    dtype: np.dtype
    packed: bool = False

    @property
    def file_axes(self) -> tuple[Axis, ...]:
        """Axes of the array in each file."""
        return (self.spec.scales_axes or ()) if self.scales else self.spec.axes

    @property
    def file_dtype(self) -> np.dtype:
        """Dtype of the array in each file."""
        stored = self.spec.scales if self.scales else self.spec.array
        assert stored is not None
        return stored.dtype

    @property
    def partition(self) -> PartitionSpec:
        """The partition of the array in memory: one in panels is divided by its panels or its quads of rows."""
        names = [MESH_AXES.get(axis.name) for axis in self.file_axes]
        if self.packed:
            *lead, rows, columns = names
            names = [*lead, columns, rows, None]
        return PartitionSpec(*([None] if self.spec.stacked else []), *names)

    def groups_of(self, rows: int) -> tuple[int, int]:
        """Scale groups among `rows` rows that a model shard holds of a quantized matrix, and the rows of each."""
        if self.spec.groups is None:
            raise ValueError(f"{self.spec.path} is not quantized")
        group_rows = min(rows, self.spec.shape[-2] // self.spec.groups)
        return rows // group_rows, group_rows

    def file_key(self, shards: int, shard: int) -> tuple[slice, ...]:
        """Return the part of each file's array that a model shard holds."""
        return tuple(axis_range(axis, shards, shard) for axis in self.file_axes)

    def memory_shape(self, key: tuple[slice, ...]) -> tuple[int, ...]:
        """Shape in memory of a part of each file's array, all layers of it."""
        shape = (*((len(self.files),) if self.spec.stacked else ()), *(part.stop - part.start for part in key))
        return panels_shape(shape, self.groups_of(shape[-2])[0]) if self.packed else shape

    def local_shape(self, shards: int) -> tuple[int, ...]:
        """Shape of what a model shard holds in memory."""
        return self.memory_shape(self.file_key(shards, 0))

    def global_shape(self, shards: int) -> tuple[int, ...]:
        """Shape of the array over the whole mesh, with parts that several shards hold counted for each."""
        sizes = zip(self.local_shape(shards), self.partition, strict=True)
        return tuple(size * shards if axis == MODEL_AXIS else size for size, axis in sizes)


def parameter_arrays(
    config: ModelConfig, dtype: np.dtype | type = np.float32, packed: bool = False
) -> tuple[ParameterArray, ...]:
    """All arrays of the parameter tree, in the order of its leaves.

    Args:
        config: the model.
        dtype: dtype of the embedding matrix in memory; all other arrays keep their dtype.
        packed: whether quantized parameters are in panels in memory.
    """
    files: dict[str, list[TensorFile]] = defaultdict(list)
    for file in tensor_table(config):
        files[file.path].append(file)
    arrays = []
    for spec in parameter_table(config):
        layers = tuple(sorted(files[spec.path], key=lambda file: file.layer or 0))
        in_memory = np.dtype(dtype) if spec.kind is Kind.EMBEDDING else spec.dtype
        if spec.scales is None:
            arrays.append(ParameterArray(spec, layers, False, in_memory))
        else:
            values = np.dtype(np.uint8) if packed else in_memory
            arrays.append(ParameterArray(spec, layers, False, values, packed))
            arrays.append(ParameterArray(spec, layers, True, spec.scales.dtype))
    return tuple(arrays)


def parameter_tree(arrays: Sequence[ParameterArray], values: Sequence[Any], shards: int) -> hk.Params:
    """Return the parameter tree for `shards` model shards.

    Args:
        arrays: as `parameter_arrays` gives them.
        values: what the tree holds for each array.
        shards: number of model shards.
    """
    tree: dict[str, dict[str, Any]] = defaultdict(dict)
    layout: Panels | None = None
    for array, value in zip(arrays, values, strict=True):
        spec, parameters = array.spec, tree[array.spec.module]
        if array.scales:
            parameters[spec.name] = QuantizedMatrix(parameters[spec.name], value, spec.format, layout)
            continue
        parameters[spec.name] = value
        rows = array.file_key(shards, 0)[-2] if array.packed else None
        layout = None if rows is None else Panels(array.groups_of(rows.stop - rows.start)[1])
    return dict(tree)


def abstract_arrays(arrays: Sequence[ParameterArray], mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """Global shape, dtype and sharding of each array on a (data, model) mesh."""
    shards = mesh.shape[MODEL_AXIS]
    return [
        jax.ShapeDtypeStruct(array.global_shape(shards), array.dtype, sharding=NamedSharding(mesh, array.partition))
        for array in arrays
    ]


def abstract_parameters(
    config: ModelConfig, mesh: Mesh, dtype: np.dtype | type = np.float32, packed: bool = False
) -> hk.Params:
    """Return the parameter tree that `load_parameters` gives, with a `jax.ShapeDtypeStruct` for each array.

    Args:
        config: the model.
        mesh: a (data, model) mesh that the model divides over.
        dtype: dtype of the embedding matrix in memory.
        packed: whether quantized parameters are in panels in memory.
    """
    arrays = parameter_arrays(config, dtype, packed)
    return parameter_tree(arrays, abstract_arrays(arrays, mesh), mesh.shape[MODEL_AXIS])
