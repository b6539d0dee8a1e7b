"""Reference implementation of the output logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def reference_logits(x: jax.Array, embeddings: jax.Array) -> jax.Array:
    """Return `x @ embeddings.T` in float32.

    Args:
        x: float `[rows, emb]`, of the same dtype as the embeddings.
        embeddings: float `[vocab, emb]`.

    Returns:
        float32 `[rows, vocab]`.
    """
    return jnp.einsum(
        "re,ve->rv",
        x,
        embeddings,
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
