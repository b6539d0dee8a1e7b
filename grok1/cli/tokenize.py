"""`grok1 tokenize`: convert text to token ids."""

from __future__ import annotations

from pathlib import Path

import click

from grok1.cli.columns import in_one_line
from grok1.cli.loading import ModelChoice
from grok1.cli.options import output_options, tokenizer_choice_options
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.cli.text_input import given_text
from grok1.jobs.result_json import json_line


@click.command("tokenize", short_help="Convert text to token ids.")
@click.argument("text", required=False)
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Read the text from a UTF-8 file.",
)
@click.option(
    "--pieces",
    is_flag=True,
    help="Print one token per line: its id, a tab, and its text, with ▁ for a space.",
)
@tokenizer_choice_options
@output_options
@pass_terminal
def command(
    terminal: Terminal, text: str | None, file: Path | None, pieces: bool, choice: ModelChoice, as_json: bool
) -> None:
    """Print the token ids of TEXT, separated by spaces.

    If TEXT is missing or "-", it is read from standard input. One newline at the end of a file or of standard input is
    removed. No BOS token is added, because the model does not expect one.

    \b
    Examples:
      grok1 tokenize "The answer to life"
      grok1 tokenize --pieces --file story.txt
    """
    given = given_text(text, file, argument_name="TEXT", file_option="--file")
    if given is None:
        raise click.UsageError("Missing text: pass TEXT or --file FILE, or pipe it to standard input.")
    if as_json and pieces:
        raise click.UsageError("--pieces and --json cannot be used together; JSON output always contains the pieces.")

    from grok1.cli.loading import read_tokenizer
    from grok1.text.prompt import required

    tokenizer = required(read_tokenizer(choice))
    ids = tokenizer.encode(given)
    if as_json:
        terminal.write(json_line({"token_ids": ids, "pieces": tokenizer.pieces(ids)}))
    elif pieces:
        lines = zip(ids, tokenizer.pieces(ids), strict=True)
        terminal.write("".join(f"{token}\t{in_one_line(piece)}\n" for token, piece in lines))
    else:
        terminal.write(" ".join(map(str, ids)) + "\n")
