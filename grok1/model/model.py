"""The Python face: `load` a checkpoint, and a `Model` that completes and scores text."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
from jax.sharding import Mesh

from grok1.host import memory
from grok1.checkpoint.audit.fingerprint import difference, identity
from grok1.checkpoint.load import load_parameters
from grok1.params.tree import abstract_parameters
from grok1.params.random import random_parameters
from grok1.checkpoint.reader import Checkpoint
from grok1.config import DTypeName, KernelsName, ModelConfig, default_dtype
from grok1.engine.compilation_cache import enable_compilation_cache
from grok1.engine.engine import Engine
from grok1.engine.generate import GeneratedSequence, GenerationRequest, generate
from grok1.engine.occupancy import Occupancy
from grok1.request import FinishReason, SamplingOptions, TokenLogprobs
from grok1.engine.score import ScoringRequest, score
from grok1.engine.replay import StepSender
from grok1.errors import CheckpointError, MultihostError, RequestError
from grok1.ops.kernels import ChosenKernels, choose_kernels
from grok1.multihost.runtime import Runtime
from grok1.ops import cpu
from grok1.plan.devices import Devices, present_devices
from grok1.plan.estimate import Estimate
from grok1.plan.verdict import room
from grok1.text.prompt import Request as Request
from grok1.text.prompt import check_token_ids, encode_prompt, encode_scored, required, window_stride, windows
from grok1.params.sharding import counts, default_mesh_shape, hosts_of, make_mesh, own_devices
from grok1.text.stop_sequences import StopMatcher
from grok1.host.threads import thread_count
from grok1.text.tokenizer import Tokenizer, find_tokenizer

_BATCH_SIZE = {"cpu": 16}  # sequences that are continued at a time, unless the caller says otherwise
_BATCH_SIZE_ACCELERATOR = 64


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a long step is doing.

    Attributes:
        stage: "checking" files, "loading" weights, "compiling" a program, "running" it for the first time, or "reading"
            a long prompt.
        detail: what in particular; of loading in several processes, which is the slowest, whose bytes these are.
        done: bytes loaded or tokens read; 0 where it is not known.
        total: bytes to load or tokens to read; 0 where it is not known.
    """

    stage: Literal["checking", "loading", "compiling", "running", "reading"]
    detail: str
    done: int = 0
    total: int = 0


ProgressCallback = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True)
class Timings:
    """How long a completion took, in seconds.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated.
        prefill_seconds: reading the prompt; 0 if another sample of the same prompt has read it.
        decode_seconds: from the first token to the last.
        compile_seconds: compiling programs on the way; in neither of the two above.
        time_to_first_token: from the start to the first token, compiling included.
    """

    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    time_to_first_token: float

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Speed of reading the prompt; None if it took no time."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Speed of generating after the first token; None if there was no second."""
        steps = self.completion_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else None


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished completion.

    Attributes:
        prompt: the prompt as it was given.
        prompt_tokens: the prompt's token ids, after truncation.
        text: what follows the prompt, cut before a stop text; the space between the two is part of it.
        tokens: the generated token ids, a stop text's included, without an end-of-text token that ended it.
        finish_reason: "eos", "stop", "max_tokens" or "context".
        stop_text: the stop text that ended it.
        seed: repeats this completion.
        sample: which of the request's samples it is.
        request_index: the place of its request among those given.
        logprobs: for each of `tokens`, if asked for.
        timings: how long it took.
    """

    prompt: str | Sequence[int]
    prompt_tokens: list[int]
    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stop_text: str | None
    seed: int
    sample: int
    request_index: int
    logprobs: list[TokenLogprobs] | None
    timings: Timings


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a text is.

    Attributes:
        tokens: the text's token ids.
        logprobs: for each token but the first, natural logarithms, with the likeliest tokens in its place.
        num_bytes: number of UTF-8 bytes of all tokens but the first; None without a tokenizer.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    num_bytes: int | None

    @property
    def total(self) -> float:
        """Sum of the log-probabilities."""
        return math.fsum(entry.logprob for entry in self.logprobs)

    @property
    def perplexity(self) -> float:
        """`exp` of the mean negative log-probability."""
        return math.exp(-self.total / len(self.logprobs))

    @property
    def bits_per_byte(self) -> float | None:
        """Negative log-probability in bits per UTF-8 byte; None without a tokenizer or if there are no bytes."""
        return -self.total / math.log(2) / self.num_bytes if self.num_bytes else None


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """How likely the tokens of one of many texts are, from the first that was to be scored on.

    Attributes:
        index: the place of the text among those given.
        logprobs: for each token, natural logarithms, with the likeliest tokens in its place.
        likeliest: the likeliest token in each place.
    """

    index: int
    logprobs: list[TokenLogprobs]
    likeliest: list[int]


class CompletionStream(Iterator[str]):
    """The text of a completion, piece by piece as it is generated.

    Iterate to get the pieces; they join to `completion.text`. No piece ends inside a character.
    """

    def __init__(self, events: Iterator[tuple[str, Completion | None]]):
        self._events = events
        self._completion: Completion | None = None

    def __next__(self) -> str:
        while True:
            piece, completion = next(self._events)
            self._completion = completion
            if piece:
                return piece

    @property
    def completion(self) -> Completion:
        """The whole, once the stream has ended.

        Raises:
            RuntimeError: if it has not.
        """
        if self._completion is None:
            raise RuntimeError("the completion is known when its stream has ended")
        return self._completion


def load(
    checkpoint: str | Path = "checkpoints",
    *,
    tokenizer: str | Path | None = None,
    mesh: tuple[int, int] | None = None,
    dtype: DTypeName | None = None,
    devices: Sequence[jax.Device] | None = None,
    load_memory: int = memory.DEFAULT_LOAD_MEMORY,
    kernels: KernelsName = "auto",
    threads: int | None = None,
    progress: ProgressCallback | None = None,
    runtime: Runtime | None = None,
) -> Model:
    """Loads a checkpoint onto the devices there are.

        model = grok1.load("checkpoints", mesh=(1, 8))
        print(model.complete("The answer is", max_tokens=8).text)

    Args:
        checkpoint: folder that holds `ckpt-0`, or is it.
        tokenizer: a SentencePiece model; by default `tokenizer.model` in or beside the checkpoint. Without one the
            model takes and gives token ids only.
        mesh: sizes of the (data, model) axes; by default all devices on `model`, as far as the model divides.
        dtype: of activations and the key/value cache; by default bfloat16 on accelerators, float32 on CPUs.
        devices: the devices to use; by default all.
        load_memory: bytes of host memory beyond the weights that loading may take at a time; at least 16 MB.
        kernels: "native" for the platform's own kernels, "xla" for what XLA makes of plain JAX; "auto" takes the first
            where they can be had.
        threads: how many the kernels for processors compute with; by default one for each physical core that the
            process may use. XLA's own are set when JAX starts: see `grok1.host.threads`.
        progress: is called while files are checked, weights loaded and programs compiled, also later by the model's
            methods, from whichever thread does the work.
        runtime: the processes that load it together, each the part of its own devices; every one of them calls this
            with the same mesh, dtype and kernels. See `grok1.multihost` and `grok1.model.worker`.

    Raises:
        CheckpointError: if there is no checkpoint or it is damaged, or that of another process is another.
        ConfigError: if its `config.json` describes no possible model.
        KernelsError: if the native kernels were asked for and cannot be had.
        MeshError: if the model cannot be divided so.
        MultihostError: if the devices are not those of the processes of `runtime`.
        TokenizerError: if the tokenizer cannot be read or has another vocabulary.
        TooSmallError: if there is too little memory; no weight has been read then.
        ValueError: if `load_memory` is too little.
    """
    report = _reporter(progress)
    report("checking", str(checkpoint))
    opened = Checkpoint.open(Path(checkpoint))
    config = opened.config
    text = _open_tokenizer(opened, tokenizer) if runtime is None or runtime.leads else None
    if runtime is not None:
        _require_same_checkpoint(runtime, opened)
    place = _Place.choose(config, mesh, dtype, devices, kernels, threads, runtime)
    start = time.perf_counter()
    if not place.takes_part:
        params = place.abstract(config)
    else:
        params = load_parameters(
            opened,
            place.mesh,
            place.dtype,
            lambda done, total: _report_loading(runtime, report, done, total),
            load_memory,
            cpu.pack_box if place.packs else None,
        )
    if runtime is not None:
        seconds = time.perf_counter() - start
        loads = runtime.exchange(
            "loaded",
            {"host": runtime.hosts[runtime.process_id], "bytes_read": opened.bytes_read, "seconds": seconds},
            lambda: _report_loading(runtime, report, 1, 1),
        )
        return place.model(config, params, report, text, loads)
    return place.model(config, params, report, text)


def random_model(
    config: ModelConfig,
    *,
    seed: int = 0,
    mesh: tuple[int, int] | None = None,
    dtype: DTypeName | None = None,
    devices: Sequence[jax.Device] | None = None,
    kernels: KernelsName = "auto",
    threads: int | None = None,
    progress: ProgressCallback | None = None,
    runtime: Runtime | None = None,
) -> Model:
    """A model of random weights made on the devices, without a checkpoint and without a tokenizer.

    Args:
        config: the model.
        seed: of the weights.
        mesh: as for `load`, as are all others.
        dtype: of activations and the key/value cache.
        devices: the devices to use.
        kernels: what computes.
        threads: of the kernels for processors.
        progress: is called as by `load`.
        runtime: as for `load`.

    Raises:
        KernelsError: as `load`.
        MeshError: as `load`.
        TooSmallError: as `load`.
    """
    report = _reporter(progress)
    place = _Place.choose(config, mesh, dtype, devices, kernels, threads, runtime)
    report("loading", "random weights")
    params = place.abstract(config)
    if place.takes_part:
        params = random_parameters(params, seed)
    return place.model(config, params, report, None)


def _require_same_checkpoint(runtime: Runtime, opened: Checkpoint) -> None:
    """Makes sure that all processes have the same checkpoint.

    Raises:
        CheckpointError: if one has another.
    """
    known = runtime.exchange("checkpoint", identity(opened))
    for process, other in enumerate(known):
        name = difference(known[0], other)
        if name is not None:
            raise CheckpointError(
                f"{runtime.name_of(process)} sees another checkpoint than {runtime.name_of(0)}: {name} differs "
                f"({_of(other, name)} there, {_of(known[0], name)} here); copy the checkpoint again, or use one folder"
            )


def _of(known: Mapping[str, str], name: str) -> str:
    told = known.get(name, "none")
    return told if len(told) <= 60 else f"{told[:57]}..."


def _report_loading(runtime: Runtime | None, report: Callable[..., None], done: int, total: int) -> None:
    """Reports how far this process is, or of several processes the slowest."""
    if runtime is None:
        report("loading", "", done, total)
        return
    runtime.report_loading(done, total)
    process, done, total = runtime.slowest()
    report("loading", f"slowest is {runtime.name_of(process)}", done, total)


def _reporter(progress: ProgressCallback | None) -> Callable[..., None]:
    """What takes the fields of a `Progress` and hands it to the caller's `progress`, if there is one."""

    def report(stage: Any, detail: str, done: int = 0, total: int = 0) -> None:
        if progress is not None:
            progress(Progress(stage, detail, done, total))

    return report


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where and how a model is to run, chosen and found to have room."""

    mesh: Mesh
    dtype: np.dtype
    kernels: ChosenKernels
    room: int | None
    idle: list[jax.Device]
    runtime: Runtime | None

    @classmethod
    def choose(
        cls,
        config: ModelConfig,
        mesh: tuple[int, int] | None,
        dtype: DTypeName | None,
        devices: Sequence[jax.Device] | None,
        kernels: KernelsName,
        threads: int | None,
        runtime: Runtime | None,
    ) -> _Place:
        everywhere = list(jax.devices() if devices is None else devices)
        kind = np.dtype(dtype or default_dtype(everywhere[0].platform))
        present, memories = _present(everywhere, runtime)
        hosts = hosts_of(everywhere, runtime.host_of) if runtime is not None else None
        if mesh is None:

            def fits(shards: int) -> bool | None:
                return Estimate(config, present, (1, shards), kind.name).fits

            mesh = default_mesh_shape(config, len(everywhere), None if hosts is None else counts(hosts), fits)
        device_mesh = make_mesh(config, mesh, everywhere, hosts)
        enable_compilation_cache()  # before the kernels of a GPU are tried, which compiles some
        chosen = choose_kernels(config, device_mesh, kernels)
        if runtime is not None:
            chosen = _agreed_kernels(runtime, chosen)
        sequences = room(Estimate(config, present, mesh, kind.name, memories))
        if chosen.backend == "cpu":
            cpu.set_threads(threads or thread_count())
        taken = set(device_mesh.devices.flat)
        idle = [device for device in everywhere if device not in taken]
        return cls(device_mesh, kind, chosen, sequences, idle, runtime)

    @property
    def packs(self) -> bool:
        """Whether weights are packed."""
        return self.kernels.backend == "cpu"

    @property
    def takes_part(self) -> bool:
        """Whether the mesh has devices of this process."""
        return bool(own_devices(self.mesh.devices.flat))

    def abstract(self, config: ModelConfig) -> Any:
        """The parameters as `jax.ShapeDtypeStruct`."""
        return abstract_parameters(config, self.mesh, self.dtype, self.packs)

    def model(
        self,
        config: ModelConfig,
        params: Any,
        report: Callable[..., None],
        tokenizer: Tokenizer | None,
        loads: Sequence[Mapping[str, Any]] = (),
    ) -> Model:
        """The model of parameters that are there."""
        sender = StepSender(self.runtime.send) if self.runtime is not None and self.runtime.leads else None
        engine = Engine(config, params, self.mesh, self.dtype, report, self.kernels.backend, sender)
        return Model(engine, tokenizer, self.room, self.kernels.fallback, self.idle, loads)


def _present(devices: Sequence[jax.Device], runtime: Runtime | None) -> tuple[Devices, tuple[int, ...] | None]:
    """The devices with the memory that is free on them, the least of any process, and whose have memory of their own.

    Processes on one host share its memory evenly.
    """
    present = dataclasses.replace(present_devices(own_devices(devices) or jax.local_devices()), count=len(devices))
    if runtime is None:
        return present, None
    found = jax.process_index(), jax.process_count()
    if found != (runtime.process_id, runtime.cluster.num_processes):
        raise MultihostError(
            f"{runtime.name_of(runtime.process_id)} of {runtime.cluster.num_processes} is process {found[0]} of "
            f"{found[1]} by its devices: give all hosts devices of one kind, and start TPU slices with --distributed"
        )
    free = present.usable_bytes
    if free is not None and present.kind.shares_memory:
        free //= runtime.host_of.count(runtime.host_of[runtime.process_id])
    known = [count for count in runtime.exchange("memory", free) if count is not None]
    processes = counts([device.process_index for device in devices])
    return dataclasses.replace(present, usable_bytes=min(known, default=None)), processes


def _agreed_kernels(runtime: Runtime, chosen: ChosenKernels) -> ChosenKernels:
    """What computes in every process: the platform's own kernels if all have them."""
    everybody = runtime.exchange("kernels", dataclasses.asdict(chosen))
    lacking = [process for process, other in enumerate(everybody) if other["backend"] == "xla"]
    if chosen.backend == "xla" or not lacking:
        return chosen
    reason = everybody[lacking[0]]["fallback"] or "it has none that are faster"
    return ChosenKernels("xla", f"{runtime.name_of(lacking[0])} cannot use them, as {reason}")


def _open_tokenizer(checkpoint: Checkpoint, given: str | Path | None) -> Tokenizer | None:
    path = find_tokenizer(checkpoint.directory, None if given is None else Path(given))
    if path is None:
        return None
    tokenizer = Tokenizer.read(path)
    tokenizer.check_vocabulary(checkpoint.config.vocab_size)
    return tokenizer


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
        """What computes: the name of kernels, such as "amx-int8", "triton" or "mosaic", or "xla"."""
        return ChosenKernels(self.engine.backend).name

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
