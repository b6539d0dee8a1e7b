"""The loop that continues sequences: gives prompts to free slots, dispatches steps, hands out tokens.

While sequences are continued, new prompts are read a part at a time between the decoding steps. The next step is
dispatched before the tokens of the last are read, so that devices do not wait for the host.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from grok1.engine.engine import BatchState, Engine, PromptPart
from grok1.engine.occupancy import Occupancy
from grok1.engine.scheduler import PromptSlots
from grok1.request import FinishReason, SamplingOptions, TokenLogprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt in token ids, to be continued `samples` times.

    Attributes:
        tokens: the prompt, of 1 to `sequence_len - 1` tokens.
        options: how to continue; its seed is not None. Stop texts are the reader's to find, see
            `GeneratedSequence.stop`.
        samples: how many continuations; the prompt is read once for all of them.
        tag: anything, handed back in `GeneratedSequence.request`.
    """

    tokens: Sequence[int]
    options: SamplingOptions
    samples: int = 1
    tag: object = None


@dataclasses.dataclass(eq=False)
class GeneratedSequence:
    """One continuation while it grows.

    Attributes:
        request: what it continues.
        sample: which of the request's samples it is.
        seed: of its random stream.
        tokens: what has been generated so far; an end-of-text token that ended it is not among them.
        logprobs: for each of these tokens, if asked for.
        finish_reason: None while it goes on.
        started: `time.perf_counter()` when it got a slot.
        prompt_read: when its first token was there.
        finished: when its last token was there.
        compile_seconds: time spent compiling before its first token.
        decode_compile_seconds: time spent compiling after it.
        limit: the most tokens that it may get.
        dispatched: tokens that it has got or that are being computed.
    """

    request: GenerationRequest
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
        """Time to read the prompt, with other prompts and decoding steps between, without compiling."""
        return max(0.0, self.prompt_read - self.started - self.compile_seconds)

    def stop(self) -> None:
        """Ends the sequence with the reason "stop"; its slot is free from the next step on."""
        self._finish("stop")

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self.finished = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """A step whose tokens have not been read: the arrays, and the row of each sequence that gets one."""

    sampled: Any
    sequences: list[tuple[int, GeneratedSequence]]


def _sequences(request: GenerationRequest, capacity: int) -> list[GeneratedSequence]:
    """The sequences of a request, which have no slot yet."""
    limit = min(request.options.max_tokens, capacity - len(request.tokens))
    seed = request.options.seed
    if limit < 1 or not request.tokens or seed is None:
        raise ValueError("a request needs a seed, and a prompt that leaves room for a token")
    return [GeneratedSequence(request, sample, seed + sample, limit) for sample in range(request.samples)]


def generate(
    engine: Engine,
    requests: Iterable[GenerationRequest],
    slots: int,
    *,
    lanes: int = 1,
    logprobs: bool = False,
    occupancy: Occupancy | None = None,
) -> Iterator[GeneratedSequence]:
    """Continues prompts, as many at a time as there are slots.

    With several lanes every step is of one shape. Then what a sequence gets, to the last bit of its log-probabilities,
    depends on its own request and on `slots`, `lanes` and `logprobs` alone, as long as the program's sums for one row
    do not depend on what is in the other rows.

    Args:
        engine: the model.
        requests: taken one by one, when a slot is free.
        slots: how many sequences go on at a time; rounded up to a multiple of the mesh's data axis.
        lanes: a step reads this many parts of prompts, of `LANE_TOKENS` each, on each data row; with 1, a part of one
            prompt, as long as it needs up to the engine's `max_chunk`.
        logprobs: computes log-probabilities in every step, rather than only where a sequence in it wants them.
        occupancy: is kept up to date.

    Yields:
        a sequence, each time it has got a token or has finished. The caller may `stop()` it then.
    """
    yield from _Loop(engine, iter(requests), slots, lanes, logprobs, occupancy or Occupancy()).run()


class _Loop:
    def __init__(
        self,
        engine: Engine,
        requests: Iterator[GenerationRequest],
        slots: int,
        lanes: int,
        logprobs: bool,
        occupancy: Occupancy,
    ):
        self._engine = engine
        self._requests = requests
        self._lanes = lanes
        self._logprobs = logprobs
        self._slots: PromptSlots[GeneratedSequence] = PromptSlots(engine, slots, lanes, occupancy)
        self._state: BatchState = engine.new_batch(len(self._slots))
        self._waiting: deque[GeneratedSequence] = deque()  # samples of the last request without a slot
        self._occupancy = occupancy

    def run(self) -> Iterator[GeneratedSequence]:
        before: list[_Dispatched] = []
        while True:
            self._admit()
            if not self._slots.count_round():
                return  # what is still dispatched belongs to nobody
            alone = self._lanes == 1 and not any(slot.owner and not slot.reading for slot in self._slots)
            steps = self._read_prompts()
            if alone:  # nobody else waits: hand out the first token before anything else
                for step in steps:
                    yield from self._hand_out(step)
                steps = []
            steps += self._decode()
            for step in before:
                yield from self._hand_out(step)
            before = steps

    def _admit(self) -> None:
        """Gives free slots to sequences."""
        while self._slots.has_free:
            if not self._waiting:
                request = next(self._requests, None)
                if request is None:
                    return
                self._waiting.extend(_sequences(request, self._engine.capacity))
            sequence = self._waiting.popleft()
            sequence.started = time.perf_counter()
            prompt = np.asarray(sequence.request.tokens, np.int32)
            self._slots.take(sequence, prompt, len(prompt) - 1)  # the last token has to be read for its logits

    def _copy_beginnings(self) -> None:
        self._state = dataclasses.replace(self._state, cache=self._slots.copy_beginnings(self._state.cache))

    def _read_prompts(self) -> list[_Dispatched]:
        """Starts a step that reads parts of prompts, if there are any to read."""
        before = self._engine.compile_seconds
        self._copy_beginnings()
        readers = self._slots.readers
        chosen = self._slots.next_parts()
        if not chosen:
            return []
        parts: list[PromptPart] = []
        ending = []
        for slot, start, end in chosen:
            sequence = slot.owner
            assert sequence is not None
            ends = (sequence.request.options, sequence.seed) if end == len(slot.prompt) else None
            if ends:
                ending.append((len(parts), sequence))
            parts.append(PromptPart(slot.index, slot.prompt[start:end], start, ends))
        wanted = self._wants_logprobs(sequence for _, sequence in ending)
        self._state, sampled, places = self._engine.read_prompts(self._state, parts, self._lanes, wanted)
        first = chosen[0].slot
        self._engine.report_reading(first.read, len(first.prompt))
        self._copy_beginnings()  # before a slot that has been read can be given to another
        compiling = self._engine.compile_seconds - before
        for sequence in readers:
            sequence.compile_seconds += compiling
        for _, sequence in ending:
            sequence.dispatched = 1
        return [_Dispatched(sampled, [(places[index], sequence) for index, sequence in ending])]

    def _wants_logprobs(self, sequences: Iterable[GeneratedSequence]) -> bool:
        return self._logprobs or any(sequence.request.options.logprobs is not None for sequence in sequences)

    def _decode(self) -> list[_Dispatched]:
        """Starts a step for every sequence that wants another token."""
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
        before = self._engine.compile_seconds
        self._state, sampled = self._engine.decode(self._state, active, wanted)
        compiling = self._engine.compile_seconds - before
        for _, sequence in rows:
            sequence.decode_compile_seconds += compiling
        return [_Dispatched(sampled, rows)]

    def _hand_out(self, step: _Dispatched) -> Iterator[GeneratedSequence]:
        """Takes the tokens of a step, waiting for it; tokens of sequences that have ended since are dropped."""
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
                    best = zip(sampled.top_tokens[row], sampled.top_logprobs[row], strict=True)
                    top = tuple((int(t), float(p)) for t, p in list(best)[: options.logprobs])
                    sequence.logprobs.append(TokenLogprobs(float(sampled.logprobs[row]), top))
                if len(sequence.tokens) == sequence.limit:
                    sequence._finish("max_tokens" if sequence.limit == options.max_tokens else "context")
            yield sequence
            if sequence.finish_reason is not None:
                self._slots.free(sequence)
