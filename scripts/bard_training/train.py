"""Command that trains `bard` and writes it as a checkpoint in the release's format; run by `scripts/train_bard`."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import click
import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bard_training import corpus, export
from bard_training.evaluate import bits_per_byte, token_logprobs
from bard_training.model import Params, expert_shares, forward
from bard_training.run import DivergedError, Recipe, ResumeError, Run
from grok1.config import PRESETS, ModelConfig
from grok1.errors import Grok1Error
from grok1.host.atomic_write import atomic_write
from grok1.params.table import num_parameters

CORPUS = Path(__file__).resolve().parents[3] / "shared" / "corpus"
EXCERPT_TOKENS = 256
EXCERPT_LOGITS = 16


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("text", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("bard"),
    show_default=True,
    metavar="DIR",
    help="Write the checkpoint to DIR, replacing an existing one, and state, log, curve and report to DIR/training.",
)
@click.option(
    "--heldout",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Held-out text for evaluation.  [default: heldout.txt in the directory of TEXT, if it exists]",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=Recipe.steps, show_default=True, help="Number of optimizer steps."
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=Recipe.seed,
    show_default=True,
    help="Seed of the initial weights, the text order and dropout.",
)
@click.option("--restart", is_flag=True, help="Discard the saved state and start over.")
def main(text: Path | None, output: Path, heldout: Path | None, steps: int, seed: int, restart: bool) -> None:
    """Train bard on TEXT and write it as a checkpoint.

    TEXT is a UTF-8 file (default: ../shared/corpus/shakespeare.txt, relative to the repository).

    To resume an interrupted run, repeat the command. The resulting weights are the same as without the interruption.
    """
    try:
        _train_and_export(text, output, heldout, steps, seed, restart)
    except OSError as error:
        raise click.ClickException(
            f"cannot write {error.filename or output}: {error.strerror or error}; free space or choose another --output"
        ) from None
    except Grok1Error as error:
        raise click.ClickException(str(error)) from None


def _train_and_export(
    text: Path | None, output: Path, heldout: Path | None, steps: int, seed: int, restart: bool
) -> None:
    if text is None:
        text = CORPUS / "shakespeare.txt"
        if not text.is_file():
            raise click.ClickException(f"no TEXT given and {text} does not exist; pass a text to train on")
    if heldout is None and (beside := text.parent / "heldout.txt").is_file():
        heldout = beside
    console, folder = Console(stderr=True), output / "training"
    state = folder / "state.npz"
    training, dev = corpus.split_text(corpus.read_text(text))
    measured_texts = {"dev": dev} | ({} if heldout is None else {"heldout": corpus.read_text(heldout)})
    config = PRESETS["bard"]
    with console.status("training the tokenizer"):
        try:
            tokenizer = corpus.train_tokenizer(training, config.vocab_size)
        except RuntimeError:  # its message refers to SentencePiece options that this command lacks
            raise click.ClickException(
                f"{text} is too short for a vocabulary of {config.vocab_size} pieces; use a longer text"
            ) from None
        tokens = corpus.encode(tokenizer, training)
    needed = 3 * config.sequence_len
    measured = {name: (corpus.encode(tokenizer, part), len(part.encode())) for name, part in measured_texts.items()}
    if len(tokens) < needed:
        raise click.ClickException(
            f"{text} has {len(tokens)} training tokens, expected at least {needed}; use a longer text"
        )
    for name, (found, _) in measured.items():
        if len(found) < 2:
            source = heldout if name == "heldout" else f"the development set of {text}"
            raise click.ClickException(f"{source} has {len(found)} tokens, expected at least 2; use a longer text")
    folder.mkdir(parents=True, exist_ok=True)
    if restart:
        state.unlink(missing_ok=True)
    try:
        run = Run(folder, Recipe(config, steps, seed), tokens, measured)
        finished = _train(run, console)
    except ResumeError as error:
        raise click.ClickException(
            f"{error}; use the same text and options as before, choose another --output, or start over with --restart"
        ) from None
    except DivergedError as error:
        raise click.ClickException(f"{error}; start over with --restart and another --seed") from None
    if not finished:
        click.echo(f"stopped after step {run.done} of {steps}; repeat the command to resume", err=True)
        raise SystemExit(130)
    with console.status("writing the checkpoint"):
        export.write(output, config, run.params, tokenizer)
        export.pack(output, folder / "bard.zip")
        _plot(run.log, list(measured), folder / "curve.png")
    with console.status("evaluating"):
        report = _report(run, output, measured)
        name = "heldout" if heldout is not None else "dev"
        _write_excerpt(folder / "excerpt.npz", output, measured[name][0][:EXCERPT_TOKENS])
    with atomic_write(folder / "report.json") as file:
        file.write(json.dumps(report, indent=2) + "\n")
    click.echo(json.dumps(report, indent=2))


def _train(run: Run, console: Console) -> bool:
    """Run the remaining steps with a progress bar on terminals; SIGINT and SIGTERM stop it after the current step."""
    stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("training", total=run.recipe.steps, completed=run.done)

            def report(run: Run) -> None:
                progress.update(task, completed=run.done)
                if run.log and run.log[-1]["step"] == run.done:
                    progress.console.print(_line(run.log[-1]), highlight=False, soft_wrap=True)

            return run.train(report=report, stop=lambda: stopping)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _line(entry: dict[str, Any]) -> str:
    bits = [f"{name} {value:.4f}" for name, value in entry.items() if name.endswith("bits_per_byte")]
    train, speed = entry["train_nats_per_token"], entry["tokens"] / entry["seconds"]
    return f"step {entry['step']}: train {train:.4f} nats per token, {', '.join(bits)}; {speed:,.0f} tokens/s"


def _report(run: Run, checkpoint: Path, measured: dict[str, tuple[np.ndarray, int]]) -> dict[str, Any]:
    """Evaluate the finished run with its float32 weights and with the quantized weights of the checkpoint."""
    config, quantized = export.read(checkpoint)
    archive = run.folder / "bard.zip"
    report: dict[str, Any] = {
        "parameters": num_parameters(config),
        "steps": run.done,
        "tokens": run.log[-1]["tokens"],
        "epochs": run.log[-1]["tokens"] / len(run.tokens),
        "seconds": round(run.seconds, 1),
        "checkpoint_bytes": sum(path.stat().st_size for path in (checkpoint / "ckpt-0").iterdir()),
        "archive_bytes": archive.stat().st_size,
    }
    for name, (tokens, num_bytes) in measured.items():
        for weights, params in (("float32", run.params), ("int8", quantized)):
            logprobs = token_logprobs(config, params, tokens, config.sequence_len)
            report[f"{name}_{weights}"] = {
                "bits_per_byte": bits_per_byte(logprobs, num_bytes),
                "perplexity": math.exp(-float(np.mean(logprobs))),
            }
        report[f"{name}_expert_shares"] = expert_shares(config, quantized, tokens).round(4).tolist()
    return report


def _write_excerpt(path: Path, checkpoint: Path, tokens: np.ndarray) -> None:
    """Write log-probabilities and some logits of the checkpoint as expected values for tests."""
    config, params = export.read(checkpoint)
    logits = np.asarray(_logits(config, params, tokens), np.float64)
    shifted = logits[:-1] - logits[:-1].max(axis=-1, keepdims=True)
    logprobs = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    with atomic_write(path, "wb") as file:
        np.savez_compressed(
            file,
            tokens=tokens,
            logprobs=np.take_along_axis(logprobs, tokens[1:, None], axis=-1)[:, 0].astype(np.float32),
            last_logits=logits[-EXCERPT_LOGITS:].astype(np.float32),
        )


def _logits(config: ModelConfig, params: Params, tokens: np.ndarray) -> jax.Array:
    return forward(config, params, tokens[None])[0][0]


def _plot(log: list[dict[str, Any]], names: list[str], path: Path) -> None:
    """Plot the learning curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    tokens = [entry["tokens"] / 1e6 for entry in log]
    for name in names:
        axes.plot(tokens, [entry[f"{name}_bits_per_byte"] for entry in log], label=name, marker=".")
    axes.set(xlabel="million training tokens", ylabel="bits per byte", title="Learning curve of bard")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
