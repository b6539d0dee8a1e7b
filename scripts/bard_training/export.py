"""Writes parameters as a checkpoint in the release's format, with 8-bit weights."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from bard_training.model import EMBEDDINGS, LAYER, Params
from grok1.checkpoint.layout import CHECKPOINT_DIR, TensorSpec
from grok1.checkpoint.reader import Checkpoint
from grok1.checkpoint.writer import write_checkpoint
from grok1.config import ModelConfig

BFLOAT16 = ml_dtypes.bfloat16


def quantize(matrix: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounds matrices to 8 bits as the release does: symmetric, a scale for each column of each group of rows.

    Args:
        matrix: float32 `[..., K, N]`, with K a multiple of `groups`.
        groups: groups of rows, G.

    Returns:
        int8 values `[..., K, N]` from -127 to 127, and bfloat16 scales `[..., G, N]`. Values are rounded by the scales
        as they are stored.
    """
    *lead, rows, columns = matrix.shape
    grouped = matrix.reshape(*lead, groups, rows // groups, columns)
    largest = np.max(np.abs(grouped), axis=-2, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1).astype(BFLOAT16)
    values = np.clip(np.rint(grouped / scales.astype(np.float32)), -127, 127).astype(np.int8)
    return values.reshape(matrix.shape), scales[..., 0, :]


def dequantize(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 matrices that `quantize` stands for."""
    rows = values.shape[-2] // scales.shape[-2]
    return values.astype(np.float32) * np.repeat(scales.astype(np.float32), rows, axis=-2)


def write(directory: Path, config: ModelConfig, params: Params, tokenizer: bytes) -> None:
    """Writes a checkpoint, replacing one that is there.

    Embeddings are rounded to bfloat16 although their files hold float32: the archive of the package gets smaller by a
    tenth, and the model is the same on devices that hold them in bfloat16.
    """

    def chunks(spec: TensorSpec, scales: bool) -> Iterator[np.ndarray]:
        if spec.layer is None:
            array = np.asarray(params[spec.parameter])
            yield array.astype(BFLOAT16).astype(np.float32) if spec.parameter == EMBEDDINGS else array
            return
        array = np.asarray(params[LAYER + spec.parameter.split("/", 2)[2]][spec.layer])
        yield array if spec.scales_shape is None else quantize(array, spec.scales_shape[-2])[int(scales)]

    write_checkpoint(directory, config, chunks=chunks, tokenizer=tokenizer, force=True)


def read(directory: Path) -> tuple[ModelConfig, Params]:
    """Reads a checkpoint's config and its dequantised parameters."""
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
    """Packs a checkpoint into a compressed zip file, always with the same bytes."""
    files = [directory / "config.json", directory / "tokenizer.model", *sorted((directory / CHECKPOINT_DIR).iterdir())]
    with zipfile.ZipFile(archive, "w") as packed:
        for path in files:
            entry = zipfile.ZipInfo(path.relative_to(directory).as_posix())  # of 1980: no time of the clock
            entry.external_attr = 0o644 << 16
            packed.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED, compresslevel=9)
