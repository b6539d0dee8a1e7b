"""`grok1 plan`: estimate memory and speed on given devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from grok1.cli.columns import columns
from grok1.cli.loading import import_jax, start_jax
from grok1.cli.options import is_given, layers_option, mesh_option, output_options
from grok1.cli.param_types import ByteSize, Numbers, complete_directory
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.config import PRESETS, DTypeName, ModelConfig, preset
from grok1.host.sizes import format_bytes
from grok1.jobs.result_json import json_line
from grok1.plan.devices import DEVICE_KINDS

if TYPE_CHECKING:
    from grok1.plan.compiled import CompiledStep
    from grok1.plan.devices import Devices
    from grok1.plan.estimate import Estimate

_PROMPT = 2048  # number of tokens for the prefill speed


@click.command("plan", short_help="Estimate memory and speed on given devices.")
@click.option(
    "--device",
    type=click.Choice(list(DEVICE_KINDS), case_sensitive=False),
    show_default="the devices of this machine, with their free memory",
    help="Device type.",
)
@click.option(
    "--count",
    type=click.IntRange(1, 4096),
    metavar="N",
    show_default="with --device, the fewest that the model fits on; otherwise all",
    help="Number of devices.",
)
@click.option(
    "--hosts",
    type=Numbers(),
    show_default="a single host",
    help="Number of devices on each host, such as 4,6.",
)
@click.option(
    "--memory",
    type=ByteSize(),
    show_default="of the device type; for cpu, of this machine",
    help="Memory per device, or of the whole machine for cpu, such as 80GB.",
)
@click.option(
    "--bandwidth",
    type=ByteSize(),
    show_default="of the device type; for cpu, of 8 channels of DDR4-3200",
    help="Memory bandwidth in bytes per second of each device, or of the whole machine for cpu, such as 3.35TB.",
)
@mesh_option
@click.option(
    "--dtype",
    type=click.Choice(get_args(DTypeName)),
    show_default="float32 for cpu, otherwise bfloat16",
    help="Data type of activations and of the KV cache.",
)
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(list(PRESETS)),
    default="grok-1",
    show_default=True,
    help="Model to plan for.",
)
@layers_option
@click.option(
    "-c",
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIR",
    shell_complete=complete_directory,
    help="Plan for the model in this checkpoint instead of a preset.",
)
@click.option(
    "--compile",
    "compiles",
    is_flag=True,
    help="Also compile the decode and prefill steps, and print the memory use that the compiler reports. With the tpu "
    "or cuda extra of grok1, they are compiled for the actual TPUs (tpu-v5e, tpu-v5p, tpu-v6e) or GPUs (a100, h100, "
    "h800, h200), which need not be present; otherwise for virtual CPU devices.",
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
    """Estimate whether a model fits on given devices, and its maximum speed. No weights are needed.

    Memory is the total size of the arrays on each device. Speeds are upper bounds: a step takes at least the time to
    read its weights and KV cache at the memory bandwidth, or to compute its operations at the peak rate. Communication
    between devices is not included; with --hosts, the amount of data sent between hosts is printed. The tokens of a
    batch are assumed to select experts uniformly.

    If the model does not fit, a second column shows the smallest configuration in which it does. The last line
    summarizes the result.

    \b
    Examples:
      grok1 plan
      grok1 plan --device h100-80gb --count 8
      grok1 plan --device tpu-v5p --count 16 --compile
      grok1 plan --device h100-80gb --hosts 4,6
      grok1 plan --device cpu --memory 512GB --bandwidth 300GB
    """
    if checkpoint is not None and is_given("preset_name"):
        raise click.UsageError("--checkpoint and --preset cannot be used together.")
    if checkpoint is not None and layers is not None:
        raise click.UsageError("--checkpoint and --layers cannot be used together.")
    if hosts is not None and count not in (None, sum(hosts)):
        raise click.UsageError(f"--count is {count}, but the devices of --hosts add up to {sum(hosts)}: omit --count.")
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
    terminal.write(f"{name}: {parameters:,} parameters, {active:,} active per token\n\n{_table(estimates)}\n")
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
    """Return the estimate for the given options, with defaults for those that are None."""
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
    """Compile the steps for a batch of one sequence per data row."""
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
    """Format the compiler's memory use of each step on one device, and compare it with the estimate."""
    expected = estimate.weight_bytes + estimate.cache_bytes

    def difference(step: CompiledStep) -> str:
        return f"{100 * (step.argument_bytes - expected) / expected:+.2f} %"

    def seconds(step: CompiledStep) -> str:
        return "unknown" if step.layer_seconds is None else f"{1e3 * step.layer_seconds:.3g} ms"

    rows: list[tuple[str, Callable[[CompiledStep], str]]] = [
        ("compiled, per device", lambda step: f"{step.name}, {step.sequences} x {step.tokens}"),
        ("target", lambda step: step.device),
        ("estimated weights and cache", lambda step: format_bytes(expected)),
        ("arguments of the step", lambda step: f"{format_bytes(step.argument_bytes)} ({difference(step)})"),
        ("temporaries", lambda step: format_bytes(step.temporary_bytes)),
        ("peak memory", lambda step: format_bytes(step.peak_bytes)),
        ("compile time", lambda step: f"{step.compile_seconds:.1f} s"),
    ]
    if any(step.layer_seconds is not None for step in steps):
        rows.append(("compiler's estimate of a layer", seconds))
    return columns([[label, *(form(step) for step in steps)] for label, form in rows])


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
    """Format a row for each figure and a column for each estimate."""
    config = estimates[0].config
    context, prompt = config.sequence_len, min(_PROMPT, config.sequence_len)
    shared = estimates[0].devices.kind.shares_memory
    each = "" if shared else " per device"

    def speed(value: float | None) -> str:
        return "unknown" if value is None else f"{value:,.3g} tokens/s" if value < 1000 else f"{value:,.0f} tokens/s"

    def largest(estimate: Estimate, length: int) -> str:
        count = estimate.sequences
        return speed(estimate.decode_tokens_per_second(count, length)) if count else "-"

    rows: list[tuple[str, Callable[[Estimate], str]]] = [
        ("devices", lambda e: f"{e.devices.count} x {e.devices.kind.name}"),
        ("mesh (data,model)", lambda e: f"{e.mesh[0]},{e.mesh[1]}"),
        ("data type", lambda e: e.dtype),
        (f"usable memory{each}", lambda e: _bytes(e.devices.usable_bytes)),
        (
            "memory bandwidth, peak compute",
            lambda e: f"{_bytes(e.devices.kind.bandwidth)}/s, {_flops(e.devices.kind.flops)}",
        ),
        ("weights per device", lambda e: _bytes(e.weight_bytes)),
        ("  duplicated across a data row", lambda e: _bytes(e.replicated_bytes)),
        (f"KV cache per device, {context} tokens", lambda e: _bytes(e.cache_bytes)),
        ("workspace per device", lambda e: _bytes(e.workspace_bytes)),
        (f"required memory{' in total' if shared else each}", lambda e: _bytes(e.needed_bytes())),
        (f"sequences of {context} tokens", lambda e: "unknown" if e.sequences is None else f"{e.sequences:,}"),
        ("maximum decode speed, 1 sequence", lambda e: speed(e.decode_tokens_per_second(1, 0))),
        (f"  with {context} tokens", lambda e: speed(e.decode_tokens_per_second(1, context))),
        ("maximum decode speed, all sequences", lambda e: largest(e, 0)),
        (f"  with {context} tokens", lambda e: largest(e, context)),
        (f"maximum prefill speed, {prompt} tokens", lambda e: speed(e.prefill_tokens_per_second(prompt))),
    ]
    if any(estimate.hosts for estimate in estimates):
        rows[3:3] = [
            ("model shards of each data row", _format_rows),
            ("unused devices", lambda e: _format_idle(e.idle)),
            ("sent between hosts per token", lambda e: _bytes(e.crossing_bytes)),
        ]
    return columns([[label, *(form(estimate) for estimate in estimates)] for label, form in rows])


def _format_rows(estimate: Estimate) -> str:
    """Format the number of model shards on each host, for each data row, such as "host 0: 4 + host 1: 4"."""
    rows = [" + ".join(f"host {host}: {row.count(host)}" for host in dict.fromkeys(row)) for row in estimate.rows]
    if len(rows) > 4:
        rows = [*rows[:3], f"... ({len(rows)} rows)"]
    return ", ".join(rows)


def _format_idle(idle: Mapping[int, int]) -> str:
    return ", ".join(f"{count} on host {host}" for host, count in idle.items()) or "none"


def _bytes(count: float | None) -> str:
    return "unknown" if count is None else format_bytes(round(count))


def _flops(rate: float | None) -> str:
    return (
        "unknown" if rate is None else f"{rate / 1e12:,.3g} TFLOP/s" if rate < 1e15 else f"{rate / 1e12:,.0f} TFLOP/s"
    )
