"""What is in a checkpoint: its files by kind and one by one, their sizes, and the model's parameters."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grok1.checkpoint.hollow import allocated_bytes
from grok1.checkpoint.pickled.scan import StoredTensor
from grok1.checkpoint.reader import Checkpoint
from grok1.config import ModelConfig
from grok1.errors import CheckpointError
from grok1.params.table import ArraySpec, Kind, TensorFile


@dataclass(frozen=True)
class TensorEntry:
    """One tensor file on the disk.

    Attributes:
        spec: what it holds.
        stored: where its arrays are.
        file_bytes: size of the file.
        allocated_bytes: bytes it takes on the disk; fewer than its size if it has holes.
    """

    spec: TensorFile
    stored: StoredTensor
    file_bytes: int
    allocated_bytes: int


@dataclass(frozen=True)
class KindSummary:
    """All tensors of a kind.

    Attributes:
        kind: what they are for.
        forms: how many tensors have each array and scales, in file order.
        parameters: number of weights, not counting scales.
        file_bytes: size of the files.
    """

    kind: Kind
    forms: Counter[tuple[ArraySpec, ArraySpec | None]]
    parameters: int
    file_bytes: int

    @property
    def count(self) -> int:
        """Number of tensors, each a file."""
        return self.forms.total()


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint.

    Attributes:
        directory: the directory of tensor files.
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
        return sum(tensor.spec.num_weights for tensor in self.tensors)

    @property
    def active_parameters(self) -> int:
        """Number of weights that one token uses: of the experts only those selected for it."""
        experts = sum(tensor.spec.num_weights for tensor in self.tensors if tensor.spec.kind is Kind.EXPERTS)
        selected = experts // self.config.num_experts * self.config.num_selected_experts
        return self.parameters - experts + selected

    def kinds(self) -> list[KindSummary]:
        """Return the tensors by kind."""
        return [_summary(kind, [tensor for tensor in self.tensors if tensor.spec.kind is kind]) for kind in Kind]


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Look at an opened checkpoint; reads no array.

    Raises:
        CheckpointError: if a file is gone since it was opened.
    """

    def position(tensor: TensorEntry) -> int:
        if tensor.spec.layer is not None:
            return tensor.spec.layer
        return -1 if tensor.spec.kind is Kind.EMBEDDING else checkpoint.config.num_layers

    tensors = [_entry(checkpoint, spec) for spec in checkpoint.table]
    tensors.sort(key=position)  # stable: a layer keeps its file order
    return Inspection(checkpoint.directory, checkpoint.config, tuple(tensors))


def _entry(checkpoint: Checkpoint, spec: TensorFile) -> TensorEntry:
    path = checkpoint.directory / spec.file_name
    try:
        status = os.stat(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check the file and its disk") from None
    return TensorEntry(spec, checkpoint.tensors[spec.index], status.st_size, allocated_bytes(status))


def _summary(kind: Kind, tensors: Sequence[TensorEntry]) -> KindSummary:
    return KindSummary(
        kind=kind,
        forms=Counter((tensor.spec.array, tensor.spec.scales) for tensor in tensors),
        parameters=sum(tensor.spec.num_weights for tensor in tensors),
        file_bytes=sum(tensor.file_bytes for tensor in tensors),
    )
