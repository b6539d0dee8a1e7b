"""What is in a checkpoint: its files by kind and one by one, their sizes, and the model's parameters."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grok1.checkpoint.hollow import allocated_bytes
from grok1.checkpoint.reader import Checkpoint
from grok1.config import ModelConfig
from grok1.errors import CheckpointError
from grok1.params.table import Kind, TensorFile


@dataclass(frozen=True)
class TensorEntry:
    """One tensor file as it lies on the disk.

    Attributes:
        parameter: Haiku module path and parameter name.
        kind: what it is for.
        layer: number of the decoder layer; None for the embeddings and the final norm.
        file: name of the file.
        shape: shape of the array.
        dtype: of the array: float32, or int8 for a quantized weight.
        scales_shape: shape of a quantized weight's bfloat16 scales, otherwise None.
        offset: bytes from the file's beginning to the array's first.
        scales_offset: the same for the scales; None without scales.
        file_bytes: size of the file.
        allocated_bytes: what it takes on the disk, which is less if it has holes.
    """

    parameter: str
    kind: Kind
    layer: int | None
    file: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    scales_shape: tuple[int, ...] | None
    offset: int
    scales_offset: int | None
    file_bytes: int
    allocated_bytes: int

    @property
    def num_weights(self) -> int:
        """Number of weights, not counting scales."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Form:
    """A shape, dtype and shape of scales that `count` tensors share."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    scales_shape: tuple[int, ...] | None
    count: int


@dataclass(frozen=True)
class KindSummary:
    """All tensors of a kind.

    Attributes:
        kind: what it is for.
        count: number of tensors, each a file.
        forms: their shapes and dtypes, in file order.
        parameters: number of weights, not counting scales.
        file_bytes: size of the files.
    """

    kind: str
    count: int
    forms: tuple[Form, ...]
    parameters: int
    file_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint.

    Attributes:
        directory: the folder of tensor files.
        config: from `config.json`, or else the release's.
        tensors: every file in the order that a token meets them: the embedding, the layers by number, the final
            norm. Within a layer in file order.
    """

    directory: Path
    config: ModelConfig
    tensors: tuple[TensorEntry, ...]

    @property
    def file_bytes(self) -> int:
        """Size of all files."""
        return sum(tensor.file_bytes for tensor in self.tensors)

    @property
    def allocated_bytes(self) -> int:
        """What all files take on the disk."""
        return sum(tensor.allocated_bytes for tensor in self.tensors)

    @property
    def hollow(self) -> bool:
        """Whether the files are mostly holes: written so, or by a download that is far from its end."""
        return self.allocated_bytes < self.file_bytes // 2

    @property
    def parameters(self) -> int:
        """Number of weights in the files, not counting scales."""
        return sum(tensor.num_weights for tensor in self.tensors)

    @property
    def active_parameters(self) -> int:
        """Number of weights that one token uses: of the experts only those selected for it."""
        experts = sum(tensor.num_weights for tensor in self.tensors if tensor.kind is Kind.EXPERTS)
        selected = experts // self.config.num_experts * self.config.num_selected_experts
        return self.parameters - experts + selected

    def kinds(self) -> list[KindSummary]:
        """The tensors by kind."""
        return [_summary(kind, [tensor for tensor in self.tensors if tensor.kind is kind]) for kind in Kind]


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Looks at an opened checkpoint; reads no array.

    Raises:
        CheckpointError: if a file is gone since it was opened.
    """
    entries = [_entry(checkpoint, spec) for spec in checkpoint.table]
    last = checkpoint.config.num_layers
    entries.sort(key=lambda entry: _place(entry, last))  # stable: a layer keeps its file order
    return Inspection(checkpoint.directory, checkpoint.config, tuple(entries))


def _place(entry: TensorEntry, num_layers: int) -> int:
    if entry.layer is not None:
        return entry.layer
    return -1 if entry.kind is Kind.EMBEDDING else num_layers


def _entry(checkpoint: Checkpoint, spec: TensorFile) -> TensorEntry:
    stored, path = checkpoint.tensors[spec.index], checkpoint.directory / spec.file_name
    try:
        status = os.stat(path)
    except OSError as error:
        raise CheckpointError(f"cannot look at {path} ({error.strerror}): check the file and its disk") from None
    return TensorEntry(
        parameter=spec.parameter,
        kind=spec.kind,
        layer=spec.layer,
        file=spec.file_name,
        shape=stored.array.shape,
        dtype=stored.array.dtype,
        scales_shape=stored.scales.shape if stored.scales else None,
        offset=stored.array.offset,
        scales_offset=stored.scales.offset if stored.scales else None,
        file_bytes=status.st_size,
        allocated_bytes=allocated_bytes(status),
    )


def _summary(kind: Kind, tensors: Sequence[TensorEntry]) -> KindSummary:
    forms = Counter((tensor.shape, tensor.dtype, tensor.scales_shape) for tensor in tensors)
    return KindSummary(
        kind=kind,
        count=len(tensors),
        forms=tuple(Form(*form, count) for form, count in forms.items()),
        parameters=sum(tensor.num_weights for tensor in tensors),
        file_bytes=sum(tensor.file_bytes for tensor in tensors),
    )
