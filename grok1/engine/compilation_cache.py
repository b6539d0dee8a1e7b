"""The persistent cache of compiled programs."""

from __future__ import annotations

import os
from typing import Any

import jax
import platformdirs


def enable_compilation_cache() -> None:
    """Store all compiled programs in the user's cache directory, including those that compile quickly.

    JAX's own settings take precedence, such as `JAX_COMPILATION_CACHE_DIR` or `JAX_ENABLE_COMPILATION_CACHE=false`.
    If the directory is not writable, every run compiles its programs.
    """
    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": str(platformdirs.user_cache_path("grok1", appauthor=False) / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    for name, value in settings.items():
        chosen = name.upper() in os.environ
        if name == "jax_compilation_cache_dir":
            chosen = jax.config.values[name] is not None
        if not chosen:
            jax.config.update(name, value)
