"""Loads a GGUF file and computes the logits after a prompt of 8 tokens, as a program does that was just started."""

import sys

import llama_cpp

path, threads, plain = sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["--plain-buffers"]
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
tokens = (llama_cpp.llama_token * 8)(*range(10, 18))
if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 8)):
    sys.exit("llama.cpp could not decode")
logits = llama_cpp.llama_get_logits_ith(context, -1)
print(max(range(100), key=lambda i: logits[i]))
