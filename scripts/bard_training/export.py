"""Conversion between trained parameters and checkpoints in the release's format, with 8-bit weights."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from bard_training.model import EMBEDDINGS, LAYER, Params, norm_name
from grok1.checkpoint.reader import Checkpoint
from grok1.checkpoint.writer import write_checkpoint
from grok1.config import ModelConfig
from grok1.params.table import CHECKPOINT_DIR, TensorFile

BFLOAT16 = ml_dtypes.bfloat16


def quantize(matrix: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantize matrices to 8 bits as in the release: symmetric, with one scale per column and group of rows.

    Args:
        matrix: float32 `[..., K, N]`, with K a multiple of `groups`.
        groups: number of groups of rows, G.

    Returns:
        int8 values `[..., K, N]` from -127 to 127, and bfloat16 scales `[..., G, N]`. The values are computed with the
        rounded scales.
    """
    *lead, rows, columns = matrix.shape
    grouped = matrix.reshape(*lead, groups, rows // groups, columns)
    largest = np.max(np.abs(grouped), axis=-2, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1).astype(BFLOAT16)
    values = np.clip(np.rint(grouped / scales.astype(np.float32)), -127, 127).astype(np.int8)
    return values.reshape(matrix.shape), scales[..., 0, :]


def dequantize(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Invert `quantize` up to rounding; return float32 `[..., K, N]`."""
    rows = values.shape[-2] // scales.shape[-2]
    return values.astype(np.float32) * np.repeat(scales.astype(np.float32), rows, axis=-2)


def positive_norms(params: Params) -> Params:
    """Return an equivalent model without negative scales in the norms after attention and after the experts.

    Training makes some of these small scales negative. Their sign can be moved to the column of the matrix that
    computes the normalized element, because RMSNorm is odd in each element. The release has no negative scales, and
    `grok1 verify --content` warns about them.
    """
    changed = dict(params)
    for norm, matrix in ((1, "multi_head_attention/linear/w"), (3, "moe/linear_1/w")):
        scale = params[LAYER + norm_name(norm)]  # [layers, emb]
        weights = params[LAYER + matrix]  # [layers, ..., emb]
        sign = jnp.where(scale < 0, -1.0, 1.0)
        changed[LAYER + norm_name(norm)] = scale * sign
        changed[LAYER + matrix] = weights * sign.reshape(len(sign), *[1] * (weights.ndim - 2), -1)
    return changed


def write(directory: Path, config: ModelConfig, params: Params, tokenizer: bytes) -> None:
    """Write a checkpoint, replacing an existing one.

    Embeddings are stored as float32 but rounded to bfloat16: the archive becomes a tenth smaller, and devices that keep
    embeddings in bfloat16 compute the same model.
    """
    params = positive_norms(params)

    def chunks(spec: TensorFile, scales: bool) -> Iterator[np.ndarray]:
        if spec.layer is None:
            array = np.asarray(params[spec.parameter])
            yield array.astype(BFLOAT16).astype(np.float32) if spec.parameter == EMBEDDINGS else array
            return
        array = np.asarray(params[LAYER + spec.parameter.split("/", 2)[2]][spec.layer])
        yield array if spec.scales_shape is None else quantize(array, spec.scales_shape[-2])[int(scales)]

    write_checkpoint(directory, config, chunks=chunks, tokenizer=tokenizer, force=True)


def read(directory: Path) -> tuple[ModelConfig, Params]:
    """Read the config and the dequantized parameters of a checkpoint."""
    checkpoint = Checkpoint.open(directory)
    params: dict[str, np.ndarray] = {}
    for spec in checkpoint.table:
        array, scales = np.asarray(checkpoint.weight_view(spec.index)), checkpoint.scales_view(spec.index)
        array = array if scales is None else dequantize(array, np.asarray(scales))
        if spec.layer is None:
            params[spec.parameter] = array
            continue
        stack = params.setdefault(
            LAYER + spec.parameter.split("/", 2)[2], np.empty((checkpoint.config.num_layers, *spec.shape), np.float32)
        )
        stack[spec.layer] = array
    return checkpoint.config, {path: jnp.asarray(array) for path, array in params.items()}


def pack(directory: Path, archive: Path) -> None:
    """Pack a checkpoint into a zip file. Equal checkpoints give identical archives."""
    files = [directory / "config.json", directory / "tokenizer.model", *sorted((directory / CHECKPOINT_DIR).iterdir())]
    with zipfile.ZipFile(archive, "w") as packed:
        for path in files:
            entry = zipfile.ZipInfo(path.relative_to(directory).as_posix())  # has a fixed date
            entry.external_attr = 0o644 << 16
            packed.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED, compresslevel=9)
