"""`grok1 batch`: completes a file of prompts."""

from __future__ import annotations

import dataclasses
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grok1.cli.file_job import (
    FINISHING,
    Stopping,
    check_rows,
    duration,
    job_options,
    line_of_progress,
    opened_journal,
)
from grok1.cli.options import ModelChoice, model_options, sampling_options, terminal_options
from grok1.cli.terminal import Terminal, pass_terminal
from grok1.cli.text_input import stdin_is_terminal
from grok1.engine.request import SamplingOptions
from grok1.errors import JobError, TooSmallError
from grok1.json_text import json_line

if TYPE_CHECKING:
    from grok1.checkpoint.reader import Checkpoint
    from grok1.jobs.batch import BatchOptions, BatchProgress, Survey
    from grok1.jobs.journal import Journal
    from grok1.jobs.rows import Row, RowDefaults
    from grok1.jobs.source import Source
    from grok1.model import Model
    from grok1.tokenizer import Tokenizer


@click.command("batch", short_help="Complete a file of prompts, resumably.")
@click.argument("input_file", metavar="INPUT", type=click.Path(path_type=Path))
@job_options
@click.option("--unescape", is_flag=True, help="Read \\n, \\t, \\r and \\\\ in a line of .txt as what they stand for.")
@click.option("--no-prompt", is_flag=True, help="Leave the prompts out of the results.")
@click.option("--echo", is_flag=True, help="Begin each completion's text with its prompt.")
@click.option(
    "--truncate",
    is_flag=True,
    help="Keep only the last tokens of a prompt that is longer than the model's context, rather than refuse it.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Continue this many completions at a time.  [default: what memory allows, up to what pays]",
)
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
    from grok1.checkpoint.reader import Checkpoint
    from grok1.cli.loading import read_tokenizer
    from grok1.jobs.rows import RowDefaults
    from grok1.jobs.source import Source

    stopping = Stopping()
    with stopping.caught():
        if str(input_file) == "-" and stdin_is_terminal():
            terminal.note("reading rows from the terminal; Ctrl-D at the beginning of a line ends them")
        source = Source.open(input_file, row_format)
        with opened_journal(terminal, source, output, restart) as journal:
            checkpoint = Checkpoint.open(choice.checkpoint)
            job = _Job(
                terminal=terminal,
                source=source,
                journal=journal,
                checkpoint=checkpoint,
                tokenizer=read_tokenizer(choice, checkpoint.config),
                choice=choice,
                defaults=RowDefaults(sampling, num_samples, echo, truncate, unescape),
                prompts=not no_prompt,
                batch_size=batch_size,
                stopping=stopping,
            )
            job.check(skip_bad)
            job.run(summarise)


@dataclasses.dataclass
class _Job:
    """One run of the command."""

    terminal: Terminal
    source: Source
    journal: Journal | None
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    choice: ModelChoice
    defaults: RowDefaults
    prompts: bool
    batch_size: int | None
    stopping: Stopping
    survey: Survey = dataclasses.field(init=False)
    identity: dict[str, Any] = dataclasses.field(init=False)

    def _rows(self) -> Any:
        from grok1.jobs.rows import read_rows

        return read_rows(self.source, self.defaults, self.tokenizer, self.checkpoint.config)

    def check(self, skip_bad: bool) -> None:
        """Checks all rows, and that the journal is this job's."""
        from grok1.jobs.batch import Survey
        from grok1.jobs.identity import check_same

        self.terminal.show_status("checking the rows")

        def on_bad(row: Row) -> None:
            self.terminal.clear()
            click.echo(f"{self.source.name}, line {row.line}: {row.error}", err=True)

        self.survey = Survey.of(
            self._rows(), on_bad, lambda count: self.terminal.show_status(f"checking the rows, {count} so far")
        )
        check_rows(self.terminal, self.source, self.survey.bad, self.survey.rows, skip_bad)
        self.identity = self._identity()
        begun = self.journal.job if self.journal is not None else None
        if self.journal is not None and begun is not None:
            given = {
                "seed": self.defaults.sampling.seed,
                "batch_size": self.batch_size,
                "mesh": None if self.choice.mesh is None else list(self.choice.mesh),
                "dtype": self.choice.dtype,
            }
            told = {key: value for key, value in given.items() if value is not None}
            check_same(self.journal.path, begun, self.identity | told)
        if self.defaults.sampling.seed is None:
            seed = secrets.randbelow(2**32) if begun is None else begun["seed"]
            self.defaults = dataclasses.replace(
                self.defaults, sampling=dataclasses.replace(self.defaults.sampling, seed=seed)
            )

    def _identity(self) -> dict[str, Any]:
        """All that has to be the same in a run that goes on, as far as it is known without the model."""
        from grok1.checkpoint.fingerprint import fingerprint
        from grok1.jobs.identity import versions

        sampling = dataclasses.asdict(self.defaults.sampling)
        del sampling["seed"]
        return {
            "command": "batch",
            "input": self.source.sha256,
            "format": self.source.format,
            "checkpoint": fingerprint(self.checkpoint),
            "tokenizer": self.tokenizer.sha256 if self.tokenizer is not None else None,
            **versions(),
            **sampling,
            "stop": list(self.defaults.sampling.stop),
            "num_samples": self.defaults.num_samples,
            "echo": self.defaults.echo,
            "truncate": self.defaults.truncate,
            "unescape": self.defaults.unescape,
            "no_prompt": not self.prompts,
        }

    def run(self, summarise: bool) -> None:
        """Completes what is not done yet and writes the output."""
        from grok1.jobs.batch import BatchProgress
        from grok1.jobs.identity import check_same

        journal, survey = self.journal, self.survey
        resumed = 0 if journal is None else journal.rows
        progress = BatchProgress(survey.rows, done=resumed)
        outcome: dict[str, Any] = {}
        if progress.done < survey.rows:
            with self.terminal.interruptible():
                model = self._load()
            options, settled = self._settle(model)
            if journal is not None:
                if journal.job is not None:
                    check_same(journal.path, journal.job, settled)
                journal.begin(self.identity | settled)
            outcome = self._complete(model, options, progress)
        if progress.done < survey.rows:
            self.terminal.clear()
            if journal is not None:
                self.terminal.note(
                    f"{progress.done} of {survey.rows} rows are done; the same command goes on from there"
                )
            raise KeyboardInterrupt
        if journal is not None:
            self.terminal.show_status("writing the output")
            journal.write_output(survey.rows)
        self._summarise(resumed, outcome, summarise)
        if survey.bad:
            where = "" if journal is None else f" in {journal.output}"
            raise JobError(f'{survey.bad} of {survey.rows} rows failed: their lines{where} have an "error"')

    def _load(self) -> Model:
        """Loads the model, on the mesh that the job was begun on."""
        from grok1.cli.loading import load_model

        begun = (self.journal.job if self.journal is not None else None) or {}
        mesh = begun.get("mesh")
        choice = dataclasses.replace(
            self.choice,
            mesh=self.choice.mesh or (None if mesh is None else tuple(mesh)),
            dtype=self.choice.dtype or begun.get("dtype"),
        )
        return load_model(choice, self.terminal)[0]

    def _settle(self, model: Model) -> tuple[BatchOptions, dict[str, Any]]:
        """What can only be known with the model: how the job runs, and what of that has to stay the same.

        Raises:
            TooSmallError: if the batch does not fit in memory.
        """
        from grok1.jobs.batch import BatchOptions

        begun = (self.journal.job if self.journal is not None else None) or {}
        rows = model.engine.data_rows
        wanted = -(-self.survey.completions // rows) * rows
        size = self.batch_size or begun.get("batch_size") or max(rows, min(model.best_batch_size(), wanted))
        if model.max_sequences is not None and size > max(rows, model.max_sequences):
            raise TooSmallError(
                f"there is memory for {model.max_sequences} sequences beside the weights, but the batch has {size}: "
                f"use --batch-size {model.max_sequences}, or --dtype bfloat16"
            )
        settled = {
            "seed": self.defaults.sampling.seed,
            "batch_size": size,
            "lanes": begun.get("lanes") or model.engine.lanes_for(self.survey.mean_new_tokens),
            "mesh": list(model.mesh_shape),
            "dtype": model.engine.dtype.name,
            "device": model.engine.mesh.devices.flat[0].device_kind,
        }
        return BatchOptions(size, settled["lanes"], self.survey.logprobs, self.prompts), settled

    def _complete(self, model: Model, options: BatchOptions, progress: BatchProgress) -> dict[str, Any]:
        """Completes rows until none is left or a signal comes; what there is to say of it."""
        from grok1.engine.generate import Occupancy
        from grok1.jobs.batch import complete_rows
        from grok1.jobs.results import OrderedResults

        occupancy = Occupancy()

        def rest(seconds: float) -> list[str]:
            failed = [f"{progress.failed} failed"] if progress.failed else []
            return [
                *failed,
                f"{(occupancy.read_tokens + occupancy.copied_tokens) / seconds:.0f} tokens/s in",
                f"{occupancy.generated_tokens / seconds:.1f} out",
                f"{occupancy.busy} of {occupancy.slots} slots",
            ]

        describe = line_of_progress(progress.total, lambda: progress.done, rest, self.stopping)
        results = self.journal if self.journal is not None else OrderedResults(self.terminal.write)
        start = time.perf_counter()
        with (
            self.terminal.interruptible(patient=True, hint=FINISHING),
            self.stopping.gently(),
            self.terminal.describing(describe),
        ):
            rows = self.survey.unchanged(self._rows())
            for _ in complete_rows(model, rows, results, options, progress, occupancy, self.stopping.requested):
                pass
        return {
            "seconds": time.perf_counter() - start,
            "prompt_tokens": progress.prompt_tokens,
            "completion_tokens": progress.completion_tokens,
            "read_prompt_tokens": occupancy.read_tokens,
            "batch_size": occupancy.slots,
            "mean_slot_use": occupancy.mean_use,
        }

    def _summarise(self, resumed: int, outcome: dict[str, Any], as_json: bool) -> None:
        survey, seed = self.survey, self.defaults.sampling.seed
        if as_json:
            told = {"rows": survey.rows, "resumed_rows": resumed, "failed": survey.bad, "seed": seed}
            self.terminal.write(json_line(told | outcome))
        parts = [f"{survey.rows} rows"]
        if resumed:
            parts.append(f"{survey.rows - resumed} of them now")
        if survey.bad:
            parts.append(f"{survey.bad} failed")
        if outcome:
            seconds = outcome["seconds"]
            parts += [
                f"{outcome['prompt_tokens']} tokens in ({outcome['prompt_tokens'] / seconds:.1f}/s)",
                f"{outcome['completion_tokens']} out ({outcome['completion_tokens'] / seconds:.1f}/s)",
                f"in {duration(seconds)}",
            ]
            if outcome["mean_slot_use"] is not None:
                parts.append(f"{outcome['mean_slot_use']:.0%} of {outcome['batch_size']} slots used")
        self.terminal.note("[" + " · ".join([*parts, f"seed {seed}"]) + "]")
