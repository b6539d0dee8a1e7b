"""Printing of completions, streamed as text or as JSON, with a line of statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grok1.cli.terminal import Terminal
from grok1.host import memory
from grok1.jobs.result_json import completion_object, json_line

if TYPE_CHECKING:
    from grok1.model import Completion, Model
    from grok1.request import Request

_MAX_BATCH = 16  # samples generated together

_FINISH_REASONS = {
    "eos": "end of text",
    "stop": "stop text",
    "max_tokens": "max tokens",
    "context": "full context",
}


@dataclasses.dataclass
class CompletionPrinter:
    """Completes prompts with one model and prints the results.

    Attributes:
        terminal: where to print.
        model: the model.
        load_seconds: time taken to load the model.
        as_json: whether to print JSON, one object per sample, instead of text.
        echo: whether to print the prompt before the text.
    """

    terminal: Terminal
    model: Model
    load_seconds: float
    as_json: bool
    echo: bool
    _compiled: bool = dataclasses.field(default=False, init=False)

    def run(self, request: Request) -> None:
        """Complete a prompt and print all its samples."""
        if request.num_samples > 1:
            self._print_samples(request)
        else:
            self._print_stream(request)

    def _print_stream(self, request: Request) -> None:
        terminal = self.terminal
        terminal.show_status("processing the prompt")
        stream = self.model.stream(request)
        if self.as_json:
            for count, _ in enumerate(stream, 1):
                terminal.show_status(f"generating, {count} pieces of text")
            terminal.write(self._json_line(stream.completion))
        else:
            first = (str(request.prompt) if self.echo else "") + next(stream, "")
            if not self._compiled and terminal.shows:
                first += next(stream, "")  # so that compiling the decode step is reported before text is shown
            self._compiled = True
            terminal.write(first)
            for piece in stream:
                terminal.write(piece)
            self._end_text()
        terminal.note(self._statistics([stream.completion]))

    def _print_samples(self, request: Request) -> None:
        terminal, count = self.terminal, request.num_samples
        finished: dict[int, Completion] = {}
        completions: list[Completion] = []
        terminal.show_status(f"generating {count} samples")
        together = min(count, _MAX_BATCH, self.model.max_sequences or count)
        for completion in self.model.complete_many([request], batch_size=together):
            finished[completion.sample] = completion
            while len(completions) in finished:
                completions.append(finished.pop(len(completions)))
                self._print_sample(completions[-1], count)
            done = len(completions) + len(finished)
            if done < count:
                terminal.show_status(f"generating {count} samples, {done} finished")
        terminal.note(self._statistics(completions))

    def _print_sample(self, completion: Completion, count: int) -> None:
        if self.as_json:
            self.terminal.write(self._json_line(completion))
            return
        self.terminal.write(f"--- sample {completion.sample + 1} of {count}, seed {completion.seed} ---\n")
        if self.echo:
            self.terminal.write(str(completion.prompt))
        self.terminal.write(completion.text)
        self._end_text()

    def _end_text(self) -> None:
        """End a printed text: start a new line on a terminal if necessary, else print exactly one newline."""
        if self.terminal.shows_results:
            self.terminal.end_line()
        else:
            self.terminal.write("\n")

    def _json_line(self, completion: Completion) -> str:
        fields = completion_object(completion, alone=True) | {
            "load_seconds": self.load_seconds,
            "peak_memory_bytes": memory.peak_resident_bytes(),
            "peak_device_memory_bytes": self.model.peak_device_bytes,
            "mesh": list(self.model.mesh_shape),
        }
        return json_line(fields | ({"processes": self.model.loads} if self.model.loads else {}))

    def _statistics(self, completions: Sequence[Completion]) -> str:
        first = completions[0]
        tokens_out = sum(completion.timings.completion_tokens for completion in completions)
        seconds = max(completion.timings.decode_seconds for completion in completions)
        steps = sum(max(0, completion.timings.completion_tokens - 1) for completion in completions)
        decode = steps / seconds if steps and seconds > 0 else None
        parts = [
            f"{_count(first.timings.prompt_tokens, 'prompt token')}{_rate(first.timings.prefill_tokens_per_second)}",
            f"{_count(tokens_out, 'generated token')}{_rate(decode)}",
            f"time to first token {first.timings.time_to_first_token:.2f} s",
        ]
        if first.timings.compile_seconds >= 0.1:
            parts.append(f"compile time {first.timings.compile_seconds:.1f} s")
        peaks = [(memory.peak_resident_bytes(), ""), (self.model.peak_device_bytes, " per device")]
        if known := [f"{peak / 1e9:.2f} GB{where}" for peak, where in peaks if peak is not None]:
            parts.append(f"peak memory {', '.join(known)}")
        parts.append(
            "stopped at "
            + ", ".join(dict.fromkeys(_FINISH_REASONS[completion.finish_reason] for completion in completions))
        )
        several = len(completions) > 1
        parts.append(f"seeds {first.seed} to {completions[-1].seed}" if several else f"seed {first.seed}")
        return "[" + " · ".join(parts) + "]"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _rate(tokens_per_second: float | None) -> str:
    return "" if tokens_per_second is None else f" ({tokens_per_second:.1f}/s)"
