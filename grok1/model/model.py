"""A loaded model, which completes and scores text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import jax
import numpy as np

from grok1.config import ModelConfig
from grok1.engine.engine import Engine
from grok1.engine.generate import GeneratedSequence, generate
from grok1.engine.occupancy import Occupancy
from grok1.engine.score import ScoringRequest, score
from grok1.errors import RequestError
from grok1.host import memory
from grok1.model.results import Completion, CompletionStream, Score, Timings, TokenScores
from grok1.request import EncodedRequest, Request
from grok1.text.prompt import check_token_ids, encode_request, encode_scored, required, window_stride, windows
from grok1.text.stop_sequences import StopMatcher
from grok1.text.tokenizer import Tokenizer

_BATCH_SIZE_CPU = 16  # default number of sequences at a time for each data row
_BATCH_SIZE_ACCELERATOR = 64


class Model:
    """A loaded model.

    `complete` and `stream` take a `Request`, or a prompt with the keyword arguments of `Request.of`: the fields of
    `SamplingOptions`, `greedy=True` for `temperature=0`, and `truncate`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        max_sequences: int | None = None,
        kernels_fallback: str | None = None,
        idle: Sequence[jax.Device] = (),
        loads: Sequence[Mapping[str, Any]] = (),
    ):
        """Use `load`.

        Args:
            engine: with the weights.
            tokenizer: None to work with token ids only.
            max_sequences: number of sequences of full context that fit in memory; None if unknown.
            kernels_fallback: why XLA's kernels are used instead of native ones; None if they are not.
            idle: devices that are not on the mesh.
            loads: for each of several processes its "host", and the "bytes_read" and "seconds" of loading its part.
        """
        self.engine = engine
        self.max_sequences = max_sequences
        self.kernels_fallback = kernels_fallback
        self.idle = list(idle)
        self.loads = list(loads)
        self._tokenizer = tokenizer

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self.engine.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            TokenizerError: if the model was loaded without one.
        """
        return required(self._tokenizer)

    @property
    def mesh_shape(self) -> tuple[int, int]:
        """Sizes of the mesh's data and model axes."""
        data, model = self.engine.mesh.devices.shape
        return data, model

    @property
    def kernels(self) -> str:
        """Name of the kernels in use, such as "amx-int8", "triton", "mosaic" or "xla"."""
        return self.engine.kernels.name

    @property
    def peak_device_bytes(self) -> int | None:
        """Peak memory use of a device of this process; None if the devices do not report it."""
        return memory.peak_device_bytes(self.engine.local_devices)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Compute the next-token logits at every position of a text.

        Args:
            tokens: 1 to `sequence_len` token ids.

        Returns:
            float32 `[len(tokens), vocab]`.

        Raises:
            RequestError: if there are too few or too many tokens, or a token id is out of range.
        """
        ids = check_token_ids(tokens, self.config, at_least=1, at_most=self.config.sequence_len)
        engine = self.engine
        cache = engine.new_cache(engine.data_rows)
        chunks = []
        for start in range(0, len(ids), engine.max_chunk):
            chunk = np.tile(np.asarray(ids[start : start + engine.max_chunk], np.int32), (engine.data_rows, 1))
            logits, cache = engine.logits(cache, chunk, start)
            chunks.append(np.asarray(logits[0]))
        return np.concatenate(chunks)

    def complete(self, request: Request | str | Sequence[int], **options: Any) -> Completion:
        """Complete one prompt.

        Args:
            request: a request, or a prompt as text or token ids.
            **options: keyword arguments of `Request.of`, with a prompt.

        Raises:
            RequestError: if the prompt is empty or too long, an option is out of range, or the request asks for
                several samples.
        """
        stream = self.stream(request, **options)
        for _ in stream:
            pass
        return stream.completion

    def stream(self, request: Request | str | Sequence[int], **options: Any) -> CompletionStream:
        """Complete one prompt, returning its text while it is generated; arguments and errors as for `complete`."""
        request = Request.of(request, **options)
        if request.num_samples != 1:
            raise RequestError(f"num_samples is {request.num_samples}, expected 1; use complete_many for more")
        return CompletionStream(self._generate([self._encode(request)], 1))

    def _encode(self, request: Request) -> EncodedRequest:
        return encode_request(request, self._tokenizer, self.config)

    def best_batch_size(self) -> int:
        """The default number of sequences at a time: as many as fit in memory, up to where speed stops improving."""
        rows = self.engine.data_rows
        platform = self.engine.mesh.devices.flat[0].platform
        useful = rows * (_BATCH_SIZE_CPU if platform == "cpu" else _BATCH_SIZE_ACCELERATOR)
        return max(rows, useful if self.max_sequences is None else min(useful, self.max_sequences))

    def complete_many(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int | None = None,
        lanes: int = 1,
        logprobs: bool = False,
        occupancy: Occupancy | None = None,
    ) -> Iterator[Completion]:
        """Complete many prompts by continuous batching: several at a time, the next as soon as one has ended.

        Args:
            requests: taken one by one.
            batch_size: number of completions at a time; by default `best_batch_size`.
            lanes: number of chunks in a prefill step, see `grok1.engine.generate.generate`; with 1, prompts are read
                one after the other.
            logprobs: computes log-probabilities for all, so that those of a completion do not depend on the others.
            occupancy: kept up to date.

        Yields:
            completions in the order in which they finish; `request_index` is the index of the request.

        Raises:
            RequestError: if `batch_size` is less than 1, or, when it is taken, if a request cannot be served.
        """
        if batch_size is None:
            batch_size = self.best_batch_size()
        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}, expected at least 1")
        encoded = map(self._encode, requests)
        for _, completion in self._generate(encoded, batch_size, lanes=lanes, logprobs=logprobs, occupancy=occupancy):
            if completion is not None:
                yield completion

    def score(self, text: str | Sequence[int], *, top_logprobs: int = 0, stride: int | None = None) -> Score:
        """Compute the log-probability of each token of a text except the first.

        Args:
            text: text or token ids; at least 2 tokens.
            top_logprobs: how many of the likeliest tokens to report at each position, up to 20.
            stride: distance between the windows of a text that is longer than the context; by default half of the
                context. See `grok1.text.prompt.windows`.

        Raises:
            RequestError: if the text is too short, or `stride` is not in 1 to `sequence_len`.
        """
        ids = encode_scored(text, self._tokenizer, self.config)
        context = self.config.sequence_len
        texts = windows(ids, 1, context, window_stride(stride, context))
        scores = self.score_many(texts, top_logprobs=top_logprobs, batch_size=1)
        return Score.of_windows(ids, sorted(scores, key=attrgetter("request_index")), self._tokenizer)

    def score_many(
        self,
        texts: Iterable[tuple[Sequence[int], int]],
        *,
        top_logprobs: int = 0,
        batch_size: int | None = None,
        lanes: int = 1,
        occupancy: Occupancy | None = None,
    ) -> Iterator[TokenScores]:
        """Score many texts, several at a time; a prefix that texts share is read once.

        Args:
            texts: token ids and the index of the first token to score; taken one by one. A text has 2 to
                `sequence_len + 1` tokens, as the last one is not read.
            top_logprobs: how many of the likeliest tokens to report at each position, up to 20.
            batch_size: number of texts at a time; by default `best_batch_size`.
            lanes: as for `complete_many`.
            occupancy: kept up to date.

        Yields:
            scores in the order in which they are finished.

        Raises:
            RequestError: when a text is taken, if it has too few or too many tokens, or one that is out of range.
        """

        def requests() -> Iterator[ScoringRequest]:
            for tokens, first in texts:
                ids = check_token_ids(tokens, self.config, at_least=2, at_most=self.config.sequence_len + 1)
                if not 1 <= first < len(ids):
                    raise RequestError(f"the first token to score is {first}, expected 1 to {len(ids) - 1}")
                yield ScoringRequest(tokens=ids, first=first)

        slots = self.best_batch_size() if batch_size is None else batch_size
        done = score(self.engine, requests(), slots, lanes=lanes, logprobs=top_logprobs > 0, occupancy=occupancy)
        for sequence in done:
            scored = sequence.scored
            entries = [scored.entry(index, top_logprobs) for index in range(len(scored.tokens))]
            yield TokenScores(sequence.request_index, entries, scored.top_tokens[:, 0].tolist())

    def _generate(
        self, requests: Iterable[EncodedRequest], slots: int, **batching: Any
    ) -> Iterator[tuple[str, Completion | None]]:
        """Run requests; yield each new piece of text, and the completion when it ends one."""
        texts: dict[GeneratedSequence, _SequenceText] = {}
        for sequence in generate(self.engine, requests, slots, **batching):
            if sequence not in texts:
                texts[sequence] = _SequenceText(self._tokenizer, sequence)
            piece = texts[sequence].advance()
            yield piece, texts.pop(sequence).completion() if sequence.finish_reason is not None else None


class _SequenceText:
    """The text of one growing sequence."""

    def __init__(self, tokenizer: Tokenizer | None, sequence: GeneratedSequence):
        self._sequence = sequence
        self._stream = tokenizer.stream(sequence.request.tokens) if tokenizer is not None else None
        self._stops = StopMatcher(sequence.request.options.stop)
        self._read = 0
        self._pieces: list[str] = []
        self._stop_text: str | None = None

    def advance(self) -> str:
        """Return the text that has become certain since the last call; stop the sequence at a stop text."""
        sequence = self._sequence
        if self._stream is None:
            return ""
        new, self._read = sequence.tokens[self._read :], len(sequence.tokens)
        text = "".join(self._stream.push(token) for token in new)
        if sequence.finish_reason is not None:
            text += self._stream.flush()
        piece, self._stop_text = self._stops.push(text)
        if self._stop_text is not None:
            sequence.stop()
        elif sequence.finish_reason is not None:
            piece += self._stops.flush()
        self._pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        sequence = self._sequence
        assert sequence.finish_reason is not None
        request = sequence.request
        decoding = sequence.finished - sequence.prompt_read - sequence.decode_compile_seconds
        return Completion(
            prompt=request.prompt,
            prompt_tokens=list(request.tokens),
            text="".join(self._pieces),
            tokens=list(sequence.tokens),
            finish_reason=sequence.finish_reason,
            stop_text=self._stop_text,
            seed=sequence.seed,
            sample=sequence.sample,
            request_index=sequence.request_index,
            logprobs=list(sequence.logprobs) if request.options.logprobs is not None else None,
            timings=Timings(
                prompt_tokens=len(request.tokens),
                completion_tokens=len(sequence.tokens),
                prefill_seconds=sequence.prefill_seconds,
                decode_seconds=max(0.0, decoding),
                compile_seconds=sequence.compile_seconds + sequence.decode_compile_seconds,
                time_to_first_token=sequence.prompt_read - sequence.started,
            ),
        )
