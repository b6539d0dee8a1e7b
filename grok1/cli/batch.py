"""`grok1 batch`: completes a file of prompts."""

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


@click.command("batch", short_help="Complete a file of prompts, resumably.")
@click.argument("input_file", metavar="INPUT", type=click.Path(path_type=Path))
@job_options
@click.option("--unescape", is_flag=True, help="Read \\n, \\t, \\r and \\\\ in a line of .txt as what they stand for.")
@click.option("--no-prompt", is_flag=True, help="Leave the prompts out of the results.")
@click.option("--echo", is_flag=True, help="Begin each completion's text with its prompt.")
@truncate_option
@batch_size_option
@click.option("--json", "summarise", is_flag=True, help="Print a summary as JSON at the end; needs -o.")
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
    """Complete every prompt of INPUT and write a line of JSON for each, in the order of INPUT.

    INPUT is .txt, a prompt a line, or .jsonl, an object a line; either may be compressed (.txt.gz, .jsonl.gz), and "-"
    is standard input. An object has "prompt" or "prompt_token_ids", and may have an "id" and options of its own:
    max_tokens, temperature, top_p, top_k, min_p, seed, stop, n, logprobs, echo, ignore_eos, truncate. Lines of OpenAI's
    batch files ("custom_id" and "body") will do as well. The options below are for rows that say nothing else.

    All rows are checked before the model is loaded. With -o, a job that was interrupted, killed or out of disk goes on
    where it was when the same command is run again, and the file is the same to the byte. Rows without a seed have one
    of their own, made from --seed and their place in INPUT.

    The first Ctrl-C lets the rows that have begun finish; the second stops at once.

    \b
    grok1 batch prompts.txt -o completions.jsonl -n 64 --greedy
    gunzip -c prompts.jsonl.gz | grok1 batch - | jq -r .completions[].text
    """
    if summarise and output is None:
        raise click.UsageError("--json needs -o: without it the rows themselves go to standard output, as JSON.")
    from grok1.cli.jobs import opened_files
    from grok1.jobs.batch import CompletionJob
    from grok1.jobs.rows import RowDefaults

    if str(input_file) == "-" and stdin_is_terminal():
        terminal.note("reading rows from the terminal; Ctrl-D at the beginning of a line ends them")
    with opened_files(terminal, choice, input_file, row_format, output, restart) as files:
        if sampling.seed is None:
            begun = files.begun.get("seed")
            sampling = dataclasses.replace(sampling, seed=fresh_seed() if begun is None else begun)
        defaults = RowDefaults(sampling, num_samples, echo, truncate, unescape)
        job = CompletionJob(files.source, files.checkpoint, files.tokenizer, defaults, not no_prompt)
        outcome = files.run(job, batch_size, skip_bad)
        seed = defaults.sampling.seed
        files.report(outcome, {"seed": seed}, [f"seed {seed}"], summarise)
