"""Loads GGUF files with llama.cpp."""

from typing import Any

import llama_cpp

_silent = llama_cpp.llama_log_callback(lambda *_: None)


def open_model(path: str, threads: int, plain_buffers: bool, **options: int) -> tuple[Any, Any]:
    """Load a model and create a context for it, with llama.cpp's log output suppressed.

    Args:
        path: path of the GGUF file.
        threads: number of CPU threads.
        plain_buffers: whether to disable repacked weights, including AMX's.
        **options: fields of `llama_context_params`.

    Raises:
        SystemExit: if llama.cpp cannot load the model.
    """
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_silent, None)
    model_options = llama_cpp.llama_model_default_params()
    model_options.use_extra_bufts = not plain_buffers
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_options)
    context_options = llama_cpp.llama_context_default_params()
    for name, value in {**options, "n_threads": threads, "n_threads_batch": threads}.items():
        setattr(context_options, name, value)
    context = llama_cpp.llama_init_from_model(model, context_options) if model else None
    if not context:
        raise SystemExit(f"llama.cpp cannot load {path}")
    return model, context
