"""Loads a GGUF file and computes the logits after a short prompt, as a program does that was just started.

MODEL THREADS TOKENS [--plain-buffers]
"""

import sys

import llama_cpp

path, threads, count, plain = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["--plain-buffers"]
llama_cpp.llama_backend_init()
silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, None)
model_options = llama_cpp.llama_model_default_params()
model_options.use_extra_bufts = not plain
model = llama_cpp.llama_model_load_from_file(path.encode(), model_options)
context_options = llama_cpp.llama_context_default_params()
context_options.n_ctx = 1024
context_options.n_threads = context_options.n_threads_batch = threads
context = llama_cpp.llama_init_from_model(model, context_options)
tokens = (llama_cpp.llama_token * count)(*range(10, 10 + count))
if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, count)):
    sys.exit("llama.cpp could not decode")
logits = llama_cpp.llama_get_logits_ith(context, -1)
print(max(range(100), key=lambda i: logits[i]))
