"""`grok1 plan`: estimates memory and speed on given devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from grok1.cli.columns import columns
from grok1.cli.loading import import_jax, start_jax
from grok1.cli.options import ByteSize, Numbers, is_given, layers_option, mesh_option, output_options
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.config import PRESETS, DTypeName, ModelConfig, preset
from grok1.host.sizes import format_bytes
from grok1.jobs.result_json import json_line
from grok1.plan.devices import DEVICE_KINDS

if TYPE_CHECKING:
    from grok1.plan.compiled import CompiledStep
    from grok1.plan.devices import Devices
    from grok1.plan.estimate import Estimate

_PROMPT = 2048  # tokens, for the speed of prefill


@click.command("plan", short_help="Tell what fits on which devices, and how fast it could be.")
@click.option(
    "--device",
    type=click.Choice(list(DEVICE_KINDS), case_sensitive=False),
    help="Plan for this kind of device.  [default: the devices of this machine, with the memory that is free on them]",
)
@click.option(
    "--count",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="How many devices.  [default: the fewest that the model fits on; of this machine's, all]",
)
@click.option(
    "--hosts",
    type=Numbers(),
    help="The devices are on several hosts, with so many on each, such as 4,6.  [default: all are on one]",
)
@click.option(
    "--memory",
    type=ByteSize(),
    help="Memory of each device, or of the machine for cpu, such as 80GB.  [default: what the kind has; for cpu, what "
    "this machine has]",
)
@click.option(
    "--bandwidth",
    type=ByteSize(),
    help="Bytes a second that each device can read from its memory, or the machine for cpu, such as 3.35TB.  [default: "
    "what the kind has; for cpu, that of a server with 8 channels of DDR4-3200]",
)
@mesh_option
@click.option(
    "--dtype",
    type=click.Choice(get_args(DTypeName)),
    help="The type of activations and of the key/value cache.  [default: float32 for cpu, otherwise bfloat16]",
)
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(list(PRESETS)),
    default="grok-1",
    show_default=True,
    help="Plan for this model.",
)
@layers_option
@click.option(
    "-c",
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Plan for the model of this checkpoint, instead of a preset.",
)
@click.option(
    "--compile",
    "compiles",
    is_flag=True,
    help="Also compile the model's decode and prefill steps, for virtual devices of the processor or, where the "
    "tpu or cuda extra is installed, for the true slice of tpu-v5e, tpu-v5p or tpu-v6e or the true a100, h100, h800 or "
    "h200, none of which need be there; tell the compiler's own figures of memory. It takes seconds and no weights.",
)
@output_options
@pass_terminal
def command(
    terminal: Terminal,
    device: str | None,
    count: int | None,
    hosts: tuple[int, ...] | None,
    memory: int | None,
    bandwidth: int | None,
    mesh: tuple[int, int] | None,
    dtype: str | None,
    preset_name: str,
    layers: int | None,
    checkpoint: Path | None,
    compiles: bool,
    as_json: bool,
) -> None:
    """Tell whether a model fits on some devices, and how fast it could be there at best. No weights are needed.

    Each device's bytes are those of the arrays that it would hold. The speeds are bounds: the bytes that a step must
    read over the bandwidth of memory, or its operations over the peak rate, whichever takes longer, and nothing for the
    exchange between devices. With --hosts it is told what crosses between them instead. A batch is taken to choose its
    experts evenly. If the model does not fit, a second column
    shows the smallest change with which it does; the last line says in words what fits.

    \b
    grok1 plan
    grok1 plan --device h100-80gb --count 8
    grok1 plan --device tpu-v5p --count 16 --compile
    grok1 plan --device h100-80gb --hosts 4,6
    grok1 plan --device cpu --memory 512GB --bandwidth 300GB
    """
    if checkpoint is not None and is_given("preset_name"):
        raise click.UsageError("--checkpoint and --preset are both given: give one of them.")
    if checkpoint is not None and layers is not None:
        raise click.UsageError("--checkpoint and --layers are both given: a checkpoint has its own layers.")
    if hosts is not None and count not in (None, sum(hosts)):
        raise click.UsageError(f"--count {count} contradicts --hosts, which have {sum(hosts)} devices: leave it out.")
    if hosts is not None:
        count = sum(hosts)
    if checkpoint is None:
        name, config = preset_name, preset(preset_name, layers)
    else:
        from grok1.checkpoint.reader import find_checkpoint, stated_or_release

        name, config = str(checkpoint), stated_or_release(find_checkpoint(checkpoint))[0]
    import_jax(terminal)
    devices = _devices(terminal, device, count, memory, bandwidth)
    terminal.clear()

    from grok1.params.table import num_active_parameters, num_parameters
    from grok1.plan.estimate import next_fit
    from grok1.plan.verdict import verdict

    estimate = _estimate(config, devices, mesh, dtype, hosts, choose_count=bool(device) and count is None)
    other = next_fit(estimate) if estimate.fits is False else None
    estimates = [estimate] if other is None else [estimate, other]
    steps = _compile(terminal, estimate) if compiles else None
    parameters, active = num_parameters(config), num_active_parameters(config)
    if as_json:
        fields: dict[str, Any] = {
            "model": name,
            "parameters": parameters,
            "active_parameters": active,
            "context": config.sequence_len,
            **_fields(estimate),
            "alternative": _fields(other) if other else None,
            "compiled": None if steps is None else [dataclasses.asdict(step) for step in steps],
            "verdict": verdict(estimate),
        }
        terminal.write(json_line(fields))
        return
    terminal.write(f"{name}: {parameters:,} parameters, of which a token uses {active:,}\n\n{_table(estimates)}\n")
    if steps:
        terminal.write(f"{_compiled_table(estimate, steps)}\n")
    terminal.write(f"{verdict(estimate)}\n")


def _devices(
    terminal: Terminal, device: str | None, count: int | None, memory: int | None, bandwidth: int | None
) -> Devices:
    from grok1.plan.devices import named_devices, present_devices

    if device is not None:
        devices = named_devices(device, count or 1, memory)
    else:
        devices = present_devices(start_jax(terminal))
        devices = dataclasses.replace(
            devices, count=count or devices.count, usable_bytes=memory or devices.usable_bytes
        )
    if bandwidth is not None:
        devices = dataclasses.replace(devices, kind=dataclasses.replace(devices.kind, bandwidth=float(bandwidth)))
    return devices


def _estimate(
    config: ModelConfig,
    devices: Devices,
    mesh: tuple[int, int] | None,
    dtype: str | None,
    hosts: tuple[int, ...] | None,
    *,
    choose_count: bool,
) -> Estimate:
    """The estimate for the given choices; the others are made here."""
    from grok1.params.sharding import check_mesh_shape, default_mesh_shape
    from grok1.plan.estimate import Estimate, smallest_fit

    dtype = dtype or devices.kind.dtype
    if choose_count:
        if mesh is None:
            return smallest_fit(config, devices, dtype)
        devices = dataclasses.replace(devices, count=mesh[0] * mesh[1])
    if mesh is None:
        mesh = default_mesh_shape(
            config, devices.count, hosts, lambda shards: Estimate(config, devices, (1, shards), dtype).fits
        )
    check_mesh_shape(config, mesh, devices.count)
    return Estimate(config, devices, mesh, dtype, hosts)


def _compile(terminal: Terminal, estimate: Estimate) -> list[CompiledStep]:
    """Compiles the steps of a plan for a batch of one sequence on each data row."""
    import numpy as np

    from grok1.plan.compiled import (
        GPUS,
        TOPOLOGIES,
        compile_steps,
        gpu_compiler_is_installed,
        gpu_mesh,
        topology_mesh,
        virtual_cpu_mesh,
    )

    kind = estimate.devices.kind.name.removeprefix("tpu-")
    with terminal.interruptible():
        if kind in TOPOLOGIES:
            mesh = topology_mesh(kind, estimate.config, estimate.mesh)
        elif kind in GPUS and gpu_compiler_is_installed():
            mesh = gpu_mesh(kind, estimate.config, estimate.mesh)
        else:
            mesh = virtual_cpu_mesh(estimate.config, estimate.mesh)
        steps = list(
            compile_steps(
                estimate.config,
                mesh,
                np.dtype(estimate.dtype),
                slots=estimate.mesh[0],
                prefill_tokens=min(_PROMPT, estimate.config.sequence_len),
                progress=lambda name: terminal.show_status(f"compiling the {name} step"),
            )
        )
    terminal.clear()
    return steps


def _compiled_table(estimate: Estimate, steps: list[CompiledStep]) -> str:
    """The compiler's figures of each step on one device, beside the estimate."""
    expected = estimate.weight_bytes + estimate.cache_bytes

    def difference(step: CompiledStep) -> str:
        return f"{100 * (step.argument_bytes - expected) / expected:+.2f} %"

    def seconds(step: CompiledStep) -> str:
        return "not told" if step.layer_seconds is None else f"{1e3 * step.layer_seconds:.3g} ms"

    rows: list[tuple[str, Callable[[CompiledStep], str]]] = [
        ("compiled, each device", lambda step: f"{step.name}, {step.sequences} x {step.tokens}"),
        ("for", lambda step: step.device),
        ("weights and cache, estimated", lambda step: format_bytes(expected)),
        ("arguments of the step", lambda step: f"{format_bytes(step.argument_bytes)} ({difference(step)})"),
        ("temporaries", lambda step: format_bytes(step.temporary_bytes)),
        ("most at a time", lambda step: format_bytes(step.peak_bytes)),
        ("time to compile", lambda step: f"{step.compile_seconds:.1f} s"),
    ]
    if any(step.layer_seconds is not None for step in steps):
        rows.append(("a layer and the rest, by its estimate", seconds))
    return columns([[label, *(tell(step) for step in steps)] for label, tell in rows])


def _fields(estimate: Estimate) -> dict[str, Any]:
    context, most = estimate.config.sequence_len, estimate.sequences
    batch = most or 1
    return {
        "device": estimate.devices.kind.name,
        "count": estimate.devices.count,
        "memory_bytes": estimate.devices.kind.memory_bytes,
        "usable_bytes": estimate.devices.usable_bytes,
        "bandwidth_bytes_per_second": estimate.devices.kind.bandwidth,
        "flops_per_second": estimate.devices.kind.flops,
        "mesh": list(estimate.mesh),
        "hosts": list(estimate.hosts or (estimate.devices.count,)),
        "host_of_shards": estimate.rows,
        "idle_devices": estimate.devices.count - estimate.mesh[0] * estimate.mesh[1],
        "crossing_bytes_per_token": estimate.crossing_bytes,
        "replicated_weight_bytes": estimate.replicated_bytes,
        "dtype": estimate.dtype,
        "weight_bytes": estimate.weight_bytes,
        "cache_bytes_per_sequence": estimate.cache_bytes,
        "workspace_bytes": estimate.workspace_bytes,
        "needed_bytes": estimate.needed_bytes(),
        "fits": estimate.fits,
        "sequences": most,
        "decode_tokens_per_second": estimate.decode_tokens_per_second(1, 0),
        "decode_tokens_per_second_full_context": estimate.decode_tokens_per_second(1, context),
        "largest_batch": batch,
        "largest_batch_tokens_per_second": estimate.decode_tokens_per_second(batch, 0),
        "largest_batch_tokens_per_second_full_context": estimate.decode_tokens_per_second(batch, context),
        "prefill_tokens": min(_PROMPT, context),
        "prefill_tokens_per_second": estimate.prefill_tokens_per_second(min(_PROMPT, context)),
    }


def _table(estimates: list[Estimate]) -> str:
    """A row for each figure and a column for each estimate."""
    config = estimates[0].config
    context, prompt = config.sequence_len, min(_PROMPT, config.sequence_len)
    shared = estimates[0].devices.kind.shares_memory
    each = "" if shared else " of each"

    def speed(value: float | None) -> str:
        return "not known" if value is None else f"{value:,.3g} tokens/s" if value < 1000 else f"{value:,.0f} tokens/s"

    def largest(estimate: Estimate, length: int) -> str:
        count = estimate.sequences
        return speed(estimate.decode_tokens_per_second(count, length)) if count else "-"

    rows: list[tuple[str, Callable[[Estimate], str]]] = [
        ("devices", lambda e: f"{e.devices.count} x {e.devices.kind.name}"),
        ("mesh (data,model), activations", lambda e: f"{e.mesh[0]},{e.mesh[1]} {e.dtype}"),
        (f"memory{each} that can be used", lambda e: _bytes(e.devices.usable_bytes)),
        (
            "bandwidth, peak arithmetic",
            lambda e: f"{_bytes(e.devices.kind.bandwidth)}/s, {_flops(e.devices.kind.flops)}",
        ),
        ("weights on each device", lambda e: _bytes(e.weight_bytes)),
        ("  of a row's, held more than once", lambda e: _bytes(e.replicated_bytes)),
        (f"cache of {context} tokens on each", lambda e: _bytes(e.cache_bytes)),
        ("workspace on each", lambda e: _bytes(e.workspace_bytes)),
        (f"needed{' on each' if not shared else ' in all'}", lambda e: _bytes(e.needed_bytes())),
        (f"sequences of {context} tokens", lambda e: "not known" if e.sequences is None else f"{e.sequences:,}"),
        ("decode, 1 sequence, at most", lambda e: speed(e.decode_tokens_per_second(1, 0))),
        (f"  at {context} tokens", lambda e: speed(e.decode_tokens_per_second(1, context))),
        ("decode, all of them, at most", lambda e: largest(e, 0)),
        (f"  at {context} tokens", lambda e: largest(e, context)),
        (f"prefill, {prompt} tokens, at most", lambda e: speed(e.prefill_tokens_per_second(prompt))),
    ]
    if any(estimate.hosts for estimate in estimates):
        rows[2:2] = [
            ("hosts of each data row", _told_rows),
            ("idle", lambda e: _told_idle(e.idle)),
            ("leaves a host for each token", lambda e: _bytes(e.crossing_bytes)),
        ]
    return columns([[label, *(tell(estimate) for estimate in estimates)] for label, tell in rows])


def _told_rows(estimate: Estimate) -> str:
    """How many model shards each host has of each data row, such as "0: 8" or "0: 4 + 1: 4"; alike rows once."""
    told = [" + ".join(f"host {host}: {row.count(host)}" for host in dict.fromkeys(row)) for row in estimate.rows]
    if len(told) > 4:
        told = [*told[:3], f"... of {len(told)} rows"]
    return ", ".join(told)


def _told_idle(idle: Mapping[int, int]) -> str:
    return ", ".join(f"{count} on host {host}" for host, count in idle.items()) or "none"


def _bytes(count: float | None) -> str:
    return "not known" if count is None else format_bytes(round(count))


def _flops(rate: float | None) -> str:
    return (
        "not known" if rate is None else f"{rate / 1e12:,.3g} TFLOP/s" if rate < 1e15 else f"{rate / 1e12:,.0f} TFLOP/s"
    )
