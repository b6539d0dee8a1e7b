"""Benchmark llama.cpp on a GGUF file and print the results as one line of JSON."""

import argparse
import json
import resource
import time

import llama_cpp
import numpy as np
from session import open_model


def main() -> None:
    """Prefill each sequence, then decode all sequences as one batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--prompt", type=int, default=512, help="tokens per prompt")
    parser.add_argument("--batch", type=int, default=1, help="number of sequences")
    parser.add_argument("--decode", type=int, default=32, help="decode steps to measure")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads")
    parser.add_argument("--plain-buffers", action="store_true", help="disable repacked weights, including AMX's")
    options = parser.parse_args()

    model, context = open_model(
        options.model,
        options.threads,
        options.plain_buffers,
        n_ctx=options.batch * (options.prompt + options.decode + 8),
        n_batch=512,
        n_ubatch=512,
        n_seq_max=options.batch,
    )
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)) or 8192
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, vocabulary, (options.batch, options.prompt))
    batch = llama_cpp.llama_batch_init(512, 0, 1)

    def run(tokens: list[tuple[int, int, int]]) -> None:
        """Decode (token, position, sequence) triples as one batch, with logits for the last token of each sequence."""
        batch.n_tokens = len(tokens)
        last = {sequence: i for i, (_, _, sequence) in enumerate(tokens)}
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = last[sequence] == i
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama.cpp failed to decode a batch")

    def prefill_prompts() -> float:
        """Prefill the prompts one by one and return the time at which the first one was complete."""
        first = 0.0
        for sequence, prompt in enumerate(prompts.tolist()):
            for start in range(0, len(prompt), 512):
                run([(token, start + i, sequence) for i, token in enumerate(prompt[start : start + 512])])
            first = first or time.perf_counter()
        return first

    prefill_prompts()
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    start = time.perf_counter()
    first = prefill_prompts() - start
    prefill = time.perf_counter() - start
    for step in range(options.decode + 2):
        if step == 2:
            start = time.perf_counter()
        new = rng.integers(3, vocabulary, options.batch).tolist()
        run([(token, options.prompt + step, sequence) for sequence, token in enumerate(new)])
    decode = time.perf_counter() - start
    found = {
        "prefill_tokens_per_second": options.batch * options.prompt / prefill,
        "decode_tokens_per_second": options.batch * options.decode / decode,
        "time_to_first_token_seconds": first,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
