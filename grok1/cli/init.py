"""`grok1 init`: write a checkpoint with trained, random or no weights."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import shlex
from pathlib import Path

import click

from grok1.cli.options import is_given, layers_option, output_options
from grok1.cli.param_types import complete_directory
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.config import PRESETS, TRAINED, ModelConfig
from grok1.config import preset as preset_config
from grok1.host.sizes import format_bytes
from grok1.jobs.result_json import json_line


@click.command("init", short_help="Write a checkpoint: a small trained model, or random weights.")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path), shell_complete=complete_directory)
@click.option(
    "--preset",
    required=True,
    type=click.Choice(list(PRESETS)),
    help="Model to write: bard (5 million parameters, trained on Shakespeare), or one with random weights: tiny (20 "
    "million), bench-3b (3.3 billion), grok-1 (as large as the release, 318 GB) or grok-1-slice (8 of its 64 layers).",
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
    show_default="a small tokenizer; none for grok-1 and grok-1-slice",
    help="SentencePiece model file to copy to DIR. It determines the vocabulary size.",
)
@click.option(
    "--hollow",
    is_flag=True,
    help="Write sparse files without weights, which have the same names, sizes and structure. grok-1 then takes a few "
    "seconds and a few MB of disk space, enough to try inspect and verify before downloading the release.",
)
@click.option("--force", is_flag=True, help="Replace an existing checkpoint in DIR.")
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
    """Write a checkpoint in the release's format to DIR: ckpt-0, config.json and tokenizer.model.

    The preset bard is a small model with the architecture of Grok-1, trained on Shakespeare. It is included in grok1,
    and cannot be combined with --layers, --seed, --tokenizer or --hollow. The other presets have random weights: they
    generate meaningless text, but their files, memory use and speed are those of a real model of that size.

    \b
    Examples:
      grok1 init bard --preset bard
      grok1 run -c bard "ROMEO."
      grok1 init hollow --preset grok-1 --hollow
      grok1 inspect hollow
    """
    _check_options(preset, hollow)

    from grok1.checkpoint.hollow import allocated_bytes
    from grok1.checkpoint.reader import find_checkpoint
    from grok1.checkpoint.writer import unpack_checkpoint, write_checkpoint
    from grok1.params.table import num_parameters

    show_progress = functools.partial(terminal.show_bytes, "writing sparse files" if hollow else "writing weights")
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
        fields = {
            "directory": str(directory),
            "preset": preset,
            "seed": None if hollow or trained else seed,
            "hollow": hollow,
            "files": len(written),
            "bytes": size,
            "parameters": parameters,
            "vocab_size": config.vocab_size,
        }
        terminal.write(json_line(fields))
    terminal.note(f"Wrote {parameters:,} parameters in {len(written)} files ({format_bytes(size)}) to {directory}.")
    if hollow:
        on_disk = sum(allocated_bytes(path.stat()) for path in written)
        terminal.note(f"The files are sparse and use {format_bytes(on_disk)} of disk space.")
        terminal.note(f"Try: grok1 inspect {shlex.quote(str(directory))}")
        return
    if not (directory / "tokenizer.model").is_file():
        terminal.note(f"No tokenizer was written: copy tokenizer.model from the code of the release to {directory}.")
    prompt = "ROMEO." if trained else "The answer is"
    terminal.note(f'Try: grok1 run -c {shlex.quote(str(directory))} "{prompt}"')


def _check_options(preset: str, hollow: bool) -> None:
    """Reject options that would have no effect."""
    unused = [f"--{name}" for name in ("layers", "seed", "tokenizer", "hollow") if is_given(name)]
    if preset in TRAINED and unused:
        raise click.UsageError(f"--preset {preset} is a trained model and cannot be used with {' or '.join(unused)}.")
    if hollow and is_given("seed"):
        raise click.UsageError("--hollow and --seed cannot be used together, because hollow files contain no weights.")


def _tokenizer(terminal: Terminal, config: ModelConfig, file: Path | None) -> tuple[ModelConfig, bytes | None]:
    """Return the config with the vocabulary size of the tokenizer to write, and the tokenizer's file or None."""
    if file is not None:
        from grok1.text.tokenizer import Tokenizer

        size = Tokenizer.read(file).vocab_size
        return dataclasses.replace(config, vocab_size=size), file.read_bytes()
    if config.vocab_size == PRESETS["grok-1"].vocab_size:  # its tokenizer is part of the release's code
        return config, None
    from grok1.text.train_tokenizer import train_small_tokenizer

    terminal.show_status("training a tokenizer")
    return config, train_small_tokenizer(config.vocab_size)
