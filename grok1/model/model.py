"""A loaded model, which completes and scores text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from grok1.config import ModelConfig
from grok1.engine.engine import Engine
from grok1.engine.generate import GeneratedSequence, GenerationRequest, generate
from grok1.engine.occupancy import Occupancy
from grok1.engine.score import ScoringRequest, score
from grok1.errors import RequestError
from grok1.host import memory
from grok1.model.results import Completion, CompletionStream, Score, Timings, TokenScores
from grok1.request import SamplingOptions, TokenLogprobs
from grok1.text.prompt import Request as Request
from grok1.text.prompt import check_token_ids, encode_prompt, encode_scored, required, window_stride, windows
from grok1.text.stop_sequences import StopMatcher
from grok1.text.tokenizer import Tokenizer

_BATCH_SIZE = {"cpu": 16}  # sequences that are continued at a time, unless the caller says otherwise
_BATCH_SIZE_ACCELERATOR = 64


class Model:
    """A loaded model.

    Options of `complete` and `stream` are those of `SamplingOptions`; `greedy=True` stands for `temperature=0`.
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
            engine: the weights on their devices.
            tokenizer: None to work with token ids only.
            max_sequences: how many caches of full context there is memory for, beside the weights; None if not known.
            kernels_fallback: why XLA computes where there might have been kernels; None if it does not.
            idle: devices that are there and not on the mesh.
            loads: for each of several processes its "host", and the "bytes_read" and "seconds" that its part took.
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
        """Name of the kernels, such as "amx-int8", "triton", "mosaic" or "xla"."""
        return self.engine.kernels.name

    @property
    def peak_device_bytes(self) -> int | None:
        """The most memory that one device of this process has held, if the devices say."""
        return memory.peak_device_bytes(self.engine.local_devices)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Next-token logits at every place of a text.

        Args:
            tokens: 1 to `sequence_len` token ids.

        Returns:
            float32 `[len(tokens), vocab]`.

        Raises:
            RequestError: if there are too few or too many tokens, or an id is none of the model's.
        """
        ids = check_token_ids(tokens, self.config, at_least=1, at_most=self.config.sequence_len)
        engine = self.engine
        cache = engine.new_cache(engine.data_rows)
        parts = []
        for start in range(0, len(ids), engine.max_chunk):
            chunk = np.tile(np.asarray(ids[start : start + engine.max_chunk], np.int32), (engine.data_rows, 1))
            logits, cache = engine.read(cache, chunk, start)
            parts.append(np.asarray(logits[0]))
        return np.concatenate(parts)

    def complete(
        self, prompt: str | Sequence[int], *, truncate: bool = False, greedy: bool = False, **options: Any
    ) -> Completion:
        """Completes one prompt.

        Args:
            prompt: text, or token ids.
            truncate: whether a prompt that is too long loses its beginning, rather than being an error.
            greedy: stands for `temperature=0`.
            **options: fields of `SamplingOptions`.

        Raises:
            RequestError: if the prompt is empty or too long, or an option is out of range.
        """
        stream = self.stream(prompt, truncate=truncate, greedy=greedy, **options)
        for _ in stream:
            pass
        return stream.completion

    def stream(
        self, prompt: str | Sequence[int], *, truncate: bool = False, greedy: bool = False, **options: Any
    ) -> CompletionStream:
        """Completes one prompt, giving its text while it is generated; arguments as for `complete`."""
        if greedy:
            options["temperature"] = 0.0
        request = Request(prompt=prompt, options=SamplingOptions(**options), truncate=truncate)
        # A bad prompt is told now, not when the stream is read.
        tokens = encode_prompt(request, self._tokenizer, self.config)
        return CompletionStream((piece, done) for piece, done in self._events([(0, request, tokens)], 1))

    def best_batch_size(self) -> int:
        """How many completions go on at a time unless the caller says otherwise: what memory allows, up to what pays.

        A mesh has room for a multiple of its data rows.
        """
        rows = self.engine.data_rows
        pays = _BATCH_SIZE.get(self.engine.mesh.devices.flat[0].platform, _BATCH_SIZE_ACCELERATOR) * rows
        return max(rows, min(pays, pays if self.max_sequences is None else self.max_sequences))

    def complete_many(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int | None = None,
        lanes: int = 1,
        logprobs: bool = False,
        occupancy: Occupancy | None = None,
    ) -> Iterator[Completion]:
        """Completes many prompts, several at a time, taking the next as soon as one has ended.

        Args:
            requests: what to complete; taken one by one.
            batch_size: how many completions go on at a time; by default `best_batch_size`.
            lanes: how many parts of prompts are read at a time, see `generate`; with 1, one prompt after the other.
            logprobs: computes log-probabilities for all, which keeps a completion's own the same in any company.
            occupancy: is kept up to date.

        Yields:
            completions in the order in which they end; `request_index` says whose each is.

        Raises:
            RequestError: when a request's turn comes and it cannot be served, or if there is no place for any.
        """
        if batch_size is None:
            batch_size = self.best_batch_size()
        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}, expected at least 1")
        prepared = (
            (i, request, encode_prompt(request, self._tokenizer, self.config)) for i, request in enumerate(requests)
        )
        for _, completion in self._events(prepared, batch_size, lanes=lanes, logprobs=logprobs, occupancy=occupancy):
            if completion is not None:
                yield completion

    def score(self, text: str | Sequence[int], *, top_logprobs: int = 0, stride: int | None = None) -> Score:
        """The log-probability of each token of a text but the first.

        Args:
            text: text, or token ids; at least 2 tokens.
            top_logprobs: how many of the likeliest tokens to report at each place, up to 20.
            stride: how far apart the windows are in which a text is read that is longer than the context; by default
                half of the context. See `grok1.text.prompt.windows`.

        Raises:
            RequestError: if the text is too short, or `stride` is not 1 to `sequence_len`.
        """
        ids = encode_scored(text, self._tokenizer, self.config)
        context = self.config.sequence_len
        parts = windows(len(ids), 1, context, window_stride(stride, context))
        texts = [(ids[part.start : part.end], part.first - part.start) for part in parts]
        scores = sorted(
            self.score_many(texts, top_logprobs=top_logprobs, batch_size=1), key=lambda scores: scores.index
        )
        num_bytes = None if self._tokenizer is None else self._tokenizer.count_bytes(ids, 1)
        return Score(ids, [entry for scores in scores for entry in scores.logprobs], num_bytes)

    def score_many(
        self,
        texts: Iterable[tuple[Sequence[int], int]],
        *,
        top_logprobs: int = 0,
        batch_size: int | None = None,
        lanes: int = 1,
        occupancy: Occupancy | None = None,
    ) -> Iterator[TokenScores]:
        """Scores many texts, several at a time, sharing what they begin with.

        Args:
            texts: token ids, and the index of the first of them to be scored; taken one by one. A text has 2 to
                `sequence_len + 1` tokens, as the last one is not read.
            top_logprobs: how many of the likeliest tokens to report at each place, up to 20.
            batch_size: how many texts are read at a time; by default `best_batch_size`.
            lanes: as for `complete_many`.
            occupancy: is kept up to date.

        Yields:
            in the order in which they are done.

        Raises:
            RequestError: when a text's turn comes, if it has too few or too many tokens, or one that is none.
        """

        def requests() -> Iterator[ScoringRequest]:
            for index, (tokens, first) in enumerate(texts):
                ids = check_token_ids(tokens, self.config, at_least=2, at_most=self.config.sequence_len + 1)
                if not 1 <= first < len(ids):
                    raise RequestError(f"tokens are to be scored from {first} on, expected 1 to {len(ids) - 1}")
                yield ScoringRequest(tokens=ids, first=first, tag=index)

        slots = self.best_batch_size() if batch_size is None else batch_size
        done = score(self.engine, requests(), slots, lanes=lanes, logprobs=top_logprobs > 0, occupancy=occupancy)
        for sequence in done:
            scored = sequence.scored
            entries = [
                TokenLogprobs(
                    float(logprob),
                    tuple((int(t), float(p)) for t, p in zip(best[:top_logprobs], values[:top_logprobs], strict=True)),
                )
                for logprob, best, values in zip(scored.logprobs, scored.top_tokens, scored.top_logprobs, strict=True)
            ]
            likeliest = [int(best[0]) for best in scored.top_tokens]
            yield TokenScores(cast(int, sequence.request.tag), entries, likeliest)

    def _events(
        self, prepared: Iterable[tuple[int, Request, list[int]]], slots: int, **batching: Any
    ) -> Iterator[tuple[str, Completion | None]]:
        """Runs requests, by `generate`; gives each new piece of text, and the completion where it ended one."""
        requests = (
            GenerationRequest(
                tokens=tokens,
                options=request.options.with_seed(),
                samples=request.num_samples,
                tag=(i, request),
            )
            for i, request, tokens in prepared
        )
        texts: dict[GeneratedSequence, _TextOfSequence] = {}
        for sequence in generate(self.engine, requests, slots, **batching):
            if sequence not in texts:
                texts[sequence] = _TextOfSequence(self._tokenizer, sequence)
            text = texts[sequence]
            piece = text.advance()
            if sequence.finish_reason is None:
                yield piece, None
            else:
                del texts[sequence]
                yield piece, text.completion()


class _TextOfSequence:
    """The text of one growing sequence."""

    def __init__(self, tokenizer: Tokenizer | None, sequence: GeneratedSequence):
        self._sequence = sequence
        self._stream = tokenizer.stream(sequence.request.tokens) if tokenizer is not None else None
        self._stops = StopMatcher(sequence.request.options.stop)
        self._read = 0
        self._pieces: list[str] = []
        self._stop_text: str | None = None

    def advance(self) -> str:
        """The text that has become certain since the last call; stops the sequence at a stop text."""
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
        index, request = cast(tuple[int, Request], sequence.request.tag)
        wants_logprobs = sequence.request.options.logprobs is not None
        decoding = sequence.finished - sequence.prompt_read - sequence.decode_compile_seconds
        return Completion(
            prompt=request.prompt,
            prompt_tokens=list(sequence.request.tokens),
            text="".join(self._pieces),
            tokens=list(sequence.tokens),
            finish_reason=sequence.finish_reason,
            stop_text=self._stop_text,
            seed=sequence.seed,
            sample=sequence.sample,
            request_index=index,
            logprobs=list(sequence.logprobs) if wants_logprobs else None,
            timings=Timings(
                prompt_tokens=len(sequence.request.tokens),
                completion_tokens=len(sequence.tokens),
                prefill_seconds=sequence.prefill_seconds,
                decode_seconds=max(0.0, decoding),
                compile_seconds=sequence.compile_seconds + sequence.decode_compile_seconds,
                time_to_first_token=sequence.prompt_read - sequence.started,
            ),
        )
