"""Random values for every tensor of a checkpoint, the same bytes for the same seed on any machine.

Only raw bits of a bit generator and single float32 operations are used: NumPy guarantees both, unlike its
distributions. The scale of the values makes the model behave like a trained one: activations stay near 1, routers
choose clearly, and the next token is neither certain nor uniform.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from grok1.params.table import BFLOAT16, Kind, TensorFile

NORM_SPREAD = 0.2
"""Norm scales lie within this fraction of their mean, so that a missing or confused norm shows."""

_SQRT_3 = math.sqrt(3.0)  # a uniform variable in +-sqrt(3) has standard deviation 1
_INT8_STD = math.sqrt(127 * 128 / 3)  # of a uniform whole number in -127..127
_SCALE_RMS = math.sqrt(35 / 24)  # of `_scales`'s factor: mean square 7/3 of the mantissa, 5/8 of the exponent
_CHUNK_WORDS = 1 << 17  # 64-bit words drawn at a time: 1 MiB, which stays in the processor's cache


def random_chunks(spec: TensorFile, scales: bool, *, seed: int) -> Iterator[np.ndarray]:
    """Return the data of one array in order, in chunks of a megabyte.

    Args:
        spec: the tensor.
        scales: the quantized weight's scales instead of its values.
        seed: with the tensor's index and `scales`, selects the random stream; 0 or more.

    Yields:
        one-dimensional arrays of float32 `[n]`, int8 `[n]` or, for scales, bfloat16 `[n]`.
    """
    array = spec.scales if scales else spec.array
    if array is None:
        raise ValueError(f"{spec.file_name} has no scales")
    bits = np.random.SFC64(np.random.SeedSequence((seed, spec.index, int(scales))))
    remaining = array.nbytes // array.dtype.itemsize
    per_chunk = _CHUNK_WORDS * 8 // array.dtype.itemsize
    while remaining:
        count = min(remaining, per_chunk)
        words = bits.random_raw(-(-count * array.dtype.itemsize // 8)).astype("<u8", copy=False)
        if scales:
            yield _scales(words.view("<u2")[:count], _std(spec))
        elif spec.scales_shape is not None:
            values = words.view(np.int8)[:count]
            yield np.maximum(values, np.int8(-127), out=values)  # as in the release, -128 does not occur
        elif spec.kind is Kind.NORMS:
            yield _uniform(words.view("<u4")[:count], spec.gain, spec.gain * NORM_SPREAD)
        else:
            yield _uniform(words.view("<u4")[:count], 0.0, _SQRT_3 * _std(spec))
        remaining -= count


def _std(spec: TensorFile) -> float:
    """Standard deviation of a matrix's values: a gain of 1 keeps the size of a vector."""
    return spec.gain if spec.kind is Kind.EMBEDDING else spec.gain / math.sqrt(spec.shape[-2])


def _uniform(words: np.ndarray, mean: float, half_width: float) -> np.ndarray:
    """Uniform float32 values within `half_width` of the mean, of 24 random bits each; `words` is uint32 `[n]`."""
    steps = words.view("<i4") >> 8  # -2^23 up to 2^23, exact in float32
    values = steps.astype(np.float32)
    values *= np.float32(half_width / 2**23)
    values += np.float32(mean)
    return values


def _scales(words: np.ndarray, std: float) -> np.ndarray:
    """Bfloat16 scales for a standard deviation of the represented values; `words` is uint16 `[n]`.

    Each is the nominal scale times a roughly log-uniform factor of 0.5 to 2, so that a scale of another group or column
    changes results.
    """
    mantissa = ((words & 0x7F) | 0x80).astype(np.float32)  # 1 up to 2, times 128
    exponent = ((words >> 7) & 1).astype(np.float32) + np.float32(1)  # 0.5 or 1, times 2
    nominal = np.float32(std / (_INT8_STD * _SCALE_RMS) / 256)
    return (mantissa * exponent * nominal).astype(BFLOAT16)
