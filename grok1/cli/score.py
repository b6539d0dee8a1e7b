"""`grok1 score`: compute log-probabilities of texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grok1.cli.columns import in_one_line
from grok1.cli.loading import ModelChoice
from grok1.cli.options import batch_size_option, job_options, model_options, output_options
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.cli.text_input import checked_argument, json_ids, parsed_ids, read_file, read_stdin, stdin_is_terminal
from grok1.jobs.result_json import json_line, score_object
from grok1.jobs.source import decode_utf8
from grok1.request import MAX_LOGPROBS

if TYPE_CHECKING:
    from grok1.model import Score
    from grok1.text.tokenizer import Tokenizer


@click.command("score", short_help="Compute log-probabilities of a text or a file of texts.")
@click.argument("input_file", metavar="[INPUT]", required=False, type=click.Path(path_type=Path))
@click.option("--text", metavar="TEXT", help="Score TEXT instead of a file.")
@click.option("--ids", is_flag=True, help="Read the input as token ids; no tokenizer is needed.")
@click.option(
    "--top",
    type=click.IntRange(0, MAX_LOGPROBS),
    metavar="K",
    help="Also print the K most likely tokens at each position.",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="half of the context",
    help="For a text longer than the model's context, the distance in tokens between the starts of successive windows. "
    "Each token is scored once.",
)
@click.option(
    "--chunk",
    type=click.IntRange(min=4),
    metavar="N",
    help="Split the text into chunks of N tokens, score the second half of each, and print the cumulative perplexity "
    "after each chunk, like llama.cpp.",
)
@click.option("--bos", is_flag=True, help="Replace the first token of each chunk by BOS; requires --chunk.")
@click.option("--per-token", is_flag=True, help="Include the log-probability of each token in the results of rows.")
@batch_size_option
@job_options
@model_options
@output_options
@pass_terminal
def command(
    terminal: Terminal,
    input_file: Path | None,
    text: str | None,
    ids: bool,
    top: int | None,
    stride: int | None,
    chunk: int | None,
    bos: bool,
    per_token: bool,
    batch_size: int | None,
    output: Path | None,
    row_format: Any,
    skip_bad: bool,
    restart: bool,
    choice: ModelChoice,
    as_json: bool,
) -> None:
    """Print the log-probability of each token in INPUT given the preceding tokens, and the perplexity of the text.

    If INPUT is missing or "-", it is read from standard input. INPUT is UTF-8 text, scored unchanged, including a final
    newline. If its name ends in .json, or with --ids, it is a list of token ids.

    Log-probabilities are natural logarithms; the first token has none. Perplexity is the exponential of the mean
    negative log-probability. Bits per byte is the total negative log-probability in bits, divided by the number of
    UTF-8 bytes of the scored tokens; it requires a tokenizer.

    If the name of INPUT ends in .jsonl or .jsonl.gz, or --format is given, each line is scored separately. A line of
    JSON is an object with "text", "token_ids", or "prompt" and "completion"; in the last case only the completion is
    scored. The output is one line of JSON per row, and one for all rows together. With -o, an interrupted job can be
    resumed, as with `grok1 batch`.

    \b
    Examples:
      grok1 score essay.txt
      grok1 score --text "The answer to life" --top 3
      grok1 score answers.jsonl -o scores.jsonl
      grok1 score wiki.test.raw --chunk 512
    """
    rows = row_format is not None or (input_file is not None and input_file.name.endswith((".jsonl", ".jsonl.gz")))
    if chunk is not None or rows:
        if input_file is None or text is not None or ids:
            raise click.UsageError("--chunk and --format require INPUT, and cannot be used with --text or --ids.")
        if chunk is not None and (row_format is not None or stride is not None):
            raise click.UsageError("--chunk cannot be used with --format or --stride.")
    elif output is not None or skip_bad or restart or per_token or batch_size is not None:
        raise click.UsageError(
            "-o, --skip-bad, --restart, --per-token and --batch-size require --format, --chunk, or an INPUT whose name "
            "ends in .jsonl."
        )
    if bos and chunk is None:
        raise click.UsageError("--bos requires --chunk.")
    if not rows and chunk is None:
        _score_text(terminal, _scored_input(input_file, text, ids), top, stride, choice, as_json)
        return
    assert input_file is not None
    if rows and as_json and output is None:
        raise click.UsageError("--json requires -o, because otherwise the results are written to standard output.")

    from grok1.cli.jobs import PerplexityReporter, opened_files
    from grok1.jobs.score import ChunkJob, ScoringJob

    with opened_files(
        terminal, choice, input_file, "txt" if chunk is not None else row_format, output, restart
    ) as files:
        opened = files.source, files.checkpoint, files.tokenizer
        reporter = None
        if chunk is None:
            job = ScoringJob(*opened, stride, per_token, top)
        else:
            job = ChunkJob(*opened, None, per_token, top, chunk, bos)
            if not as_json and output is None:
                reporter = PerplexityReporter(terminal, files.reporter.shutdown, job.corpus)
        outcome = files.run(job, batch_size, skip_bad, reporter)
        metrics = {"perplexity": job.corpus.perplexity, "bits_per_byte": job.corpus.bits_per_byte}
        shown = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items() if value is not None]
        files.report(outcome, metrics, shown, as_json and output is not None)


def _score_text(
    terminal: Terminal, scored: str | list[int], top: int | None, stride: int | None, choice: ModelChoice, as_json: bool
) -> None:
    """Score one text and print the result."""
    from grok1.cli.loading import load_model, open_model
    from grok1.text.prompt import encode_scored, window_stride

    checkpoint, tokenizer = open_model(choice, terminal)
    encode_scored(scored, tokenizer, checkpoint.config)  # reports errors before the model is loaded
    window_stride(stride, checkpoint.config.sequence_len)
    with terminal.interruptible():
        model, load_seconds = load_model(choice, terminal, checkpoint, tokenizer)
        score = model.score(scored, top_logprobs=top or 0, stride=stride)
    pieces = tokenizer.pieces(score.tokens) if tokenizer is not None else None
    if as_json:
        terminal.write(json_line(score_object(score, pieces, top=top is not None) | {"load_seconds": load_seconds}))
    else:
        terminal.write(_table(score, pieces, tokenizer))


def _scored_input(file: Path | None, text: str | None, ids: bool) -> str | list[int]:
    if text is not None:
        if file is not None:
            raise click.UsageError("INPUT and --text cannot be used together.")
        text = checked_argument(text, "--text")
        return parsed_ids(text) if ids else text
    if file is None and stdin_is_terminal():
        raise click.UsageError("Missing input: pass INPUT or --text TEXT, or pipe it to standard input.")
    from_stdin = file is None or str(file) == "-"
    source = "standard input" if from_stdin else str(file)
    content = decode_utf8(read_stdin() if from_stdin or file is None else read_file(file), source)
    if file is not None and file.suffix == ".json":
        return json_ids(content, source)
    return parsed_ids(content) if ids else content


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
    if score.bits_per_byte is not None:
        lines.append(f"bits per byte          {score.bits_per_byte:.4f}")
    return "\n".join(lines) + "\n"


def _named(token: int, tokenizer: Tokenizer | None) -> str:
    return str(token) if tokenizer is None else f"{token}:{in_one_line(tokenizer.pieces([token])[0])}"
