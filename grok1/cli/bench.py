"""`grok1 bench`: measure the speed of a model on the devices of this machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grok1.cli.columns import columns
from grok1.cli.loading import ModelChoice, load_model, open_model, start_jax
from grok1.cli.options import is_given, layers_option, model_options, output_options
from grok1.cli.param_types import Numbers
from grok1.cli.terminal import OutputError, Terminal, pass_terminal
from grok1.config import PRESETS, VERSION, ModelConfig, default_dtype, preset
from grok1.host.atomic_write import atomic_write
from grok1.host.sizes import format_bytes
from grok1.jobs.result_json import json_line

if TYPE_CHECKING:
    from grok1.checkpoint.reader import Checkpoint
    from grok1.diagnose.bench import Limits, Measurement
    from grok1.model import Model

_PROMPT = 512  # default number of tokens

# Parameters that have no effect with --devices.
_MEASUREMENT_PARAMETERS = (
    *("checkpoint", "tokenizer", "mesh", "dtype", "load_memory"),
    *("preset_name", "layers", "prompt", "batch", "decode", "plot"),
)


def _plot_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is None:
        return None
    if value.suffix.lower() not in (".png", ".svg"):
        raise click.BadParameter(f'expected a name that ends in .png or .svg, got "{value}".')
    if not value.parent.is_dir():
        raise click.BadParameter(f'directory "{value.parent}" does not exist.')
    return value


@click.command("bench", short_help="Measure the prefill and decode speed of a model.")
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(list(PRESETS)),
    help="Measure a model with random weights, created in memory, instead of a checkpoint.",
)
@layers_option
@click.option(
    "--prompt",
    type=Numbers(),
    show_default=f"{_PROMPT}, or less if the context is shorter",
    help="Prompt lengths in tokens.",
)
@click.option(
    "--batch",
    type=Numbers(),
    default="1",
    show_default=True,
    help="Batch sizes: numbers of sequences decoded together.",
)
@click.option(
    "--decode", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="Number of decode steps."
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_plot_file,
    metavar="FILE",
    help="Write a roofline plot to a .png or .svg file; requires the plot extra of grok1.",
)
@click.option(
    "--devices", "only_devices", is_flag=True, help="Only list the devices and their kernels, without a measurement."
)
@model_options
@output_options
@pass_terminal
def command(
    terminal: Terminal,
    preset_name: str | None,
    layers: int | None,
    prompt: tuple[int, ...] | None,
    batch: tuple[int, ...],
    decode: int,
    plot: Path | None,
    only_devices: bool,
    choice: ModelChoice,
    as_json: bool,
) -> None:
    """Measure the prefill and decode speed of a model, and compare it with the speed of memory.

    Each prompt length is measured with each batch size, on random tokens, after compilation and a warm-up. Memory
    bandwidth and the speed of a large matrix product are measured in the same run.

    The bytes read per token are calculated: the weights that a decode step uses and the KV cache. For a batch, tokens
    are assumed to select experts uniformly and independently.

    With --json, one object is printed per measurement.

    \b
    Examples:
      grok1 bench --preset tiny --prompt 64
      grok1 bench --preset bench-3b --prompt 64,512 --batch 1,8 --plot roofline.svg
      grok1 bench --preset grok-1-slice --layers 16 --batch 1,8,32
      grok1 bench -c checkpoints --threads 8 --json
    """
    if preset_name is not None and is_given("checkpoint"):
        raise click.UsageError("--checkpoint and --preset cannot be used together.")
    if preset_name is not None:
        _reject("tokenizer", "load_memory", together_with="--preset")
    elif not only_devices:
        _reject("layers", together_with="a checkpoint")
    if only_devices:
        _reject(*_MEASUREMENT_PARAMETERS, together_with="--devices")
    if plot is not None:
        from grok1.diagnose.roofline import require_matplotlib

        require_matplotlib()
        _check_writable(plot)
    with terminal.interruptible():
        if only_devices:
            _print_devices(terminal, choice, as_json)
            return
        start = time.perf_counter()
        source: Checkpoint | ModelConfig
        tokenizer = None
        if preset_name is None:
            source, tokenizer = open_model(choice, terminal)
            config = source.config
        else:
            source = config = preset(preset_name, layers)
        prompt = _measurable(terminal, choice, config, prompt, batch, decode)
        model, _ = load_model(choice, terminal, source, tokenizer)
        load_seconds = time.perf_counter() - start
        name = preset_name or str(choice.checkpoint)
        if layers is not None:
            name += f", {layers} layers"

        from grok1.diagnose.bench import measure, measure_limits
        from grok1.host import memory

        measured = []
        for tokens in prompt:
            for sequences in batch:
                terminal.show_status(f"measuring batch size {sequences}, {tokens} prompt tokens")
                measured.append(measure(model, tokens, sequences, decode))
        peak = memory.peak_resident_bytes()  # before `measure_limits` allocates memory
        terminal.show_status("measuring memory bandwidth")
        limits = measure_limits(model)
    terminal.clear()
    if as_json:
        for one in measured:
            terminal.write(json_line(_fields(model, name, load_seconds, peak, limits, one)))
    else:
        terminal.write(_table(model, name, load_seconds, peak, limits, measured))
    if plot is not None:
        from grok1.diagnose.roofline import draw_roofline

        picture = draw_roofline(name, limits, measured, plot.suffix.lower()[1:])
        try:
            with atomic_write(plot, "wb") as file:
                file.write(picture)
        except OSError as error:
            raise _unwritable(plot, error) from error


def _reject(*names: str, together_with: str) -> None:
    """Raise a usage error if one of these parameters is given, because it would have no effect."""
    for parameter in click.get_current_context().command.params:
        if parameter.name in names and is_given(parameter.name):
            raise click.UsageError(f"{max(parameter.opts, key=len)} cannot be used with {together_with}.")


def _measurable(
    terminal: Terminal,
    choice: ModelChoice,
    config: ModelConfig,
    prompt: tuple[int, ...] | None,
    batch: tuple[int, ...],
    decode: int,
) -> tuple[int, ...]:
    """Return the prompt lengths to measure, after checking them before hundreds of gigabytes are loaded.

    Raises:
        Grok1Error: if they cannot be measured.
    """
    devices = start_jax(terminal, choice.threads)
    from grok1.diagnose.bench import check_measurable, longest_prompt
    from grok1.params.sharding import make_mesh
    from grok1.plan.devices import present_devices
    from grok1.plan.estimate import Estimate
    from grok1.plan.verdict import room

    data, sequences_fit = 1, None
    if choice.runtime is None:  # several processes check it when they load
        rows, shards = make_mesh(config, choice.mesh, devices).devices.shape
        data = int(rows)
        dtype = choice.dtype or default_dtype(devices[0].platform)
        sequences_fit = room(Estimate(config, present_devices(devices), (data, shards), dtype))
    lengths = prompt or (min(_PROMPT, longest_prompt(config, decode)),)
    for tokens in lengths:
        for sequences in batch:
            check_measurable(config, data, sequences_fit, tokens, sequences, decode)
    return lengths


def _fields(
    model: Model,
    name: str,
    load_seconds: float,
    peak: int | None,
    limits: Limits,
    measured: Measurement,
) -> dict[str, Any]:
    import jax

    from grok1.diagnose.bench import weight_bytes
    from grok1.host.threads import num_threads

    device = model.engine.mesh.devices.flat[0]
    reached = measured.decode_bytes_per_second
    return {
        "model": name,
        "grok1_version": VERSION,
        "jax_version": jax.__version__,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": int(model.engine.mesh.size),
        "mesh": list(model.mesh_shape),
        "dtype": model.engine.dtype.name,
        "kernels": model.kernels,
        "threads": num_threads(),
        "prompt_tokens": measured.prompt_tokens,
        "batch": measured.batch,
        "decode_steps": measured.decode_steps,
        "prefill_seconds": measured.prefill_seconds,
        "prefill_tokens_per_second": measured.prefill_tokens_per_second,
        "prefill_tera_operations_per_second": measured.prefill_operations / measured.prefill_seconds / 1e12,
        "time_to_first_token_seconds": measured.time_to_first_token_seconds,
        "decode_step_seconds": measured.decode_step_seconds,
        "decode_tokens_per_second": measured.decode_tokens_per_second,
        "decode_bytes_per_token": measured.decode_bytes_per_step / measured.batch,
        "decode_bytes_per_step": measured.decode_bytes_per_step,
        "decode_gigabytes_per_second": reached / 1e9,
        "read_gigabytes_per_second": limits.read_bytes_per_second / 1e9,
        "decode_share_of_read_bandwidth": reached / limits.read_bytes_per_second,
        "matrix_product": limits.matrix_product,
        "matrix_tera_operations_per_second": limits.matrix_operations_per_second / 1e12,
        "load_seconds": load_seconds,
        "compile_seconds": model.engine.compile_seconds,
        "weight_bytes": weight_bytes(model),
        "peak_memory_bytes": peak,
        "peak_device_memory_bytes": model.peak_device_bytes,
    }


def _table(
    model: Model, name: str, load_seconds: float, peak: int | None, limits: Limits, measured: Sequence[Measurement]
) -> str:
    from grok1.diagnose.bench import weight_bytes

    data, shards = model.mesh_shape
    on_devices = model.peak_device_bytes
    facts = [
        ["model", f"{name} ({format_bytes(weight_bytes(model))} of weights)"],
        ["devices", f"{model.engine.mesh.size} x {model.engine.mesh.devices.flat[0].device_kind}"],
        ["mesh (data,model)", f"{data},{shards}"],
        ["data type", model.engine.dtype.name],
        ["kernels", model.kernels],
        ["measured memory bandwidth", f"{limits.read_bytes_per_second / 1e9:.1f} GB/s"],
        [f"measured {limits.matrix_product}", f"{limits.matrix_operations_per_second / 1e12:.3g} TOP/s"],
        ["load time, including JAX startup", f"{load_seconds:.1f} s"],
        ["compile time", f"{model.engine.compile_seconds:.1f} s"],
        ["peak host memory", "unknown" if peak is None else format_bytes(peak)],
    ]
    if on_devices is not None:
        facts.append(["peak memory per device", format_bytes(on_devices)])
    head = ["prompt", "batch", "first token", "prefill", "", "decode step", "decode", "read", "", "of memory"]
    units = ["tokens", "size", "s", "tokens/s", "TOP/s", "ms", "tokens/s", "per token", "GB/s", "bandwidth"]
    rows = [
        [
            str(m.prompt_tokens),
            str(m.batch),
            f"{m.time_to_first_token_seconds:.3f}",
            f"{m.prefill_tokens_per_second:.1f}",
            f"{m.prefill_operations / m.prefill_seconds / 1e12:.3f}",
            f"{1e3 * m.decode_step_seconds:.2f}",
            f"{m.decode_tokens_per_second:.1f}",
            format_bytes(round(m.decode_bytes_per_step / m.batch)),
            f"{m.decode_bytes_per_second / 1e9:.1f}",
            f"{m.decode_bytes_per_second / limits.read_bytes_per_second:.0%}",
        ]
        for m in measured
    ]
    return columns(facts) + "\n" + columns([head, units, *rows], right=range(len(head)))


def _print_devices(terminal: Terminal, choice: ModelChoice, as_json: bool) -> None:
    devices = start_jax(terminal, choice.threads)
    import jax

    from grok1.host import memory
    from grok1.host.threads import num_threads
    from grok1.ops.cpu import library as cpu
    from grok1.ops.kernels import kernels_in_use

    platform = devices[0].platform
    used = kernels_in_use(devices[0], choice.kernels)  # type: ignore[arg-type]
    terminal.clear()
    threads = num_threads()
    limits = [  # unknown for devices of other processes
        (device.memory_stats() or {}).get("bytes_limit") if device.process_index == jax.process_index() else None
        for device in devices
    ]
    machine = memory.total_bytes()
    if as_json:
        for device, limit in zip(devices, limits, strict=True):
            fields = {"id": device.id, "platform": device.platform, "kind": device.device_kind, "kernels": used.name}
            if choice.runtime is not None:
                fields |= {"process": device.process_index, "host": choice.runtime.hosts[device.process_index]}
            shared = {"threads": threads, "kernels_built": list(cpu.kernel_names()), "machine_memory_bytes": machine}
            terminal.write(json_line(fields | {"memory_bytes": limit} | shared))
        return
    rows = [["device", "platform", "kind", "memory", *([] if choice.runtime is None else ["process", "host"])]]
    for device, limit in zip(devices, limits, strict=True):
        size = "shared" if platform == "cpu" else "unknown" if limit is None else format_bytes(limit)
        rows.append([str(device.id), device.platform, device.device_kind, size])
        if choice.runtime is not None:
            rows[-1] += [str(device.process_index), choice.runtime.hosts[device.process_index]]
    terminal.write(columns(rows) + "\n")
    facts = [["kernels", used.name if used.fallback is None else f"{used.name}: {used.fallback}"]]
    if platform == "cpu":
        facts += [["native kernels for this CPU", ", ".join(cpu.kernel_names()) or "none"], ["threads", str(threads)]]
    facts.append(["host memory", "unknown" if machine is None else format_bytes(machine)])
    terminal.write(columns(facts))


def _check_writable(path: Path) -> None:
    """Check that the plot can be written, before the measurement."""
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror}; choose another file with --plot")
