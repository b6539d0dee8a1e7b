"""The table of parameters: everything that is known about a weight without its values.

File order, array shapes, sharding, the parameter tree and random values derive from it.
"""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from grok1.config import SCALE_GROUPS, ModelConfig

CHECKPOINT_DIR = "ckpt-0"
"""Name of the directory of tensor files."""

FLOAT32 = np.dtype(np.float32)
INT8 = np.dtype(np.int8)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

EMBEDDED_NORM = 1.0
"""Length of a token's random embedding after the multiplier. As the logits come from the same matrix, a longer one
would make every token its own likeliest successor; so the layers decide the next token."""

QUERY_GAIN = 2.0
"""Attention logits of random weights are about 2 wide: neither uniform nor concentrated on one position."""

ROUTER_GAIN = 3.0
"""Router logits of random weights are about 3 wide, so that rounding seldom changes the selected experts."""

LOGIT_STD = 2.5
"""Standard deviation of the next token's logits: some hundred of the release's 131072 tokens are likely."""

_LAYER = "transformer/decoder_layer"


class Kind(enum.StrEnum):
    """What a parameter is for, in the order of summaries."""

    EMBEDDING = "embedding"
    EXPERTS = "experts"
    ATTENTION = "attention"
    NORMS = "norms"
    ROUTER = "router"


class Format(enum.Enum):
    """Encoding of a parameter's values."""

    FLOAT32 = "float32"
    INT8 = "int8"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the stored values."""
        return np.dtype(self.value)


@dataclass(frozen=True)
class Axis:
    """A named axis of a parameter; `grok1.params.sharding` maps names to axes of the mesh.

    Attributes:
        name: logical name, such as "ffn".
        size: number of elements.
        unit: elements that stay together when the axis is divided: the columns of a head.
    """

    name: str
    size: int
    unit: int = 1


@dataclass(frozen=True)
class ArraySpec:
    """Dtype (float32, int8 or bfloat16) and shape of an array in a file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    @property
    def nbytes(self) -> int:
        """Bytes of the array's data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter: of every decoder layer, or outside the layers.

    Attributes:
        path: Haiku module path and parameter name, such as `transformer/decoder_layer/moe/linear/w`.
        axes: axes of the parameter in one layer.
        kind: what it is for.
        groups: scale groups of a quantized parameter; None if it has no scales.
        stacked: whether every decoder layer has one.
        gain: size of random values: what a matrix multiplies the size of a vector by, the mean of a norm's scales, or
            the standard deviation of the embeddings.
    """

    path: str
    axes: tuple[Axis, ...]
    kind: Kind
    groups: int | None
    stacked: bool
    gain: float

    @property
    def module(self) -> str:
        """Haiku module path, such as `transformer/decoder_layer/moe/linear`."""
        return self.path.rpartition("/")[0]

    @property
    def name(self) -> str:
        """Name of the parameter in its module: `w`, `scale` or `embeddings`."""
        return self.path.rpartition("/")[2]

    @property
    def format(self) -> Format:
        """Encoding of the values in the release's files."""
        return Format.FLOAT32 if self.groups is None else Format.INT8

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in one layer."""
        return tuple(axis.size for axis in self.axes)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype in the file: float32, or int8 for a quantized parameter."""
        return self.format.dtype

    @property
    def scales_axes(self) -> tuple[Axis, ...] | None:
        """Axes `[..., G, N]` of a quantized parameter's scales: its own, with a group for several rows."""
        if self.groups is None:
            return None
        *lead, rows, columns = self.axes
        return (*lead, Axis(rows.name, self.groups), columns)

    @property
    def scales_shape(self) -> tuple[int, ...] | None:
        """Shape `[..., G, N]` of a quantized parameter's bfloat16 scales; otherwise None."""
        return None if self.scales_axes is None else tuple(axis.size for axis in self.scales_axes)

    @property
    def array(self) -> ArraySpec:
        """Dtype and shape of the values in a file."""
        return ArraySpec(self.dtype, self.shape)

    @property
    def scales(self) -> ArraySpec | None:
        """Dtype and shape of a quantized parameter's scales in a file."""
        return None if self.scales_shape is None else ArraySpec(BFLOAT16, self.scales_shape)

    @property
    def num_weights(self) -> int:
        """Number of weights of one layer, not counting scales."""
        return math.prod(self.shape)

    @property
    def array_bytes(self) -> int:
        """Bytes of the weights and their scales in a file."""
        return self.array.nbytes + (self.scales.nbytes if self.scales else 0)


@dataclass(frozen=True)
class TensorFile(ParameterSpec):
    """One tensor file of a checkpoint: a parameter of one layer, or outside the layers.

    Attributes:
        index: position among the files.
        layer: number of the decoder layer; None outside the layers.
    """

    index: int
    layer: int | None

    @property
    def file_name(self) -> str:
        """Name of the file, such as `tensor00026_000`."""
        return f"tensor{self.index:05d}_000"

    @property
    def parameter(self) -> str:
        """Path in the release, with the layer's number, such as `transformer/decoder_layer_10/moe/linear/w`."""
        return _path_in_layer(self, self.layer)


def _path_in_layer(spec: ParameterSpec, layer: int | None) -> str:
    return spec.path if layer is None else spec.path.replace(_LAYER, f"{_LAYER}_{layer}", 1)


@functools.lru_cache(maxsize=16)
def parameter_table(config: ModelConfig) -> tuple[ParameterSpec, ...]:
    """Every parameter of a model, in the order of their module paths."""
    vocab, emb, ffn = Axis("vocab", config.vocab_size), Axis("emb", config.emb_size), Axis("ffn", config.ffn_size)
    q_heads = Axis("q_heads", config.q_size, config.key_size)
    kv_heads = Axis("kv_heads", config.kv_size, config.key_size)
    experts = Axis("experts", config.num_experts)
    embedding_std = EMBEDDED_NORM / math.sqrt(config.emb_size) / config.embedding_multiplier_scale
    # A logit is a sum of `emb_size` products with one embedding.
    final_norm = LOGIT_STD / (math.sqrt(config.emb_size) * embedding_std * config.output_multiplier_scale)
    # What a layer adds, twice: all layers together add a vector of unit size to the residual stream.
    added_norm = 1.0 / math.sqrt(2 * config.num_layers)
    rows: tuple[tuple[str, tuple[Axis, ...], Kind, int | None, float], ...] = (
        ("language_model/in_out_embed/embeddings", (vocab, emb), Kind.EMBEDDING, None, embedding_std),
        ("language_model/rms_norm/scale", (emb,), Kind.NORMS, None, final_norm),
        (f"{_LAYER}/moe/linear/w", (experts, emb, ffn), Kind.EXPERTS, 1, 1.0),
        (f"{_LAYER}/moe/linear_1/w", (experts, ffn, emb), Kind.EXPERTS, SCALE_GROUPS, 1.0),
        (f"{_LAYER}/moe/linear_v/w", (experts, emb, ffn), Kind.EXPERTS, 1, 1.0),
        (f"{_LAYER}/multi_head_attention/key/w", (emb, kv_heads), Kind.ATTENTION, 1, 1.0),
        (f"{_LAYER}/multi_head_attention/linear/w", (q_heads, emb), Kind.ATTENTION, SCALE_GROUPS, 1.0),
        (f"{_LAYER}/multi_head_attention/query/w", (emb, q_heads), Kind.ATTENTION, 1, QUERY_GAIN),
        (f"{_LAYER}/multi_head_attention/value/w", (emb, kv_heads), Kind.ATTENTION, 1, 1.0),
        (f"{_LAYER}/rms_norm/scale", (emb,), Kind.NORMS, None, 1.0),
        (f"{_LAYER}/rms_norm_1/scale", (emb,), Kind.NORMS, None, added_norm),
        (f"{_LAYER}/rms_norm_2/scale", (emb,), Kind.NORMS, None, 1.0),
        (f"{_LAYER}/rms_norm_3/scale", (emb,), Kind.NORMS, None, added_norm),
        (f"{_LAYER}/router/w", (emb, experts), Kind.ROUTER, None, ROUTER_GAIN),
    )
    return tuple(
        ParameterSpec(path, axes, kind, groups, path.startswith(_LAYER), gain)
        for path, axes, kind, groups, gain in rows
    )


@functools.lru_cache(maxsize=16)
def tensor_table(config: ModelConfig) -> tuple[TensorFile, ...]:
    """Every file of a checkpoint with this config, in file order: 2 + 12 a layer.

    The order is that of the release, which flattened a dict by sorted module path: layers come as 0, 1, 10,
    11, ...
    """
    files = [
        (spec, layer)
        for spec in parameter_table(config)
        for layer in (range(config.num_layers) if spec.stacked else (None,))
    ]
    files.sort(key=lambda file: _path_in_layer(*file).rpartition("/")[0])
    return tuple(TensorFile(**vars(spec), index=i, layer=layer) for i, (spec, layer) in enumerate(files))


def num_parameters(config: ModelConfig) -> int:
    """Number of weights of a model, not counting scales."""
    return sum(file.num_weights for file in tensor_table(config))


def num_active_parameters(config: ModelConfig) -> int:
    """Number of weights that one token uses: of the experts, only those selected for it."""
    experts = sum(file.num_weights for file in tensor_table(config) if file.kind is Kind.EXPERTS)
    return num_parameters(config) - experts + experts // config.num_experts * config.num_selected_experts
