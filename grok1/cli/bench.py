"""`grok1 bench`: measures the speed of a model on the devices of this machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grok1.cli.columns import columns
from grok1.cli.loading import ModelChoice, load_model, open_model, start_jax
from grok1.cli.options import Numbers, is_given, layers_option, model_options, output_options
from grok1.cli.terminal import OutputError, Terminal, pass_terminal
from grok1.config import PRESETS, VERSION, ModelConfig, default_dtype, preset
from grok1.host.atomic_write import atomic_write
from grok1.host.sizes import format_bytes
from grok1.jobs.result_json import json_line

if TYPE_CHECKING:
    from grok1.checkpoint.reader import Checkpoint
    from grok1.diagnose.bench import Limits, Measurement
    from grok1.model import Model

_PROMPT = 512  # tokens, by default

# Options that have no effect with --devices.
_OF_MEASURING = (
    *("checkpoint", "tokenizer", "mesh", "dtype", "load_memory"),
    *("preset_name", "layers", "prompt", "batch", "decode", "plot"),
)


def _plot_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is None:
        return None
    if value.suffix.lower() not in (".png", ".svg"):
        raise click.BadParameter(f"{str(value)!r} ends neither in .png nor in .svg")
    if not value.parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(value.parent)!r}")
    return value


@click.command("bench", short_help="Measure prefill and decode speed against what memory allows.")
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(list(PRESETS)),
    help="Measure this model with random weights, made in memory, instead of a checkpoint.",
)
@layers_option
@click.option(
    "--prompt",
    type=Numbers(),
    help="Tokens of the prompts to read.  [default: 512, or as many as the context has room for]",
)
@click.option("--batch", type=Numbers(), default="1", show_default=True, help="Sequences that go on together.")
@click.option(
    "--decode", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="Steps of decoding to measure."
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_plot_file,
    metavar="FILE",
    help="Draw what was reached against the limits, as .png or .svg; needs the plot extra.",
)
@click.option(
    "--devices", "only_devices", is_flag=True, help="Tell the devices and what computes on them; load nothing."
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
    """Measure how fast a model reads prompts and decodes after them, against how fast memory can be read.

    Every prompt length is measured with every batch, on random tokens. Programs are compiled and run once before they
    are measured. How fast memory can be read is measured in the same run, and so is a matrix product, by the native
    kernels or in the dtype of activations. A step has to read all weights that it uses and the cache; of a batch's
    experts it is taken to use as many as even and independent choices give on average. With --json there is a line for
    each measurement.

    \b
    grok1 bench --preset tiny --prompt 64
    grok1 bench --preset bench-3b --prompt 64,512 --batch 1,8 --plot roofline.svg
    grok1 bench --preset grok-1-slice --layers 16 --batch 1,8,32
    grok1 bench -c checkpoints --threads 8 --json
    """
    if preset_name is not None and is_given("checkpoint"):
        raise click.UsageError("--checkpoint and --preset are both given: give one of them.")
    if preset_name is not None:
        _refuse("tokenizer", "load_memory", because="--preset reads no files")
    elif not only_devices:
        _refuse("layers", because="a checkpoint has its own layers")
    if only_devices:
        _refuse(*_OF_MEASURING, because="--devices measures nothing")
    if plot is not None:
        from grok1.diagnose.roofline import require_matplotlib

        require_matplotlib()
        _require_place(plot)
    with terminal.interruptible():
        if only_devices:
            _tell_devices(terminal, choice, as_json)
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
                terminal.show_status(f"measuring {sequences} x {tokens} tokens")
                measured.append(measure(model, tokens, sequences, decode))
        peak = memory.peak_resident_bytes()  # without the next step
        terminal.show_status("measuring how fast memory can be read")
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


def _refuse(*names: str, because: str) -> None:
    """Refuses options of these names on the command line, where they would have no effect."""
    for parameter in click.get_current_context().command.params:
        if parameter.name in names and is_given(parameter.name):
            raise click.UsageError(f"{because}: leave out {max(parameter.opts, key=len)}.")


def _measurable(
    terminal: Terminal,
    choice: ModelChoice,
    config: ModelConfig,
    prompt: tuple[int, ...] | None,
    batch: tuple[int, ...],
    decode: int,
) -> tuple[int, ...]:
    """The lengths of prompts to measure.

    Raises:
        Grok1Error: if they cannot be measured, which should be reported before hundreds of gigabytes are loaded.
    """
    devices = start_jax(terminal, choice.threads)
    from grok1.diagnose.bench import check_measurable, longest_prompt
    from grok1.params.sharding import make_mesh
    from grok1.plan.devices import present_devices
    from grok1.plan.estimate import Estimate
    from grok1.plan.verdict import room

    data, sequences_fit = 1, None
    if choice.runtime is None:  # several processes find it out together, when they load
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
        ["model", f"{name}, {format_bytes(weight_bytes(model))} of weights"],
        ["devices", f"{model.engine.mesh.size} x {model.engine.mesh.devices.flat[0].device_kind}"],
        ["mesh (data,model), activations", f"{data},{shards} {model.engine.dtype.name}"],
        ["kernels", model.kernels],
        ["reading memory, measured", f"{limits.read_bytes_per_second / 1e9:.1f} GB/s"],
        [f"{limits.matrix_product}, measured", f"{limits.matrix_operations_per_second / 1e12:.3g} TOP/s"],
        ["loading, JAX's start included", f"{load_seconds:.1f} s"],
        ["compiling", f"{model.engine.compile_seconds:.1f} s"],
        ["peak memory of the process", "not known" if peak is None else format_bytes(peak)],
    ]
    if on_devices is not None:
        facts.append(["peak memory of a device", format_bytes(on_devices)])
    head = ["prompt", "batch", "first token", "prefill", "", "step", "decode", "read", "", "of memory's"]
    units = ["tokens", "", "s", "tokens/s", "TOP/s", "ms", "tokens/s", "a token", "GB/s", "speed"]
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


def _tell_devices(terminal: Terminal, choice: ModelChoice, as_json: bool) -> None:
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
        size = "the machine's" if platform == "cpu" else "not known" if limit is None else format_bytes(limit)
        rows.append([str(device.id), device.platform, device.device_kind, size])
        if choice.runtime is not None:
            rows[-1] += [str(device.process_index), choice.runtime.hosts[device.process_index]]
    terminal.write(columns(rows) + "\n")
    facts = [["kernels", used.name if used.fallback is None else f"{used.name}: {used.fallback}"]]
    if platform == "cpu":
        facts += [["that this processor can run", ", ".join(cpu.kernel_names()) or "none"], ["threads", str(threads)]]
    facts.append(["memory of the machine", "not known" if machine is None else format_bytes(machine)])
    terminal.write(columns(facts))


def _require_place(path: Path) -> None:
    """Checks that the picture can be written, before anything is measured."""
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written ({error.strerror}): name another file with --plot")
