"""`grok1 run`: complete a prompt, or start an interactive session."""

from __future__ import annotations

from pathlib import Path

import click

from grok1.cli.loading import ModelChoice
from grok1.cli.options import model_options, output_options, sampling_options, truncate_option
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.cli.text_input import given_text
from grok1.request import Request, SamplingOptions


@click.command("run", short_help="Complete a prompt, or start an interactive session.")
@click.argument("prompt", required=False)
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Read the prompt from a UTF-8 text file.",
)
@truncate_option
@click.option("--echo", is_flag=True, help="Print the prompt before the completion. JSON output always contains both.")
@sampling_options
@model_options
@output_options
@pass_terminal
def command(
    terminal: Terminal,
    prompt: str | None,
    prompt_file: Path | None,
    truncate: bool,
    echo: bool,
    choice: ModelChoice,
    sampling: SamplingOptions,
    num_samples: int,
    as_json: bool,
) -> None:
    """Complete PROMPT and print the text as it is generated.

    If PROMPT is missing or "-", the prompt is read from standard input. If PROMPT is missing and standard input is a
    terminal, an interactive session starts: each line you type is a prompt, Ctrl-C stops its completion, and Ctrl-D
    ends the session.

    The prompt is passed to the model unchanged, except that one newline at the end of a file or of standard input is
    removed. Put "--" before a prompt that starts with a dash.

    Only the completion is printed, followed by a newline. With --num-samples, each completion is preceded by a line
    such as "--- sample 1 of 3, seed 7 ---". On a terminal, control characters are shown as symbols.

    \b
    Examples:
      grok1 run "The answer to life, the universe and everything is"
      grok1 run -c bard "ROMEO." --seed 7
      git log -1 | grok1 run --greedy -n 40
      grok1 run --prompt-file story.txt --num-samples 3 --json | jq .text
    """
    text = given_text(prompt, prompt_file, argument_name="PROMPT", file_option="--prompt-file")

    from grok1.cli.completions import CompletionPrinter
    from grok1.cli.loading import load_model, open_model
    from grok1.text.prompt import encode_request, required

    checkpoint, tokenizer = open_model(choice, terminal)
    required(tokenizer)

    def request(prompt: str) -> Request:
        return Request(prompt=prompt, options=sampling, num_samples=num_samples, truncate=truncate)

    if text is not None:  # report errors before the model is loaded
        encoded = encode_request(request(text), tokenizer, checkpoint.config)
    with terminal.interruptible():
        model, load_seconds = load_model(choice, terminal, checkpoint, tokenizer)
        printer = CompletionPrinter(terminal, model, load_seconds, as_json, echo)
        if text is not None:
            printer.run(encoded)
            return
    from grok1.cli.session import run_session

    run_session(printer, request)
