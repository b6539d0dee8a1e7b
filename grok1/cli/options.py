"""Decorators for options shared by several commands."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from grok1.cli.loading import ModelChoice
from grok1.cli.param_types import ByteSize, MeshShape, complete_directory
from grok1.cli.terminal import Terminal
from grok1.config import DTypeName, KernelsName
from grok1.errors import json_value
from grok1.host.memory import DEFAULT_LOAD_MEMORY, MIN_LOAD_MEMORY
from grok1.host.sizes import format_bytes
from grok1.multihost.cluster import START_TIMEOUT, detected_cluster, given_cluster
from grok1.request import MAX_SEED, SamplingOptions

Command = TypeVar("Command", bound=Callable[..., Any])


def is_given(name: str) -> bool:
    """Return whether an option was given on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def _options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Return a decorator that adds options, listed in this order in the help."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_CHECKPOINT = click.option(
    "-c",
    "--checkpoint",
    type=click.Path(path_type=Path),
    default="checkpoints",
    show_default=True,
    envvar="GROK1_CHECKPOINT",
    show_envvar=True,
    metavar="DIR",
    shell_complete=complete_directory,
    help="Directory that contains ckpt-0, or the ckpt-0 directory itself.",
)
_TOKENIZER = click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    envvar="GROK1_TOKENIZER",
    show_envvar=True,
    show_default="tokenizer.model in the checkpoint directory or next to it",
    metavar="FILE",
    help="SentencePiece model file.",
)
checkpoint_argument = click.argument(
    "directory",
    metavar="[DIR]",
    type=click.Path(path_type=Path),
    envvar="GROK1_CHECKPOINT",
    default="checkpoints",
    shell_complete=complete_directory,
)
layers_option = click.option(
    "--layers",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="Number of layers, instead of the preset's own.",
)
mesh_option = click.option(
    "--mesh",
    type=MeshShape(),
    metavar="DATA,MODEL",
    show_default="the model split across as many devices as possible",
    help="Device mesh: DATA copies of the model, each split across MODEL devices. Sequences are divided among the "
    "copies.",
)
_DTYPE = click.option(
    "--dtype",
    type=click.Choice(get_args(DTypeName)),
    show_default="bfloat16 on accelerators, float32 on CPUs",
    help="Data type of activations and of the KV cache.",
)
_LOAD_MEMORY = click.option(
    "--load-memory",
    type=ByteSize(MIN_LOAD_MEMORY),
    default=format_bytes(DEFAULT_LOAD_MEMORY),
    show_default=True,
    help=f"Host memory limit for loading, in addition to the weights; at least {format_bytes(MIN_LOAD_MEMORY)}.",
)
_KERNELS = click.option(
    "--kernels",
    type=click.Choice(get_args(KernelsName)),
    default="auto",
    show_default=True,
    help="Kernel implementation: native (hand-written for the platform) or xla (compiled by XLA). auto uses "
    "$GROK1_KERNELS if it is set, otherwise native where available.",
)
_THREADS = click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    show_default="one per available physical core",
    help="Number of CPU threads.",
)


_PROCESSES = _options(
    click.option(
        "--distributed",
        is_flag=True,
        help="Run as one of several cooperating processes started by SLURM, Open MPI, Kubernetes or Cloud TPU, which "
        "are detected automatically.",
    ),
    click.option(
        "--coordinator",
        metavar="HOST:PORT",
        envvar="GROK1_COORDINATOR",
        show_envvar=True,
        help="Run as one of several cooperating processes that connect to process 0 at this address. :PORT alone "
        "means the loopback address.",
    ),
    click.option(
        "--num-processes",
        type=click.IntRange(1),
        metavar="N",
        envvar="GROK1_NUM_PROCESSES",
        show_envvar=True,
        help="Number of processes.",
    ),
    click.option(
        "--process-id",
        type=click.IntRange(0),
        metavar="I",
        envvar="GROK1_PROCESS_ID",
        show_envvar=True,
        help="Index of this process. Process 0 reads input and prints results.",
    ),
    click.option(
        "--coordinator-bind",
        metavar="ADDRESS",
        envvar="GROK1_COORDINATOR_BIND",
        show_envvar=True,
        help="Address on which process 0 listens, if not HOST of --coordinator; 0.0.0.0 listens on all addresses.",
    ),
    click.option(
        "--start-timeout",
        type=click.IntRange(1),
        default=START_TIMEOUT,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait for all processes to connect.",
    ),
)


def _take_choice(given: dict[str, Any]) -> ModelChoice:
    """Move the options that select a model from `given` into a `ModelChoice`."""
    names = [field.name for field in dataclasses.fields(ModelChoice) if field.name in given]
    return ModelChoice(**{name: given.pop(name) for name in names})


def tokenizer_choice_options(command: Command) -> Command:
    """Add `--checkpoint` and `--tokenizer`, passed to the command as the `ModelChoice` `choice`."""

    @functools.wraps(command)
    def with_choice(*args: Any, **given: Any) -> Any:
        return command(*args, choice=_take_choice(given), **given)

    return _CHECKPOINT(_TOKENIZER(with_choice))  # type: ignore[return-value]


def model_options(command: Command) -> Command:
    """Add the options that select a model, passed to the command as the `ModelChoice` `choice`.

    With the options of several processes, only process 0 runs the command; see `grok1.cli.distributed`.
    """

    @functools.wraps(command)
    def with_choice(
        *args: Any,
        distributed: bool,
        coordinator: str | None,
        num_processes: int | None,
        process_id: int | None,
        coordinator_bind: str | None,
        start_timeout: int,
        **given: Any,
    ) -> Any:
        choice = _take_choice(given)
        if not distributed and (coordinator, num_processes, process_id) == (None, None, None):
            if is_given("start_timeout") or coordinator_bind is not None:
                name = "--start-timeout" if is_given("start_timeout") else "--coordinator-bind"
                raise click.UsageError(f"{name} requires --distributed or --coordinator.")
            return command(*args, choice=choice, **given)
        from grok1.cli.distributed import joined

        find_cluster = functools.partial(
            detected_cluster if distributed else given_cluster,
            *(coordinator, num_processes, process_id, coordinator_bind, start_timeout),
        )
        with joined(find_cluster, choice) as runtime:
            return command(*args, choice=dataclasses.replace(choice, runtime=runtime), **given)

    options = _options(_CHECKPOINT, _TOKENIZER, mesh_option, _DTYPE, _LOAD_MEMORY, _KERNELS, _THREADS, _PROCESSES)
    return options(with_choice)  # type: ignore[return-value]


def _set_on_terminal(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        assert param.name is not None
        setattr(ctx.ensure_object(Terminal), param.name, True)


terminal_options = _options(
    click.option(
        "--quiet",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_on_terminal,
        help="Do not show progress and statistics.",
    ),
    click.option(
        "--verbose",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_on_terminal,
        help="Show tracebacks of errors and the log messages of JAX.",
    ),
)
"""Decorator that adds `--quiet` and `--verbose`, which configure the `Terminal`."""

output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line, instead of text."),
    terminal_options,
)
"""Decorator that adds `--json` (passed as `as_json`), `--quiet` and `--verbose`."""

_GREEDY = click.option("--greedy", is_flag=True, help="Always choose the most likely token. Same as --temperature 0.")
_NUM_SAMPLES = click.option(
    "--num-samples",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Number of completions per prompt. Sample i, counted from 0, uses the seed SEED + i.",
)


def _sampling_option(field: dataclasses.Field[Any]) -> Callable[[Command], Command]:
    """Return the decorator that adds the option for a field of `SamplingOptions`."""
    hint = get_type_hints(SamplingOptions)[field.name]
    element, *_ = get_args(hint) or [hint]  # of `int | None` or `tuple[str, ...]`

    def check(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        if not field.metadata.get("valid", lambda value: True)(value):
            raise click.BadParameter(f"expected {field.metadata['expected']}, got {json_value(value)}.")
        return value

    return click.option(
        *field.metadata.get("names", [f"--{field.name.replace('_', '-')}"]),
        field.name,
        type=element,
        default=field.default,
        show_default=field.metadata.get("show_default", hint in (int, float)),
        multiple=get_origin(hint) is tuple,
        is_flag=hint is bool,
        metavar=field.metadata.get("metavar"),
        help=field.metadata["help"],
        callback=check,
    )


def sampling_options(command: Command) -> Command:
    """Add the sampling options, passed to the command as the `SamplingOptions` `sampling`, and `num_samples`."""

    @functools.wraps(command)
    def with_sampling(*args: Any, greedy: bool, num_samples: int, **given: Any) -> Any:
        values = {field.name: given.pop(field.name) for field in dataclasses.fields(SamplingOptions)}
        if values["logprobs"] is not None and not given.get("as_json", True):
            raise click.UsageError("--logprobs requires --json.")
        if greedy:
            if is_given("temperature") and values["temperature"] != 0:
                raise click.UsageError("--greedy and --temperature cannot be used together.")
            values["temperature"] = 0.0
        sampling = SamplingOptions(**values)
        if sampling.seed is not None and sampling.seed > (largest := MAX_SEED - (num_samples - 1)):
            raise click.BadParameter(
                f"expected at most {largest} for {num_samples} samples, got {sampling.seed}.", param_hint="'--seed'"
            )
        return command(*args, sampling=sampling, num_samples=num_samples, **given)

    options = {field.name: _sampling_option(field) for field in dataclasses.fields(SamplingOptions)}
    options["temperature"] = _options(options["temperature"], _GREEDY)
    return _options(*options.values(), _NUM_SAMPLES)(with_sampling)  # type: ignore[return-value]


truncate_option = click.option(
    "--truncate",
    is_flag=True,
    help="Drop the beginning of a prompt that is too long for the model's context, instead of failing.",
)
"""Decorator that adds `--truncate`."""

batch_size_option = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="chosen to fit in memory",
    help="Maximum number of sequences to process at a time.",
)
"""Decorator that adds `--batch-size`."""

job_options = _options(
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        metavar="FILE",
        show_default="standard output",
        help="Write the results to FILE when the job is complete. Finished rows are saved in FILE.journal; to resume "
        "an interrupted job, run the same command again.",
    ),
    click.option(
        "--format",
        "row_format",
        type=click.Choice(["txt", "jsonl"]),
        show_default="from the name of INPUT; jsonl for standard input",
        help="Format of INPUT: a text or a JSON object on each line.",
    ),
    click.option(
        "--skip-bad",
        is_flag=True,
        help='Process the valid rows even if others are invalid. The result of an invalid row has an "error", and the '
        "exit status is 1.",
    ),
    click.option(
        "--restart", is_flag=True, help="Discard the results of an interrupted job, and replace FILE if it exists."
    ),
)
"""Decorator that adds the options for a file of rows: `output`, `row_format`, `skip_bad` and `restart`."""
