"""Compiled programs kept from one run to the next."""

from __future__ import annotations

import jax
import platformdirs


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder.

    A folder that the user has chosen with `JAX_COMPILATION_CACHE_DIR` or in JAX's config stays, and
    `JAX_ENABLE_COMPILATION_CACHE=false` switches the cache off. If the folder cannot be written, JAX compiles anew.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = platformdirs.user_cache_path("grok1", appauthor=False) / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
