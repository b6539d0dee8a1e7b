"""`grok1 score`: how likely the model finds a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from grok1.cli.detokenize import json_ids, parsed_ids
from grok1.cli.options import ModelChoice, model_options, output_options
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.cli.text_input import checked_argument, decoded, read_file, read_stdin, stdin_is_terminal
from grok1.cli.tokenize import in_one_line
from grok1.engine.request import MAX_LOGPROBS
from grok1.json_text import finite, json_line, top_object

if TYPE_CHECKING:
    from grok1.model import Score
    from grok1.tokenizer import Tokenizer


@click.command("score", short_help="Tell how likely the model finds a text.")
@click.argument("input_file", metavar="[INPUT]", required=False, type=click.Path(path_type=Path))
@click.option("--text", metavar="TEXT", help="Score this text instead of a file.")
@click.option("--ids", is_flag=True, help="Take the input for token ids, whatever its name; no tokenizer is needed.")
@click.option(
    "--top",
    type=click.IntRange(0, MAX_LOGPROBS),
    metavar="K",
    help=f"Tell the K likeliest tokens in each place too, 0 to {MAX_LOGPROBS}.",
)
@model_options
@output_options
@pass_terminal
def command(
    terminal: Terminal,
    input_file: Path | None,
    text: str | None,
    ids: bool,
    top: int | None,
    choice: ModelChoice,
    as_json: bool,
) -> None:
    """Print the log-probability of each token of INPUT given those before it, and the perplexity of the whole.

    INPUT is a file, or "-" or nothing for what comes through a pipe. It is UTF-8 text, taken exactly as it is, with
    any newline at its end; or, if its name ends in .json or with --ids, a list of token ids. Logarithms are natural;
    the first token has none before it and so no log-probability. The perplexity is the exponential of the mean
    negative log-probability.

    \b
    grok1 score essay.txt
    grok1 score --text "The answer to life" --top 3
    """
    scored = _scored_input(input_file, text, ids)

    from grok1.cli.loading import load_model, read_config, read_tokenizer
    from grok1.prompt import encode_scored

    config = read_config(choice)
    tokenizer = read_tokenizer(choice, config)  # ids can be scored without one
    encode_scored(scored, tokenizer, config)
    with terminal.interruptible():
        model, load_seconds = load_model(choice, terminal)
        score = model.score(scored, top_logprobs=top or 0)
    pieces = tokenizer.pieces(score.tokens) if tokenizer is not None else None
    if as_json:
        terminal.write(json_line(_score_object(score, pieces, top, load_seconds)))
    else:
        terminal.write(_table(score, pieces, tokenizer))


def _scored_input(file: Path | None, text: str | None, ids: bool) -> str | list[int]:
    if text is not None:
        if file is not None:
            raise click.UsageError("INPUT and --text are both given: give one of them.")
        text = checked_argument(text, "--text")
        return parsed_ids(text) if ids else text
    if file is None and stdin_is_terminal():
        raise click.UsageError("there is no text: give INPUT, --text TEXT, or pipe it in.")
    from_stdin = file is None or str(file) == "-"
    source = "standard input" if from_stdin else str(file)
    content = decoded(read_stdin() if from_stdin or file is None else read_file(file), source)
    if file is not None and file.suffix == ".json":
        return json_ids(content, source)
    return parsed_ids(content) if ids else content


def _score_object(score: Score, pieces: list[str] | None, top: int | None, load_seconds: float) -> dict[str, object]:
    told: dict[str, object] = {
        "token_ids": score.tokens,
        "pieces": pieces,
        "logprobs": [None, *(finite(entry.logprob) for entry in score.logprobs)],
    }
    if top is not None:
        told["top"] = [None, *(top_object(entry) for entry in score.logprobs)]
    return told | {
        "total_logprob": finite(score.total),
        "perplexity": finite(score.perplexity),
        "num_tokens": len(score.tokens),
        "load_seconds": load_seconds,
    }


def _table(score: Score, pieces: list[str] | None, tokenizer: Tokenizer | None) -> str:
    from rich.cells import cell_len

    shown = [in_one_line(piece) for piece in pieces] if pieces is not None else [""] * len(score.tokens)
    width = max(5, *map(cell_len, shown))
    lines = [f"{'index':>6}  {'id':>7}  {'piece':<{width}}  {'logprob':>10}"]
    for index, (token, piece) in enumerate(zip(score.tokens, shown, strict=True)):
        entry = score.logprobs[index - 1] if index else None
        logprob = f"{entry.logprob:10.4f}" if entry else f"{'-':>10}"
        line = f"{index:>6}  {token:>7}  {piece}{' ' * (width - cell_len(piece))}  {logprob}"
        if entry is not None and entry.top:
            line += "  " + "  ".join(f"{_named(likely, tokenizer)} {value:.4f}" for likely, value in entry.top)
        lines.append(line)
    lines += [
        "",
        f"total log-probability  {score.total:.4f}",
        f"tokens                 {len(score.tokens)} ({len(score.logprobs)} scored)",
        f"perplexity             {score.perplexity:.4f}",
    ]
    return "\n".join(lines) + "\n"


def _named(token: int, tokenizer: Tokenizer | None) -> str:
    return str(token) if tokenizer is None else f"{token}:{in_one_line(tokenizer.pieces([token])[0])}"
