"""Logits from the last activations and the embedding matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grok1.ops.backend import Backend
from grok1.ops.cpu import kernels as cpu
from grok1.ops.xla.blocked import product_precision

_NATIVE_ROWS = 16  # up to which reading the matrix takes longer than multiplying, where XLA uses one thread


def output_logits(x: jax.Array, embeddings: jax.Array, *, backend: Backend = "xla") -> jax.Array:
    """`x @ embeddings.T`, accumulated in float32.

    Args:
        x: float `[rows, emb]`, in the dtype of the embeddings.
        embeddings: float `[vocab, emb]`.
        backend: what computes it; only that for processors has a kernel, for few rows.

    Returns:
        float32 `[rows, vocab]`.
    """
    if backend == "cpu" and x.shape[0] <= _NATIVE_ROWS:
        return cpu.multiply_transposed(x, embeddings)
    return jnp.einsum(
        "re,ve->rv", x, embeddings, precision=product_precision(x.dtype), preferred_element_type=jnp.float32
    )
