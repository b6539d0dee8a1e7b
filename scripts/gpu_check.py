#!/usr/bin/env python3
"""Check the model's operations on an accelerator against float32 references and measure their efficiency.

Writes the results as Markdown tables and as JSON. Takes a few minutes on one 80 GB GPU. Needs no network and no
checkpoint: random weights are generated on the device.
"""

import argparse
import dataclasses
import functools
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import grok1
from grok1.config import ModelConfig, preset
from grok1.diagnose.bench import device_copy_rate, estimate_of, matrix_rate
from grok1.engine.chunks import PrefillChunk
from grok1.host.atomic_write import atomic_write
from grok1.model import Model, random_model
from grok1.ops.attention import reference_attention
from grok1.ops.kernels import kernels_in_use
from grok1.ops.matmul import reference_matmul
from grok1.ops.xla.kernels import XLA, Kernels
from grok1.params.weights import QuantizedMatrix
from grok1.request import SamplingOptions

BFLOAT16_ERROR = 0.02  # relative to the largest expected value


@dataclasses.dataclass(frozen=True)
class Limits:
    """Measured limits of the device: copy bandwidth (bytes read and written per second) and bfloat16 FLOP/s."""

    copy: float
    matrix: float


def seconds(work: Callable[[], jax.Array], runs: int = 20) -> float:
    """Return the median time of a jitted function in seconds, called four times in a row to hide host overhead."""
    jax.block_until_ready(work())
    found = []
    for _ in range(max(1, runs // 4)):
        start = time.perf_counter()
        for _ in range(4):
            result = work()
        jax.block_until_ready(result)
        found.append((time.perf_counter() - start) / 4)
    return statistics.median(found)


class Report:
    """Collected measurements and their Markdown report."""

    def __init__(self, facts: dict):
        self.data = {**facts, "operations": [], "decode": [], "prefill": [], "failures": []}

    def add(self, kind: str, **fields) -> None:
        """Add a measurement and print it."""
        self.data[kind].append(fields)
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())
        print(f"{kind}: {shown}", file=sys.stderr, flush=True)

    def markdown(self) -> str:
        """Return the report as Markdown."""
        facts = {key: value for key, value in self.data.items() if not isinstance(value, list)}
        text = ["# Accelerator check", "", *_table(["fact", ""], [[k, v] for k, v in facts.items()])]
        for kind in ("operations", "decode", "prefill"):
            rows = self.data[kind]
            if rows:
                text += [
                    "",
                    f"## {kind.capitalize()}",
                    "",
                    *_table(list(rows[0]), [list(row.values()) for row in rows]),
                ]
        if self.data["failures"]:
            text += ["", "## Failures", "", *(f"- {failure}" for failure in self.data["failures"])]
        return "\n".join(text) + "\n"


def _table(head: list, rows: list[list]) -> list[str]:
    def cell(value) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell(value) for value in line) + " |" for line in lines]


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_stack(key: jax.Array, shape: tuple[int, ...], groups: int) -> QuantizedMatrix:
    """Return a stack of random int8 matrices, scaled to preserve the variance of activations."""
    weight = jax.random.randint(key, shape, -127, 128, jnp.int8)
    scales = jnp.full((*shape[:-2], groups, shape[-1]), 1 / 73 / shape[-2] ** 0.5, jnp.bfloat16)
    return QuantizedMatrix(weight, scales)


def check_operations(report: Report, config: ModelConfig, native: Kernels, rows: list[int], limits: Limits) -> None:
    """Check and measure each operation of one layer with the native kernels and with XLA."""
    tried = (XLA,) if native.packs_weights else tuple(dict.fromkeys((native, XLA)))
    check_products(report, config, tried, rows, limits)
    check_experts(report, config, tried, rows, limits)
    check_attention(report, config, tried, limits)


def check_products(
    report: Report, config: ModelConfig, tried: tuple[Kernels, ...], counts: list[int], limits: Limits
) -> None:
    """Check the product of activations and the query matrix."""
    weight = random_stack(jax.random.key(0), (1, config.emb_size, config.q_size), 1)
    amount = config.emb_size * config.q_size
    for rows in counts:
        x = jax.random.normal(jax.random.key(rows), (rows, config.emb_size)).astype(jnp.bfloat16)
        expected = jax.jit(reference_matmul)(x, weight, (jnp.int32(0),))
        for kernels in tried:
            work = functools.partial(jax.jit(kernels.matmul), x, weight, (jnp.int32(0),))
            compare(report, "matrix product", rows, kernels, amount, 2 * rows * amount, limits, expected, work)


def check_experts(
    report: Report, config: ModelConfig, tried: tuple[Kernels, ...], counts: list[int], limits: Limits
) -> None:
    """Check the experts on rows whose experts are drawn uniformly."""
    emb, ffn, experts = config.emb_size, config.ffn_size, config.num_experts
    shapes = ((emb, ffn, 1), (emb, ffn, 1), (ffn, emb, 8))
    stacks = [
        random_stack(key, (1, experts, inner, columns), groups)
        for key, (inner, columns, groups) in zip(jax.random.split(jax.random.key(1), 3), shapes, strict=True)
    ]
    for rows in counts:
        x = jax.random.normal(jax.random.key(rows), (rows, emb)).astype(jnp.bfloat16)
        chosen = np.argsort(np.random.default_rng(rows).random((rows, experts)), axis=1)
        sent = jnp.asarray(chosen[:, : config.num_selected_experts], jnp.int32)
        factors = jnp.full(sent.shape, 0.5, jnp.float32)
        expected = jax.jit(by_rows)(x, *stacks, sent, factors)
        amount = len(np.unique(np.asarray(sent))) * 3 * emb * ffn
        flops = 2 * sent.size * 3 * emb * ffn
        for kernels in tried:
            work = functools.partial(jax.jit(kernels.gated_experts), x, *stacks, jnp.int32(0), sent, factors)
            compare(report, "experts", rows, kernels, amount, flops, limits, expected, work)


def check_attention(report: Report, config: ModelConfig, tried: tuple[Kernels, ...], limits: Limits) -> None:
    """Check attention of the last queries of a full context."""
    heads, kv_heads, size, max_seq_len = config.num_q_heads, config.num_kv_heads, config.key_size, config.sequence_len
    options = {"multiplier": config.attn_output_multiplier, "cap": config.attn_logit_cap}
    exact = jax.jit(reference_attention, static_argnames=("multiplier", "cap"))
    for batch, seq in ((1, 1), (8, 1), (1, min(512, max_seq_len))):
        shape = (1, batch, kv_heads, max_seq_len, size)
        keys, values = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(seq)))
        query = jax.random.normal(jax.random.key(batch), (batch, seq, heads, size), jnp.float32)
        positions = jnp.broadcast_to(jnp.arange(max_seq_len - seq, max_seq_len, dtype=jnp.int32), (batch, seq))
        expected = exact(query, keys, values, 0, positions, **options)
        amount, flops = 2 * keys.nbytes, 4 * batch * seq * heads * size * max_seq_len
        for kernels in tried:
            attend = jax.jit(kernels.attention, static_argnames=("multiplier", "cap"))
            work = functools.partial(attend, query, keys, values, 0, positions, **options)
            compare(report, f"attention of {seq}", batch, kernels, amount, flops, limits, expected, work)


def by_rows(
    x: jax.Array,
    gate: QuantizedMatrix,
    value: QuantizedMatrix,
    project: QuantizedMatrix,
    sent: jax.Array,
    factors: jax.Array,
) -> jax.Array:
    """Compute the experts in float32, one expert at a time to limit the memory for dequantized matrices."""

    def matrix(stack: QuantizedMatrix, expert: jax.Array) -> jax.Array:
        return stack[0, expert].dequantize()

    def add(expert: jax.Array, total: jax.Array) -> jax.Array:
        share = jnp.sum(jnp.where(sent == expert, factors, 0), axis=1)[:, None]
        inputs = x.astype(jnp.float32)
        gates = jax.nn.gelu(jnp.dot(inputs, matrix(gate, expert), precision="highest"), approximate=True)
        hidden = gates * jnp.dot(inputs, matrix(value, expert), precision="highest")
        return total + share * jnp.dot(hidden, matrix(project, expert), precision="highest")

    return jax.lax.fori_loop(0, gate.shape[1], add, jnp.zeros((x.shape[0], project.shape[-1])))


def compare(
    report: Report,
    operation: str,
    rows: int,
    kernels: Kernels,
    read_bytes: int,
    flops: int,
    limits: Limits,
    expected: jax.Array,
    work: Callable[[], jax.Array],
) -> None:
    """Run an operation, compare its result with the expected one, and measure its time."""
    try:
        error = float(jnp.max(jnp.abs(work() - expected)) / jnp.max(jnp.abs(expected)))
        took = seconds(work)
    except Exception as failure:  # compilers and devices raise many types
        reason = (str(failure).splitlines() or [type(failure).__name__])[0][:300]
        report.data["failures"].append(f"{operation} of {rows} by {kernels.backend}: {reason}")
        return
    if not error <= BFLOAT16_ERROR:
        report.data["failures"].append(
            f"{operation} of {rows} by {kernels.backend} has a relative error of {error:.3g}, "
            f"expected at most {BFLOAT16_ERROR}"
        )
    report.add(
        "operations",
        operation=operation,
        rows=rows,
        kernels=kernels.backend,
        error=error,
        microseconds=1e6 * took,
        share_of_copy=read_bytes / took / limits.copy,
        share_of_matrix_rate=flops / took / limits.matrix,
    )


def decode_seconds(model: Model, batch: int, context: int, steps: int) -> float:
    """Return the time of a decode step in seconds, with random tokens at the end of the context."""
    engine = model.engine
    state = engine.new_batch(batch)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, batch).astype(np.int32)
    positions = np.full(batch, context - steps - 3, np.int32)
    placed = [jax.device_put(array, state.tokens.sharding) for array in (tokens, positions)]
    state = dataclasses.replace(state, tokens=placed[0], positions=placed[1])
    active = np.ones(batch, bool)
    for _ in range(2):
        state, sampled = engine.decode(state, active)
    jax.block_until_ready(sampled)
    start = time.perf_counter()
    before = None
    for _ in range(steps):
        state, sampled = engine.decode(state, active)
        jax.block_until_ready(before)  # one step ahead, as the scheduler does
        before = sampled.tokens
    jax.block_until_ready(before)
    return (time.perf_counter() - start) / steps


def prefill_seconds(model: Model, length: int) -> float:
    """Return the time to prefill one prompt in seconds, excluding compilation."""
    engine = model.engine
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, length).astype(np.int32)
    state, found = engine.new_batch(engine.data_rows), []
    for _ in range(3):
        start = time.perf_counter()
        for first in range(0, length, engine.max_chunk):
            chunk = tokens[first : first + engine.max_chunk]
            sampling = (SamplingOptions(ignore_eos=True), 0) if first + len(chunk) == length else None
            state, sampled, _ = engine.prefill(state, [PrefillChunk(0, chunk, first, sampling)])
        jax.block_until_ready(sampled)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def measure_model(
    report: Report, config: ModelConfig, kernels: str, arguments: argparse.Namespace, limits: Limits
) -> None:
    """Measure decode time per layer, as the difference of two models with different depths, and prefill time."""
    fewer = max(1, config.num_layers // 2)
    more = config.num_layers if config.num_layers > fewer else fewer + 1
    steps: dict[int, dict[tuple[int, int], float]] = {}
    for layers in (fewer, more):
        model = random_model(dataclasses.replace(config, num_layers=layers), mesh=(1, 1), kernels=kernels)
        steps[layers] = {}
        for batch in arguments.batch:
            for context in arguments.context:
                if model.max_sequences is None or batch <= model.max_sequences:
                    steps[layers][batch, context] = decode_seconds(model, batch, context, arguments.steps)
        if layers == more:
            for length in arguments.prefill:
                took = prefill_seconds(model, length)
                flops = estimate_of(model).operations(length, length / 2)
                report.add(
                    "prefill",
                    kernels=model.kernels,
                    layers=layers,
                    tokens=length,
                    seconds=took,
                    tokens_per_second=length / took,
                    share_of_matrix_rate=flops / took / limits.matrix,
                )
        bytes_of = estimate_of(model).decode_read_bytes
        if layers == fewer:
            read_fewer = {case: bytes_of(*case) for case in steps[layers]}
            del model, bytes_of
            gc.collect()  # frees the weights: the engine and its programs form a reference cycle
            continue
        for case, took in steps[more].items():
            if case not in steps[fewer]:
                continue
            a_layer = (took - steps[fewer][case]) / (more - fewer)
            read = (bytes_of(*case) - read_fewer[case]) / (more - fewer)
            report.add(
                "decode",
                kernels=model.kernels,
                layers=layers,
                batch=case[0],
                context=case[1],
                step_milliseconds=1e3 * took,
                layer_microseconds=1e6 * a_layer,
                megabytes_of_a_layer=read / 1e6,
                share_of_copy=read / a_layer / limits.copy if a_layer > 0 else None,
            )
        del model, bytes_of
        gc.collect()


def launch_seconds(config: ModelConfig, kernels: str) -> float:
    """Return the time of a decode step of a model with tiny matrices in seconds: the cost of launching its kernels."""
    small = dataclasses.replace(
        config, emb_size=128, key_size=16, num_q_heads=8, num_kv_heads=8, widening_factor=6, vocab_size=1024
    )
    model = random_model(small, mesh=(1, 1), kernels=kernels, dtype="bfloat16")
    return decode_seconds(model, 1, min(128, small.sequence_len), 20)


def numbers(text: str) -> list[int]:
    """Parse integers separated by commas."""
    return [int(part) for part in text.split(",")]


def main() -> int:
    """Run all checks and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", default="grok-1-slice", help="preset with the widths to measure (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, help="number of layers (default: as many as fit, at most 20)")
    parser.add_argument(
        "--rows", type=numbers, default=[1, 2, 8, 16, 32, 128, 1024], metavar="N,...", help="rows of activations"
    )
    parser.add_argument(
        "--batch", type=numbers, default=[1, 2, 4, 8, 16, 32], metavar="N,...", help="decode batch sizes"
    )
    parser.add_argument(
        "--context", type=numbers, default=[128, 2048, 8192], metavar="N,...", help="decode context lengths"
    )
    parser.add_argument("--prefill", type=numbers, default=[512, 2048, 8192], metavar="N,...", help="prompt lengths")
    parser.add_argument("--steps", type=int, default=20, help="decode steps per measurement (default: %(default)s)")
    parser.add_argument(
        "--kernels", default="native,xla", help="kernel implementations to measure (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="output directory (default: %(default)s)")
    arguments = parser.parse_args()
    config = preset(arguments.preset, arguments.layers)
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if arguments.layers is None and limit is not None:
        layer = 3 * config.num_experts * config.emb_size * config.ffn_size + 2 * config.emb_size * config.q_size
        cache = 4 * config.kv_size * config.sequence_len * 8  # for 8 sequences
        most = int((0.85 * limit - 4 * config.vocab_size * config.emb_size) / (layer + cache))
        config = dataclasses.replace(config, num_layers=max(2, min(20, most)))
    too_long = [n for n in (*arguments.context, *arguments.prefill) if n > config.sequence_len]
    if too_long:
        parser.error(f"{too_long[0]} tokens exceed the context length of {config.sequence_len}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = kernels_in_use(device)
    limits = Limits(device_copy_rate(device), matrix_rate(device, np.dtype(jnp.bfloat16)))
    report = Report(
        {
            "device": device.device_kind,
            "platform": device.platform,
            "grok1": grok1.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "model": f"{arguments.preset}, {config.num_layers} layers",
            "kernels": chosen.name + (f" ({chosen.fallback})" if chosen.fallback else ""),
            "copy_gigabytes_per_second": limits.copy / 1e9,
            "bfloat16_tera_operations_per_second": limits.matrix / 1e12,
        }
    )
    check_operations(report, config, chosen.kernels, arguments.rows, limits)
    for kernels in arguments.kernels.split(","):
        try:
            report.data[f"launch_milliseconds_{kernels}"] = 1e3 * launch_seconds(config, kernels)
            measure_model(report, config, kernels, arguments, limits)
        except grok1.Grok1Error as error:
            report.data["failures"].append(f"{kernels}: {error}")
        write(report, arguments.out)
    print(report.markdown())
    return 1 if report.data["failures"] else 0


def write(report: Report, folder: Path) -> None:
    """Write the results so far."""
    for name, text in (
        ("gpu-check.md", report.markdown()),
        ("gpu-check.json", json.dumps(report.data, indent=1) + "\n"),
    ):
        with atomic_write(folder / name, "w") as file:
            file.write(text)


if __name__ == "__main__":
    sys.exit(main())
