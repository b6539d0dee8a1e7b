"""`grok1 detokenize`: convert token ids to text."""

from __future__ import annotations

import click

from grok1.cli.loading import ModelChoice
from grok1.cli.options import output_options, tokenizer_choice_options
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.cli.text_input import parsed_ids, read_stdin, stdin_is_terminal
from grok1.jobs.result_json import json_line
from grok1.jobs.source import decode_utf8


@click.command("detokenize", short_help="Convert token ids to text.")
@click.argument("ids", nargs=-1)
@tokenizer_choice_options
@output_options
@pass_terminal
def command(terminal: Terminal, ids: tuple[str, ...], choice: ModelChoice, as_json: bool) -> None:
    """Print the text of the token IDS, followed by a newline.

    If IDS are missing or "-", they are read from standard input. Separate ids by spaces, newlines or commas, or write
    them as a JSON list.

    \b
    Examples:
      grok1 detokenize 422 3033 356
      grok1 tokenize "The answer" | grok1 detokenize
    """
    if ids and ids != ("-",):
        numbers = parsed_ids(" ".join(ids))
    elif ids or not stdin_is_terminal():
        numbers = parsed_ids(decode_utf8(read_stdin(), "standard input"))
    else:
        raise click.UsageError("Missing token ids: pass IDS, or pipe them to standard input.")

    from grok1.cli.loading import read_tokenizer
    from grok1.text.prompt import required

    text = required(read_tokenizer(choice)).decode(numbers)
    terminal.write(json_line({"text": text}) if as_json else text + "\n")
