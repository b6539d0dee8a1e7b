"""Opening a GGUF file with llama.cpp."""

from typing import Any

import llama_cpp

_silent = llama_cpp.llama_log_callback(lambda *_: None)


def open_model(path: str, threads: int, plain_buffers: bool, **options: int) -> tuple[Any, Any]:
    """A model and a context for it, without llama.cpp's messages.

    Args:
        path: of the file.
        threads: that compute.
        plain_buffers: whether to leave out llama.cpp's own layouts of weights, AMX's too.
        **options: fields of `llama_context_params`.
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
        raise SystemExit(f"llama.cpp cannot run {path}")
    return model, context
