"""Load a GGUF file and compute the logits after a prompt, to measure the time to first token from launch.

Usage: first_token.py MODEL THREADS TOKENS [--plain-buffers]
"""

import sys

import llama_cpp
from session import open_model

path, threads, count, plain = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["--plain-buffers"]
_, context = open_model(path, threads, plain, n_ctx=1024)
tokens = (llama_cpp.llama_token * count)(*range(10, 10 + count))
if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, count)):
    sys.exit("llama.cpp failed to decode the prompt")
logits = llama_cpp.llama_get_logits_ith(context, -1)
print(max(range(100), key=lambda i: logits[i]))
