"""The file table: which file of a checkpoint holds which parameter, in what shape and dtype."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from grok1.config import SCALE_GROUPS, ModelConfig

CHECKPOINT_DIR = "ckpt-0"
"""Name of the folder of tensor files."""

FLOAT32 = np.dtype(np.float32)
INT8 = np.dtype(np.int8)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


_LAYER = re.compile(r"(?<=/decoder_layer)_(\d+)(?=/)")


@dataclass(frozen=True)
class ArraySpec:
    """Dtype (float32, int8 or bfloat16) and shape of an array in a file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array's data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorSpec:
    """One tensor file of a checkpoint.

    Attributes:
        index: position among the files.
        parameter: Haiku module path and parameter name, as `transformer/decoder_layer_10/moe/linear/w`.
        shape: shape of the parameter.
        dtype: float32, or int8 for a quantised weight.
        scales_shape: for a quantised weight `[..., G, N]`, the shape of its bfloat16 scales; otherwise None.
    """

    index: int
    parameter: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    scales_shape: tuple[int, ...] | None

    @property
    def file_name(self) -> str:
        """Name of the file, as `tensor00026_000`."""
        return f"tensor{self.index:05d}_000"

    @property
    def module(self) -> str:
        """Haiku module path, as `transformer/decoder_layer_10/moe/linear`."""
        return self.parameter.rpartition("/")[0]

    @property
    def name(self) -> str:
        """Name of the parameter in its module: `w`, `scale` or `embeddings`."""
        return self.parameter.rpartition("/")[2]

    @property
    def layer(self) -> int | None:
        """Number of the decoder layer; None for the embeddings and the final norm."""
        match = _LAYER.search(self.parameter)
        return int(match[1]) if match else None

    @property
    def layer_module(self) -> str:
        """`module` without the layer's number, for the parameters of all layers stacked."""
        return _LAYER.sub("", self.module + "/").removesuffix("/")

    @property
    def array(self) -> ArraySpec:
        """Dtype and shape of the file's array, or of a quantised weight's values."""
        return ArraySpec(self.dtype, self.shape)

    @property
    def scales(self) -> ArraySpec | None:
        """Dtype and shape of a quantised weight's scales."""
        return None if self.scales_shape is None else ArraySpec(BFLOAT16, self.scales_shape)

    @property
    def num_weights(self) -> int:
        """Number of weights, not counting scales."""
        return math.prod(self.shape)

    @property
    def array_bytes(self) -> int:
        """Bytes of the weights and their scales."""
        return self.array.nbytes + (self.scales.nbytes if self.scales else 0)


@functools.lru_cache(maxsize=16)
def tensor_table(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Every file of a checkpoint with this config, in file order: 2 + 12 a layer.

    The order is that of the release, which flattened a dict by sorted module path: layers come as 0, 1, 10,
    11, ...
    """
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
        "language_model/in_out_embed/embeddings": ((config.vocab_size, config.emb_size), None),
        "language_model/rms_norm/scale": ((config.emb_size,), None),
    }
    for layer in range(config.num_layers):
        for parameter, value in _layer_parameters(config).items():
            shapes[f"transformer/decoder_layer_{layer}/{parameter}"] = value
    table = []
    for index, parameter in enumerate(sorted(shapes, key=lambda path: path.rpartition("/")[0])):
        shape, groups = shapes[parameter]
        scales_shape = None if groups is None else (*shape[:-2], groups, shape[-1])
        table.append(TensorSpec(index, parameter, shape, FLOAT32 if groups is None else INT8, scales_shape))
    return tuple(table)


def _layer_parameters(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Shape of each parameter of a layer, and how many groups its scales have (None: it has no scales)."""
    emb, experts, ffn = config.emb_size, config.num_experts, config.ffn_size
    return {
        "moe/linear/w": ((experts, emb, ffn), 1),
        "moe/linear_v/w": ((experts, emb, ffn), 1),
        "moe/linear_1/w": ((experts, ffn, emb), SCALE_GROUPS),
        "multi_head_attention/query/w": ((emb, config.q_size), 1),
        "multi_head_attention/key/w": ((emb, config.kv_size), 1),
        "multi_head_attention/value/w": ((emb, config.kv_size), 1),
        "multi_head_attention/linear/w": ((config.q_size, emb), SCALE_GROUPS),
        "rms_norm/scale": ((emb,), None),
        "rms_norm_1/scale": ((emb,), None),
        "rms_norm_2/scale": ((emb,), None),
        "rms_norm_3/scale": ((emb,), None),
        "router/w": ((emb, experts), None),
    }
