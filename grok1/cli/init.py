"""`grok1 init`: writes a checkpoint of a trained model, of random weights, or a hollow one."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import shlex
from pathlib import Path

import click

from grok1.cli.options import is_given, layers_option, output_options
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.config import PRESETS, TRAINED, ModelConfig
from grok1.config import preset as preset_config
from grok1.host.sizes import format_bytes
from grok1.jobs.result_json import json_line


@click.command("init", short_help="Write a small trained model, or random weights, as a checkpoint.")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--preset",
    required=True,
    type=click.Choice(list(PRESETS)),
    help="Model to write. bard has 5 million weights, trained on Shakespeare. The others have random weights: tiny 20 "
    "million, bench-3b 3.3 billion, grok-1 as many as the release (318 GB), grok-1-slice 8 of its 64 layers.",
)
@layers_option
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of the random weights; the same seed gives the same files.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write this SentencePiece model beside the weights, and make the vocabulary as large as its own.  "
    "[default: a small tokenizer is trained; none for grok-1 and grok-1-slice]",
)
@click.option(
    "--hollow",
    is_flag=True,
    help="Leave the weights out: files of the same names, sizes and structure, whose arrays are holes that read as "
    "zeros. For grok-1 that is 318 GB on a few MB of disk, in seconds, to rehearse inspect and verify before the "
    "download.",
)
@click.option("--force", is_flag=True, help="Replace a checkpoint that is there.")
@output_options
@pass_terminal
def command(
    terminal: Terminal,
    directory: Path,
    preset: str,
    layers: int | None,
    seed: int,
    tokenizer: Path | None,
    hollow: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint in the release's format into DIR: ckpt-0, config.json and tokenizer.model.

    The preset bard is a small model with exactly Grok-1's architecture that was trained on Shakespeare. It comes with
    grok1, is the same on every machine, and does not accept --layers, --seed, --tokenizer or --hollow. The other
    presets have random weights: the text they generate is meaningless, but commands, files, memory use and speed are
    those of a real model of that size. With --hollow no weights are written, only what inspect and verify need.

    \b
    grok1 init bard --preset bard
    grok1 run -c bard "ROMEO."

    \b
    grok1 init hollow --preset grok-1 --hollow
    grok1 inspect hollow
    """
    _check_options(preset, hollow)

    from grok1.checkpoint.hollow import allocated_bytes
    from grok1.checkpoint.reader import find_checkpoint
    from grok1.checkpoint.writer import unpack_checkpoint, write_checkpoint
    from grok1.params.table import num_parameters

    show_progress = functools.partial(terminal.show_bytes, "writing hollow files" if hollow else "writing weights")
    config, trained = preset_config(preset, layers), preset in TRAINED
    if trained:
        with importlib.resources.as_file(importlib.resources.files("grok1").joinpath(TRAINED[preset])) as archive:
            unpack_checkpoint(archive, directory, force=force, progress=show_progress)
    else:
        config, tokenizer_model = _tokenizer(terminal, config, tokenizer)
        write_checkpoint(
            directory,
            config,
            seed=seed,
            force=force,
            hollow=hollow,
            tokenizer=tokenizer_model,
            progress=show_progress,
        )
    terminal.clear()
    written = [path for path in find_checkpoint(directory).iterdir() if path.is_file()]
    written += [path for name in ("config.json", "tokenizer.model") if (path := directory / name).is_file()]
    size = sum(path.stat().st_size for path in written)
    parameters = num_parameters(config)
    if as_json:
        told = {
            "directory": str(directory),
            "preset": preset,
            "seed": None if hollow or trained else seed,
            "hollow": hollow,
            "files": len(written),
            "bytes": size,
            "parameters": parameters,
            "vocab_size": config.vocab_size,
        }
        terminal.write(json_line(told))
    terminal.note(f"Wrote {len(written)} files, {format_bytes(size)}, {parameters:,} parameters, to {directory}.")
    if hollow:
        on_disk = sum(allocated_bytes(path.stat()) for path in written)
        terminal.note(f"They are hollow and take {format_bytes(on_disk)} of disk.")
        terminal.note(f"Try: grok1 inspect {shlex.quote(str(directory))}")
        return
    if not (directory / "tokenizer.model").is_file():
        terminal.note("No tokenizer was written: put the release's tokenizer.model, which comes with its code, there.")
    prompt = "ROMEO." if trained else "The answer is"
    terminal.note(f'Try: grok1 run -c {shlex.quote(str(directory))} "{prompt}"')


def _check_options(preset: str, hollow: bool) -> None:
    """Refuses options that would have no effect."""
    unused = [f"--{name}" for name in ("layers", "seed", "tokenizer", "hollow") if is_given(name)]
    if preset in TRAINED and unused:
        raise click.UsageError(
            f"{preset} is a trained model: leave out {' and '.join(unused)}, or choose another preset."
        )
    if hollow and is_given("seed"):
        raise click.UsageError("--hollow and --seed are both given: hollow files have no random weights.")


def _tokenizer(terminal: Terminal, config: ModelConfig, file: Path | None) -> tuple[ModelConfig, bytes | None]:
    """The config with the vocabulary size of the tokenizer to write, and the tokenizer's file."""
    if file is not None:
        from grok1.text.tokenizer import Tokenizer

        size = Tokenizer.read(file).vocab_size
        return dataclasses.replace(config, vocab_size=size), file.read_bytes()
    if config.vocab_size == PRESETS["grok-1"].vocab_size:  # its tokenizer comes with the release's code
        return config, None
    from grok1.text.train_tokenizer import train_small_tokenizer

    terminal.show_status("training a tokenizer")
    return config, train_small_tokenizer(config.vocab_size)
