"""`grok1 batch`: complete a file of prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from grok1.cli.loading import ModelChoice
from grok1.cli.options import (
    batch_size_option,
    job_options,
    model_options,
    sampling_options,
    terminal_options,
    truncate_option,
)
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.cli.text_input import stdin_is_terminal
from grok1.request import SamplingOptions, fresh_seed


@click.command("batch", short_help="Complete a file of prompts; interrupted jobs can be resumed.")
@click.argument("input_file", metavar="INPUT", type=click.Path(path_type=Path))
@job_options
@click.option("--unescape", is_flag=True, help="Interpret the escapes \\n, \\t, \\r and \\\\ in .txt lines.")
@click.option("--no-prompt", is_flag=True, help="Omit the prompts from the results.")
@click.option("--echo", is_flag=True, help="Start the text of each completion with its prompt.")
@truncate_option
@batch_size_option
@click.option("--json", "summarise", is_flag=True, help="Print a summary of the job as JSON; requires -o.")
@sampling_options
@model_options
@terminal_options
@pass_terminal
def command(
    terminal: Terminal,
    input_file: Path,
    output: Path | None,
    row_format: Any,
    skip_bad: bool,
    restart: bool,
    unescape: bool,
    no_prompt: bool,
    echo: bool,
    truncate: bool,
    batch_size: int | None,
    summarise: bool,
    choice: ModelChoice,
    sampling: SamplingOptions,
    num_samples: int,
) -> None:
    """Complete each prompt in INPUT and write one line of JSON per prompt, in the same order.

    INPUT is a .txt file with one prompt per line, or a .jsonl file with one JSON object per line, optionally compressed
    with gzip (.txt.gz, .jsonl.gz). If INPUT is "-", rows are read from standard input.

    An object contains "prompt" or "prompt_token_ids", optionally an "id", and any of max_tokens, temperature, top_p,
    top_k, min_p, seed, stop, n, logprobs, echo, ignore_eos and truncate, which override the options of the command.
    Lines of OpenAI batch files, with "custom_id" and "body", are also accepted.

    All rows are validated before the model is loaded. With -o, running the same command again resumes a job that was
    interrupted; the output is identical to that of an uninterrupted run. Rows without a seed use one derived from
    --seed and their position in INPUT.

    Press Ctrl-C once to finish the rows in progress and stop, and twice to stop immediately.

    \b
    Examples:
      grok1 batch prompts.txt -o completions.jsonl -n 64 --greedy
      gunzip -c prompts.jsonl.gz | grok1 batch - | jq -r '.completions[].text'
    """
    if summarise and output is None:
        raise click.UsageError("--json requires -o, because otherwise the results are written to standard output.")
    from grok1.cli.jobs import opened_files
    from grok1.jobs.batch import CompletionJob
    from grok1.jobs.rows import RowDefaults

    if str(input_file) == "-" and stdin_is_terminal():
        terminal.note("Reading rows from the terminal; press Ctrl-D on an empty line to end.")
    with opened_files(terminal, choice, input_file, row_format, output, restart) as files:
        if sampling.seed is None:
            begun = files.begun.get("seed")
            sampling = dataclasses.replace(sampling, seed=fresh_seed() if begun is None else begun)
        defaults = RowDefaults(sampling, num_samples, echo, truncate, unescape)
        job = CompletionJob(files.source, files.checkpoint, files.tokenizer, defaults, not no_prompt)
        outcome = files.run(job, batch_size, skip_bad)
        seed = defaults.sampling.seed
        files.report(outcome, {"seed": seed}, [f"seed {seed}"], summarise)
