"""The loop that continues sequences: fills free slots, dispatches decoding steps, hands out tokens.

The next step is dispatched before the tokens of the last are read, so that devices do not wait for the host.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from grok1.engine.engine import BatchState, Engine, Prompt
from grok1.engine.request import FinishReason, SamplingOptions, TokenLogprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt in token ids, to be continued `samples` times.

    Attributes:
        tokens: the prompt, of 1 to `sequence_len - 1` tokens.
        options: how to continue; its seed is not None. Stop texts are the reader's to find: see `Sequence.stop`.
        samples: how many continuations; the prompt is read once for all of them.
        tag: anything, handed back in `Generated.request`.
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
        started: `time.perf_counter()` when reading its prompt began.
        prompt_read: when its first token was there.
        finished: when its last token was there.
        prefill_seconds: time to read the prompt, without compiling; for the first sample, 0 for others.
        compile_seconds: time spent compiling before its first token.
        decode_compile_seconds: time spent compiling after it.
        limit: the most tokens that it may get.
        dispatched: tokens that it has got or that are being computed.
    """

    request: GenerationRequest
    sample: int
    seed: int
    limit: int
    started: float
    prefill_seconds: float
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_read: float = 0.0
    finished: float = 0.0
    compile_seconds: float = 0.0
    decode_compile_seconds: float = 0.0
    dispatched: int = 0

    def stop(self) -> None:
        """Ends the sequence with the reason "stop"; its slot is free from the next step on."""
        self._finish("stop")

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self.finished = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """A step whose tokens have not been read: the arrays, and the sequence of each row."""

    sampled: Any
    sequences: list[tuple[int, GeneratedSequence]]


def generate(engine: Engine, requests: Iterable[GenerationRequest], slots: int) -> Iterator[GeneratedSequence]:
    """Continues prompts, as many at a time as there are slots.

    Args:
        engine: the model.
        requests: taken one by one, when a slot is free.
        slots: how many sequences go on at a time; rounded up to a multiple of the mesh's data axis.

    Yields:
        a sequence, each time it has got a token or has finished. The caller may `stop()` it then.
    """
    yield from _Loop(engine, iter(requests), slots).run()


class _Loop:
    def __init__(self, engine: Engine, requests: Iterator[GenerationRequest], slots: int):
        self._engine = engine
        self._requests = requests
        rows = engine.data_rows
        self._state: BatchState = engine.new_batch(-(-slots // rows) * rows)
        self._slots: list[GeneratedSequence | None] = [None] * (-(-slots // rows) * rows)
        self._waiting: deque[GeneratedSequence] = deque()  # samples of the last prompt without a slot
        self._prompt: Prompt | None = None
        self._unread: deque[_Dispatched] = deque()

    def run(self) -> Iterator[GeneratedSequence]:
        while True:
            yield from self._fill_slots()
            dispatched = self._dispatch()
            if self._unread and (len(self._unread) > 1 or not dispatched):
                yield from self._read(self._unread.popleft())
            elif not dispatched and not any(self._slots):
                return

    def _fill_slots(self) -> Iterator[GeneratedSequence]:
        while None in self._slots:
            if not self._waiting:
                request = next(self._requests, None)
                if request is None:
                    return
                self._read_prompt(request)
            slot = self._slots.index(None)
            sequence = self._waiting.popleft()
            assert self._prompt is not None
            before = self._engine.compile_seconds
            self._state, first = self._engine.insert(
                self._state, self._prompt, slot, sequence.request.options, sequence.seed
            )
            sequence.compile_seconds += self._engine.compile_seconds - before
            sequence.dispatched = 1
            self._slots[slot] = sequence
            yield from self._read(_Dispatched(first, [(0, sequence)]))

    def _read_prompt(self, request: GenerationRequest) -> None:
        limit = min(request.options.max_tokens, self._engine.capacity - len(request.tokens))
        seed = request.options.seed
        if limit < 1 or not request.tokens or seed is None:
            raise ValueError("a request needs a seed, and a prompt that leaves room for a token")
        started, before = time.perf_counter(), self._engine.compile_seconds
        self._prompt = None  # its memory is free for the next
        self._prompt = self._engine.prefill(request.tokens)
        jax.block_until_ready(self._prompt.logits)
        compiling = self._engine.compile_seconds - before
        seconds = time.perf_counter() - started - compiling
        for sample in range(request.samples):
            self._waiting.append(
                GeneratedSequence(
                    request=request,
                    sample=sample,
                    seed=seed + sample,
                    limit=limit,
                    started=started,
                    prefill_seconds=seconds if sample == 0 else 0.0,
                    compile_seconds=compiling if sample == 0 else 0.0,
                )
            )

    def _dispatch(self) -> bool:
        """Starts a step for every sequence that wants another token."""
        rows = [
            (slot, sequence)
            for slot, sequence in enumerate(self._slots)
            if sequence is not None and sequence.dispatched < sequence.limit
        ]
        if not rows:
            return False
        active = np.zeros(len(self._slots), bool)
        for slot, sequence in rows:
            active[slot] = True
            sequence.dispatched += 1
        wanted = any(sequence.request.options.logprobs is not None for _, sequence in rows)
        before = self._engine.compile_seconds
        self._state, sampled = self._engine.decode(self._state, active, wanted)
        compiling = self._engine.compile_seconds - before
        for _, sequence in rows:
            sequence.decode_compile_seconds += compiling
        self._unread.append(_Dispatched(sampled, rows))
        return True

    def _read(self, step: _Dispatched) -> Iterator[GeneratedSequence]:
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
                if options.logprobs is not None:
                    best = zip(sampled.top_tokens[row], sampled.top_logprobs[row], strict=True)
                    top = tuple((int(t), float(p)) for t, p in list(best)[: options.logprobs])
                    sequence.logprobs.append(TokenLogprobs(float(sampled.logprobs[row]), top))
                if len(sequence.tokens) == sequence.limit:
                    sequence._finish("max_tokens" if sequence.limit == options.max_tokens else "context")
            yield sequence
            if sequence.finish_reason is not None:
                self._slots = [None if held is sequence else held for held in self._slots]
