"""The generation loop, which admits prompts to free slots, dispatches steps and yields tokens.

Prefill of new prompts alternates with decoding, one prefill step before each decode step. Each step is dispatched
before the tokens of the previous one are fetched, so that the devices do not wait for the host.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from grok1.engine.engine import Engine
from grok1.engine.occupancy import Occupancy
from grok1.engine.programs import BatchState
from grok1.engine.scheduler import Scheduler
from grok1.request import EncodedRequest, FinishReason, TokenLogprobs, fresh_seed


@dataclasses.dataclass(eq=False)
class GeneratedSequence:
    """A completion in progress.

    Attributes:
        request: the request. The caller must check for stop texts and call `stop`.
        request_index: index of the request in the input.
        sample: index of the sample within the request.
        seed: seed of its random numbers.
        limit: maximum number of tokens.
        tokens: tokens generated so far, without the end-of-text token.
        logprobs: log-probabilities of these tokens, if requested.
        finish_reason: reason for the end, None until then.
        started: `time.perf_counter()` at admission.
        prompt_read: `time.perf_counter()` when its first token arrived.
        finished: `time.perf_counter()` when its last token arrived.
        compile_seconds: compile time before the first token.
        decode_compile_seconds: compile time after the first token.
        dispatched: number of tokens that have arrived or are being computed.
    """

    request: EncodedRequest
    request_index: int
    sample: int
    seed: int
    limit: int
    started: float = 0.0
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_read: float = 0.0
    finished: float = 0.0
    compile_seconds: float = 0.0
    decode_compile_seconds: float = 0.0
    dispatched: int = 0

    @property
    def prefill_seconds(self) -> float:
        """Time from admission to the first token, without compile time."""
        return max(0.0, self.prompt_read - self.started - self.compile_seconds)

    def stop(self) -> None:
        """Finish the sequence with the reason "stop", which frees its slot for the next step."""
        self._finish("stop")

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self.finished = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class _SampledStep:
    """A dispatched step: its outputs, and the sequences that get a token, with their rows in the outputs."""

    sampled: Any
    sequences: list[tuple[int, GeneratedSequence]]


def _sequences(index: int, request: EncodedRequest, max_seq_len: int) -> list[GeneratedSequence]:
    """Return a sequence for each sample of a request."""
    limit = min(request.options.max_tokens, max_seq_len - len(request.tokens))
    if limit < 1 or not request.tokens:
        raise ValueError(f"the prompt has {len(request.tokens)} tokens, expected 1 to {max_seq_len - 1}")
    seed = fresh_seed() if request.options.seed is None else request.options.seed
    return [GeneratedSequence(request, index, sample, seed + sample, limit) for sample in range(request.num_samples)]


def generate(
    engine: Engine,
    requests: Iterable[EncodedRequest],
    slots: int,
    *,
    lanes: int = 1,
    logprobs: bool = False,
    occupancy: Occupancy | None = None,
) -> Iterator[GeneratedSequence]:
    """Complete prompts with continuous batching.

    With several lanes all steps have the same shape. Each result, to the last bit of its log-probabilities, then
    depends only on its own request and on `slots`, `lanes` and `logprobs`, provided that the compiled program computes
    each row independently of the others.

    Args:
        engine: the model.
        requests: requests, each consumed when a slot is free.
        slots: number of sequences decoded together, rounded up to a multiple of the mesh's data axis.
        lanes: number of chunks per prefill step and data row, of `LANE_TOKENS` each; with 1, one chunk of up to the
            engine's `max_chunk` tokens.
        logprobs: whether to compute log-probabilities in every step instead of only for sequences that request them.
        occupancy: statistics to update.

    Yields:
        a sequence each time it has a new token or has finished. The caller may then `stop()` it.

    Raises:
        ValueError: if a prompt is empty or does not fit in the model's context.
    """
    return _Loop(engine, requests, slots, lanes, logprobs, occupancy or Occupancy()).run()


class _Loop:
    def __init__(
        self,
        engine: Engine,
        requests: Iterable[EncodedRequest],
        slots: int,
        lanes: int,
        logprobs: bool,
        occupancy: Occupancy,
    ):
        self._engine = engine
        self._lanes = lanes
        self._logprobs = logprobs
        self._scheduler: Scheduler[GeneratedSequence] = Scheduler(engine, slots, lanes, occupancy)
        self._slots = self._scheduler.slots
        self._state: BatchState = engine.new_batch(len(self._slots))
        self._waiting = (
            sequence
            for index, request in enumerate(requests)
            for sequence in _sequences(index, request, engine.config.sequence_len)
        )
        self._occupancy = occupancy

    def run(self) -> Iterator[GeneratedSequence]:
        previous: list[_SampledStep] = []
        while True:
            self._admit()
            if not self._scheduler.count_step():
                return  # any step still running computes tokens of finished sequences only
            only_prefill = self._lanes == 1 and not any(slot.owner and not slot.prefilling for slot in self._slots)
            steps = self._prefill()
            if only_prefill:  # nothing is being decoded: yield first tokens without waiting for another step
                for step in steps:
                    yield from self._yield_tokens(step)
                steps = []
            steps += self._decode()
            for step in previous:
                yield from self._yield_tokens(step)
            previous = steps

    def _admit(self) -> None:
        """Assign waiting sequences to free slots."""
        while self._scheduler.has_free_slot and (sequence := next(self._waiting, None)) is not None:
            sequence.started = time.perf_counter()
            prompt = np.asarray(sequence.request.tokens, np.int32)
            sharable = len(prompt) - 1  # the last token must be processed for its logits
            self._scheduler.admit(sequence, prompt, sharable, sampling=(sequence.request.options, sequence.seed))

    def _prefill(self) -> list[_SampledStep]:
        """Dispatch a prefill step if any prompt has chunks left."""
        seconds = self._engine.compile_seconds
        self._state = self._scheduler.copy_prefixes(self._state)
        prefilling = self._scheduler.prefilling
        chunks = self._scheduler.next_chunks()
        if not chunks:
            return []
        owners = [self._slots[chunk.slot].owner if chunk.sampling is not None else None for chunk in chunks]
        wanted = self._wants_logprobs(owners)
        self._state, sampled, rows = self._engine.prefill(self._state, chunks, self._lanes, wanted)
        first = self._slots[chunks[0].slot]
        self._engine.report_prefill(first.read, len(first.prompt))
        self._state = self._scheduler.copy_prefixes(self._state)  # before a source slot can be reused
        seconds = self._engine.compile_seconds - seconds
        for sequence in prefilling:
            sequence.compile_seconds += seconds
        started = [(row, owner) for row, owner in zip(rows, owners, strict=True) if owner is not None]
        for _, sequence in started:
            sequence.dispatched = 1
        return [_SampledStep(sampled, started)]

    def _wants_logprobs(self, sequences: Iterable[GeneratedSequence | None]) -> bool:
        wanting = (sequence is not None and sequence.request.options.logprobs is not None for sequence in sequences)
        return self._logprobs or any(wanting)

    def _decode(self) -> list[_SampledStep]:
        """Dispatch a decode step if any sequence needs another token."""
        rows = [
            (slot.index, slot.owner)
            for slot in self._slots
            if slot.owner is not None and 0 < slot.owner.dispatched < slot.owner.limit
        ]
        if not rows:
            return []
        active = np.zeros(len(self._slots), bool)
        for index, sequence in rows:
            active[index] = True
            sequence.dispatched += 1
        wanted = self._wants_logprobs(sequence for _, sequence in rows)
        seconds = self._engine.compile_seconds
        self._state, sampled = self._engine.decode(self._state, active, wanted)
        seconds = self._engine.compile_seconds - seconds
        for _, sequence in rows:
            sequence.decode_compile_seconds += seconds
        return [_SampledStep(sampled, rows)]

    def _yield_tokens(self, step: _SampledStep) -> Iterator[GeneratedSequence]:
        """Wait for a step and yield its sequences, except those that have finished since it was dispatched."""
        sampled = jax.device_get(step.sampled)
        now = time.perf_counter()
        eos = self._engine.config.eos_id
        for row, sequence in step.sequences:
            if sequence.finish_reason is not None:
                continue
            options = sequence.request.options
            token = int(sampled.tokens[row])
            sequence.prompt_read = sequence.prompt_read or now
            if token == eos and not options.ignore_eos:
                sequence._finish("eos")
            else:
                sequence.tokens.append(token)
                self._occupancy.generated_tokens += 1
                if options.logprobs is not None:
                    sequence.logprobs.append(sampled.entry(row, options.logprobs))
                if len(sequence.tokens) == sequence.limit:
                    sequence._finish("max_tokens" if sequence.limit == options.max_tokens else "context")
            yield sequence
            if sequence.finish_reason is not None:
                self._scheduler.release(sequence)
