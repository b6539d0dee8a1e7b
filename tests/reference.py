"""Grok-1 in float64 NumPy, written from the published architecture and independent of the package.

`read_config` and `read_arrays` read a checkpoint directory; `logits` is the forward pass. Nothing here is fast.
"""

import json
import pickle
from pathlib import Path

import numpy as np

_EPS = 1e-5
_CAP = 30.0
_LAYER = {
    "moe/linear": "w",
    "moe/linear_1": "w",
    "moe/linear_v": "w",
    "multi_head_attention/key": "w",
    "multi_head_attention/linear": "w",
    "multi_head_attention/query": "w",
    "multi_head_attention/value": "w",
    "rms_norm": "scale",
    "rms_norm_1": "scale",
    "rms_norm_2": "scale",
    "rms_norm_3": "scale",
    "router": "w",
}
_HARMLESS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("ml_dtypes", "bfloat16"),
}


class Quantized:
    """Replacement for the release's class, with `weight` int8 and `scales` bfloat16."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) == ("__main__", "QuantizedWeight8bit"):
            return Quantized
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"unexpected {module}.{name} in a checkpoint")
        return super().find_class(module, name)


def read_config(folder):
    """Return the contents of a checkpoint's `config.json`."""
    return json.loads((Path(folder) / "config.json").read_text())


def read_files(folder):
    """Return the object in each file of a checkpoint, a float32 array or a `Quantized`, by parameter path."""
    modules = {"language_model/in_out_embed": "embeddings", "language_model/rms_norm": "scale"}
    for layer in range(read_config(folder)["num_layers"]):
        for module, name in _LAYER.items():
            modules[f"transformer/decoder_layer_{layer}/{module}"] = name
    found = {}
    for index, module in enumerate(sorted(modules)):
        with (Path(folder) / "ckpt-0" / f"tensor{index:05d}_000").open("rb") as file:
            found[f"{module}/{modules[module]}"] = _Unpickler(file).load()
    return found


def read_arrays(folder):
    """Return all parameters of a checkpoint in float64, by parameter path."""
    return {path: _dequantised(value) for path, value in read_files(folder).items()}


def _dequantised(value):
    if isinstance(value, np.ndarray):
        return value.astype(np.float64)
    return dequantised(value.weight, value.scales)


def dequantised(weight, scales):
    """Return int8 `[..., K, N]` times scales `[..., G, N]`, each for K / G rows, in float64."""
    rows = weight.shape[-2] // scales.shape[-2]
    return weight.astype(np.float64) * np.repeat(scales.astype(np.float64), rows, axis=-2)


def logits(config, arrays, tokens):
    """Return the next-token logits at every position, `[T, vocab]`, and the router's margins `[T]`.

    A margin is the smallest difference, over all layers, between the probabilities of the last selected expert and of
    the next one. If it is tiny, rounding may change the selection.
    """
    embeddings = arrays["language_model/in_out_embed/embeddings"]
    h = embeddings[np.asarray(tokens)] * config["embedding_multiplier_scale"]
    margins = np.full(len(h), np.inf)
    for layer in range(config["num_layers"]):
        prefix = f"transformer/decoder_layer_{layer}/"
        weights = {path[len(prefix) :]: array for path, array in arrays.items() if path.startswith(prefix)}
        h = h + _norm(_attention(config, weights, _norm(h, weights, "")), weights, "_1")
        mixed, margin = _experts(config, weights, _norm(h, weights, "_2"))
        h = h + _norm(mixed, weights, "_3")
        margins = np.minimum(margins, margin)
    h = _rms_norm(h, arrays["language_model/rms_norm/scale"])
    return h @ embeddings.T * config["output_multiplier_scale"], margins


def _norm(x, weights, number):
    return _rms_norm(x, weights[f"rms_norm{number}/scale"])


def _rms_norm(x, scale):
    return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + _EPS)


def _rotate(x):
    """Apply rotary position embedding to `[T, heads, key]`."""
    length, _, size = x.shape
    exponents = np.arange(0, size, 2) / size
    angles = np.outer(np.arange(length), 10000.0**-exponents)
    angles = np.concatenate([angles, angles], axis=1)[:, None]  # [T, 1, key]
    x1, x2 = np.split(x, 2, axis=-1)
    return x * np.cos(angles) + np.concatenate([-x2, x1], axis=-1) * np.sin(angles)


def _attention(config, weights, x):
    length, size = len(x), config["key_size"]

    def heads(name):
        return (x @ weights[f"multi_head_attention/{name}/w"]).reshape(length, -1, size)

    query, key, value = _rotate(heads("query")), _rotate(heads("key")), heads("value")
    per_key_head = config["num_q_heads"] // config["num_kv_heads"]
    out = np.empty_like(query)
    for head in range(config["num_q_heads"]):
        k, v = key[:, head // per_key_head], value[:, head // per_key_head]
        scores = query[:, head] @ k.T * config["attn_output_multiplier"]
        scores = _CAP * np.tanh(scores / _CAP)
        scores[np.triu_indices(length, 1)] = -np.inf
        out[:, head] = _softmax(scores) @ v
    return out.reshape(length, -1) @ weights["multi_head_attention/linear/w"]


def _experts(config, weights, x):
    selected = config["num_selected_experts"]
    probabilities = _softmax(x @ weights["router/w"])
    order = np.argsort(-probabilities, axis=1, kind="stable")
    falling = np.take_along_axis(probabilities, order, axis=1)
    every_one = selected == config["num_experts"]
    margin = np.inf if every_one else falling[:, selected - 1] - falling[:, selected]
    out = np.zeros_like(x)
    for row, probability in enumerate(probabilities):
        for expert in order[row, :selected]:
            gate = _gelu(x[row] @ weights["moe/linear/w"][expert])
            hidden = gate * (x[row] @ weights["moe/linear_v/w"][expert])
            out[row] += probability[expert] * (hidden @ weights["moe/linear_1/w"][expert])
    return out, margin


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _softmax(x):
    x = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return x / np.sum(x, axis=-1, keepdims=True)
