"""Grok-1 for EleutherAI's lm-evaluation-harness; requires `pip install '.[eval]'`.

    import lm_eval
    from grok1.integrations.lm_eval import Grok1LM

    lm_eval.simple_evaluate(model=Grok1LM("checkpoints"), tasks=["arc_easy"])

With the harness's own command line:

    python -m grok1.integrations.lm_eval run --model grok1 --model_args checkpoint=checkpoints --tasks arc_easy
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from grok1.errors import RequestError
from grok1.jobs.validate import shared_prefix
from grok1.request import Request, SamplingOptions

if TYPE_CHECKING:
    from grok1.model import Model

_MAX_TOKENS = 256  # of a task without a limit
_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "seed"}


@register_model("grok1")
class Grok1LM(TemplateLM):
    """A model for the harness. A text without a context is scored after BOS, as with Hugging Face models."""

    def __init__(
        self,
        checkpoint: str = "checkpoints",
        tokenizer: str | None = None,
        mesh: str | tuple[int, int] | None = None,
        dtype: Any = None,
        batch_size: int | str | None = None,
        model: Model | None = None,
        **harness: Any,
    ):
        """Load a checkpoint.

        Args:
            checkpoint: as for `grok1.load`.
            tokenizer: as for `grok1.load`.
            mesh: sizes of the (data, model) axes, also as a text such as "1x8".
            dtype: as for `grok1.load`.
            batch_size: number of sequences at a time; None or "auto" for `Model.best_batch_size`.
            model: a loaded model to use instead.
            **harness: arguments that the harness passes to every model; ignored.
        """
        super().__init__()
        if model is None:
            from grok1.model import load

            shape = tuple(int(size) for size in mesh.split("x")) if isinstance(mesh, str) else mesh
            model = load(checkpoint, tokenizer=tokenizer, mesh=shape, dtype=dtype)  # type: ignore[arg-type]
        self.model = model
        self._batch_size = None if batch_size in (None, "auto") else int(batch_size)

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self.model.config.eos_id

    @property
    def prefix_token_id(self) -> int:
        """BOS, the context of a text without one."""
        return self.model.config.bos_id

    @property
    def max_length(self) -> int:
        """The model's context, in tokens."""
        return self.model.config.sequence_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        return self.model.tokenizer.encode(string)

    def _lanes(self, texts: Sequence[list[int]]) -> int:
        """Number of prefill lanes for texts that are read one after the other."""
        pairs = itertools.pairwise([[], *texts])
        new = sum(len(text) - shared_prefix(previous, text) for previous, text in pairs)
        return self.model.engine.lanes_for(new / max(1, len(texts)))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation after its context, and whether greedy decoding would generate it.

        The beginning of a text that is longer than the model's context is dropped.
        """
        texts: list[tuple[list[int], int]] = []
        for _, context, continuation in requests:
            whole = (context + continuation)[-(self.max_length + 1) :]
            texts.append((whole, max(1, len(whole) - len(continuation))))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
        wanted = [index for index, (_, _, continuation) in enumerate(requests) if continuation]
        scores = self.model.score_many(
            (texts[index] for index in wanted),
            batch_size=self._batch_size,
            lanes=self._lanes([texts[index][0] for index in wanted]),
        )
        for score in tqdm(scores, total=len(wanted), desc="scoring", disable=disable_tqdm):
            index = wanted[score.request_index]
            tokens, first = texts[index]
            total = sum(entry.logprob for entry in score.logprobs)
            results[index] = total, score.likeliest == tokens[first:]
            asked = requests[index][0]
            if asked[1]:
                self.cache_hook.add_partial("loglikelihood", asked, results[index])
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, in disjoint windows as long as the model's context."""
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            disjoint = [utils.make_disjoint_window(window) for window in rolling]
            windows += [(("", ""), list(context), list(continuation)) for context, continuation in disjoint]
            counts.append(len(disjoint))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(score for score, _ in itertools.islice(scores, count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Complete each context up to one of its `until` texts, greedily unless `do_sample` is set.

        Raises:
            RequestError: if a task has an unknown option.
        """
        asked = [self._request(*request.args) for request in requests]
        completions = self.model.complete_many(
            asked,
            batch_size=self._batch_size,
            lanes=self._lanes([list(request.prompt) for request in asked]),  # type: ignore[arg-type]
        )
        texts = [""] * len(asked)
        for completion in tqdm(completions, total=len(asked), desc="generating", disable=disable_tqdm):
            texts[completion.request_index] = completion.text
            self.cache_hook.add_partial("generate_until", requests[completion.request_index].args, completion.text)
        return texts

    def _request(self, context: str, options: dict[str, Any]) -> Request:
        given = dict(options)
        until = given.pop("until", None) or []
        limit = given.pop("max_gen_toks", None) or given.pop("max_tokens", None) or _MAX_TOKENS
        sampled = given.pop("do_sample", None)
        sampling = {name: given.pop(name) for name in _SAMPLING & given.keys() if given[name] is not None}
        if given:
            raise RequestError(f"unsupported generation option {', '.join(sorted(given))}; remove it from the task")
        if sampled is None:
            sampled = sampling.get("temperature", 0) > 0
        if not sampled:
            sampling = {"temperature": 0.0}
        stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        return Request(
            prompt=self.tok_encode(context) or [self.prefix_token_id],
            options=SamplingOptions(max_tokens=int(limit), stop=stop, **{"seed": 0, **sampling}),
            truncate=True,
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
