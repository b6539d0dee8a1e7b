"""Options that several commands share, as decorators."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from grok1.cli.loading import ModelChoice
from grok1.cli.terminal import Terminal
from grok1.config import DTypeName, KernelsName
from grok1.errors import RequestError
from grok1.host.memory import DEFAULT_LOAD_MEMORY, MIN_LOAD_MEMORY
from grok1.host.sizes import format_bytes, parse_bytes
from grok1.multihost.cluster import START_TIMEOUT, detected_cluster, given_cluster
from grok1.request import MAX_SEED, SamplingOptions

Command = TypeVar("Command", bound=Callable[..., Any])


def is_given(name: str) -> bool:
    """Whether an option is on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def _options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """A decorator that adds options, which help lists in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


class _MeshType(click.ParamType):
    name = "DATA,MODEL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        try:
            data, model = (int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not two whole numbers with a comma between, such as 1,8", param, ctx)
        if data < 1 or model < 1:
            self.fail(f"{value!r} has an empty axis: expected two numbers above 0, such as 1,8", param, ctx)
        return data, model


class ByteSize(click.ParamType):
    """A size in bytes, such as 80GB or 512MiB; the command gets an int of `at_least` or more."""

    name = "SIZE"

    def __init__(self, at_least: int = 1):
        self.at_least = at_least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Reads the size."""
        if isinstance(value, int):
            return value
        try:
            size = parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size < self.at_least:
            least = f"at least {format_bytes(self.at_least)}" if self.at_least > 1 else "more than 0"
            self.fail(f"{value!r} is no size to work with: expected {least}", param, ctx)
        return size


class Numbers(click.ParamType):
    """One or more whole numbers above 0, such as 64,512; the command gets a tuple."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Reads the numbers."""
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a whole number or several with commas between, such as 64,512", param, ctx)
        if min(numbers) < 1:
            self.fail(f"{value!r} has a number below 1", param, ctx)
        return numbers


_CHECKPOINT = click.option(
    "-c",
    "--checkpoint",
    type=click.Path(path_type=Path),
    default="checkpoints",
    show_default=True,
    envvar="GROK1_CHECKPOINT",
    show_envvar=True,
    metavar="DIR",
    help="The folder that holds ckpt-0, or is it.",
)
_TOKENIZER = click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    envvar="GROK1_TOKENIZER",
    show_envvar=True,
    metavar="FILE",
    help="The SentencePiece model of the checkpoint.  [default: tokenizer.model in or beside the checkpoint]",
)
checkpoint_argument = click.argument(
    "directory", metavar="[DIR]", type=click.Path(path_type=Path), envvar="GROK1_CHECKPOINT", default="checkpoints"
)
layers_option = click.option(
    "--layers",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="Give the preset this many layers instead of its own.",
)
mesh_option = click.option(
    "--mesh",
    type=_MeshType(),
    metavar="DATA,MODEL",
    help="How many devices to split sequences and weights over: 2,4 holds the model twice, each time on four "
    "devices.  [default: all devices on MODEL, as far as the model divides]",
)
_DTYPE = click.option(
    "--dtype",
    type=click.Choice(get_args(DTypeName)),
    help="The type of activations and of the key/value cache.  [default: bfloat16 on accelerators, float32 on "
    "processors]",
)
_LOAD_MEMORY = click.option(
    "--load-memory",
    type=ByteSize(MIN_LOAD_MEMORY),
    default=DEFAULT_LOAD_MEMORY,
    help="The most memory of the host that loading takes beyond the weights, for what is on its way to the devices; "
    f"at least {format_bytes(MIN_LOAD_MEMORY)}.  [default: {format_bytes(DEFAULT_LOAD_MEMORY)}]",
)
_KERNELS = click.option(
    "--kernels",
    type=click.Choice(get_args(KernelsName)),
    default="auto",
    show_default=True,
    help="What computes: native for the kernels made for the platform, xla for what XLA makes of plain JAX. auto takes "
    "what $GROK1_KERNELS says, or the native ones where they can be had.",
)
_THREADS = click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="How many threads compute, on processors.  [default: one for each physical core that grok1 may use]",
)


_PROCESSES = _options(
    click.option(
        "--distributed",
        is_flag=True,
        help="Run as one of several processes, on one host or many, that SLURM, Open MPI, Kubernetes or Cloud TPU have "
        "started: who takes part is found in what they say.",
    ),
    click.option(
        "--coordinator",
        metavar="HOST:PORT",
        envvar="GROK1_COORDINATOR",
        show_envvar=True,
        help="Run as one of several processes, which meet here: an address of the host of process 0 that all others "
        "reach, and a free port. Only :PORT is the loopback address.",
    ),
    click.option(
        "--num-processes",
        type=click.IntRange(1),
        metavar="N",
        envvar="GROK1_NUM_PROCESSES",
        show_envvar=True,
        help="How many processes there are.",
    ),
    click.option(
        "--process-id",
        type=click.IntRange(0),
        metavar="I",
        envvar="GROK1_PROCESS_ID",
        show_envvar=True,
        help="Which of them this is, from 0; process 0 is the one that reads input and prints.",
    ),
    click.option(
        "--coordinator-bind",
        metavar="ADDRESS",
        envvar="GROK1_COORDINATOR_BIND",
        show_envvar=True,
        help="Where process 0 listens for the others, if not at the address of --coordinator's HOST: 0.0.0.0 is every "
        "address of its host.",
    ),
    click.option(
        "--start-timeout",
        type=click.IntRange(1),
        default=START_TIMEOUT,
        show_default=True,
        metavar="SECONDS",
        help="How long the processes wait for each other at the start.",
    ),
)


def _take_choice(given: dict[str, Any]) -> ModelChoice:
    """Takes the options that select a model out of those that are given."""
    names = [field.name for field in dataclasses.fields(ModelChoice) if field.name in given]
    return ModelChoice(**{name: given.pop(name) for name in names})


def tokenizer_choice_options(command: Command) -> Command:
    """Adds `--checkpoint` and `--tokenizer`; the command gets a `ModelChoice` as `choice`."""

    @functools.wraps(command)
    def with_choice(*args: Any, **given: Any) -> Any:
        return command(*args, choice=_take_choice(given), **given)

    return _CHECKPOINT(_TOKENIZER(with_choice))  # type: ignore[return-value]


def model_options(command: Command) -> Command:
    """Adds the options that select a model, and runs the command; it gets a `ModelChoice` as `choice`."""

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
                raise click.UsageError(f"{name} is for several processes: give --distributed or --coordinator with it.")
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
        help="Show no progress and no statistics, even on a terminal.",
    ),
    click.option(
        "--verbose",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_on_terminal,
        help="Show the traceback of an error, and what JAX logs.",
    ),
)
"""Decorator that adds `--quiet` and `--verbose`, which set up the `Terminal`."""

output_options = _options(
    click.option(
        "--json", "as_json", is_flag=True, help="Print JSON instead of text: one object a line, for programs."
    ),
    terminal_options,
)
"""Decorator that adds `--json` (the command gets `as_json`), `--quiet` and `--verbose`."""

_GREEDY = click.option("--greedy", is_flag=True, help="Always take the likeliest token: the same as --temperature 0.")
_NUM_SAMPLES = click.option(
    "--num-samples",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Complete the prompt this many times; sample i, counted from 0, has the seed SEED + i.",
)


def _sampling_option(field: dataclasses.Field[Any]) -> Callable[[Command], Command]:
    """The command line's option for a field of `SamplingOptions`."""
    hint = get_type_hints(SamplingOptions)[field.name]
    element, *_ = get_args(hint) or [hint]  # of `int | None` or `tuple[str, ...]`
    return click.option(
        *field.metadata.get("names", [f"--{field.name.replace('_', '-')}"]),
        field.name,
        type=element,
        default=field.default,
        show_default=hint in (int, float),
        multiple=get_origin(hint) is tuple,
        is_flag=hint is bool,
        metavar=field.metadata.get("metavar"),
        help=field.metadata["help"],
    )


def sampling_options(command: Command) -> Command:
    """Adds the sampling options; the command gets `SamplingOptions` as `sampling`, and `num_samples`."""

    @functools.wraps(command)
    def with_sampling(*args: Any, greedy: bool, num_samples: int, **given: Any) -> Any:
        values = {field.name: given.pop(field.name) for field in dataclasses.fields(SamplingOptions)}
        if values["logprobs"] is not None and not given.get("as_json", True):
            raise click.UsageError("--logprobs needs --json: log-probabilities have no place in plain text.")
        if greedy:
            if is_given("temperature") and values["temperature"] != 0:
                raise click.UsageError(
                    f"--greedy contradicts --temperature {values['temperature']:g}: give one of them."
                )
            values["temperature"] = 0.0
        try:
            sampling = SamplingOptions(**values)
        except RequestError as error:
            raise click.UsageError(f"{error}.") from None
        if sampling.seed is not None and sampling.seed > MAX_SEED - (num_samples - 1):
            raise click.UsageError(
                f"the last of {num_samples} samples would have the seed {sampling.seed + num_samples - 1}, "
                f"expected at most {MAX_SEED}."
            )
        return command(*args, sampling=sampling, num_samples=num_samples, **given)

    options = {field.name: _sampling_option(field) for field in dataclasses.fields(SamplingOptions)}
    options["temperature"] = _options(options["temperature"], _GREEDY)
    return _options(*options.values(), _NUM_SAMPLES)(with_sampling)  # type: ignore[return-value]


truncate_option = click.option(
    "--truncate",
    is_flag=True,
    help="Keep only the last tokens of a prompt that is longer than the model's context, rather than refuse it.",
)
"""Decorator that adds `--truncate`."""

batch_size_option = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Work on this many sequences at a time.  [default: what memory allows, up to what pays]",
)
"""Decorator that adds `--batch-size`."""

job_options = _options(
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write the results to this file, all at once when they are done; what is done before is kept in "
        "FILE.journal, and the same command goes on after an interruption.  [default: standard output, row by row]",
    ),
    click.option(
        "--format",
        "row_format",
        type=click.Choice(["txt", "jsonl"]),
        help="What the lines of INPUT are.  [default: by its ending; jsonl for standard input]",
    ),
    click.option(
        "--skip-bad",
        is_flag=True,
        help='Go on without bad rows; their results have an "error", and the exit code is 1.',
    ),
    click.option(
        "--restart", is_flag=True, help="Forget what an interrupted run has done, and replace FILE if it is there."
    ),
)
"""Decorator that adds the options of a file of rows: `output`, `row_format`, `skip_bad` and `restart`."""
