"""The harness's own evaluation over small tasks of local data, against scores computed one by one."""

import json
import math
from types import SimpleNamespace

import pytest
from configs import TEXT_ALL_EXPERTS

from grok1.text.tokenizer import Tokenizer
from grok1.text.train_tokenizer import train_small_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from grok1.errors import RequestError  # noqa: E402
from grok1.integrations.lm_eval import Grok1LM  # noqa: E402
from grok1.model import Model  # noqa: E402

QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " green and old", " a"], "answer": 0},
    {"question": "Two and two are", "choices": [" five", " four", " many more"], "answer": 1},
    {"question": "Fish live in", "choices": [" trees", " the air", " water"], "answer": 2},
    {"question": "A day has", "choices": [" one hour", " twenty four hours", " no end"], "answer": 1},
]
TEXTS = [{"text": "A short text."}, {"text": "Another one, longer than the context of the model. " * 6 + "End."}]
PROMPTS = [{"prompt": "Say it: ", "answer": "x"}, {"prompt": "And again: ", "answer": "y"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_small_tokenizer(512))
    return Tokenizer.read(path)


@pytest.fixture(scope="module")
def model(make_checkpoint, make_engine, tokenizer):
    return Model(make_engine(make_checkpoint(TEXT_ALL_EXPERTS)), tokenizer)


@pytest.fixture
def evaluate(model, tmp_path, monkeypatch):
    """The harness's results for a task over rows: its metrics, and what it kept of each row."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def evaluate(rows, **task):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "task": "local",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }
        results = lm_eval.simple_evaluate(
            model=Grok1LM(model=model, batch_size=3), tasks=[config | task], bootstrap_iters=0
        )
        return results["results"]["local"], results["samples"]["local"]

    return evaluate


def test_multiple_choice(evaluate, model, tokenizer):
    metrics, samples = evaluate(
        QUESTIONS,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )
    right = 0
    for row, sample in zip(QUESTIONS, sorted(samples, key=lambda sample: sample["doc_id"]), strict=True):
        context = len(tokenizer.encode(row["question"]))
        totals = []
        for choice in row["choices"]:
            score = model.score(row["question"] + choice)
            totals.append(math.fsum(entry.logprob for entry in score.logprobs[context - 1 :]))
        found = [float(response[0]) for response in sample["filtered_resps"]]
        assert found == pytest.approx(totals, abs=1e-3)
        right += max(range(3), key=totals.__getitem__) == row["answer"]
    assert metrics["acc,none"] == right / len(QUESTIONS)


@pytest.mark.slow
def test_rolling_log_likelihood(evaluate, model, tokenizer):
    metrics, _ = evaluate(
        TEXTS,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    total = 0.0
    for row in TEXTS:
        ids = tokenizer.encode(row["text"])
        start = 0
        while start < len(ids):  # windows of 64 tokens; the last reaches back as far as it can
            end = min(start + 64, len(ids))
            window = [1, *ids] if start == 0 else ids
            seen = window[max(0, end - 64) : end + 1] if start == 0 else window[max(0, end - 65) : end]
            scored = end - start
            total += math.fsum(entry.logprob for entry in model.score(seen).logprobs[-scored:])
            start = end
    words = sum(len(row["text"].split()) for row in TEXTS)
    assert metrics["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-3)


@pytest.mark.slow
def test_generation(evaluate, model):
    first = model.complete("Say it: ", max_tokens=12, greedy=True).text
    stop = first[3:5]
    metrics, samples = evaluate(
        PROMPTS,
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [stop], "max_gen_toks": 12, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    assert metrics["exact_match,none"] == 0
    for row, sample in zip(PROMPTS, sorted(samples, key=lambda sample: sample["doc_id"]), strict=True):
        expected = model.complete(row["prompt"], max_tokens=12, greedy=True, stop=[stop]).text
        assert sample["resps"] == [[expected]]
    assert stop not in sample["resps"][0][0]


def test_what_stands_alone_and_what_is_too_long(model, tokenizer):
    adapter = Grok1LM(model=model)
    ids = tokenizer.encode("word " * 100)[:90]
    [(alone, _), (empty, greedy), (cut, _)] = adapter._loglikelihood_tokens(
        [(("", "a"), [1], ids[:5]), (("b", ""), ids[:5], []), (("c", "d"), ids[:80], ids[80:])], disable_tqdm=True
    )
    assert alone == pytest.approx(model.score([1, *ids[:5]]).total, abs=1e-3)
    assert (empty, greedy) == (0, True)
    seen = model.score(ids[25:]).logprobs  # 65 tokens, of which the last is not read
    assert cut == pytest.approx(math.fsum(entry.logprob for entry in seen[-10:]), abs=1e-3)


def test_what_a_task_cannot_ask_for(model):
    with pytest.raises(RequestError, match="num_beams"):
        Grok1LM(model=model).generate_until([SimpleNamespace(args=("x", {"num_beams": 4}))])


def test_the_harness_loads_a_checkpoint(make_checkpoint, tokenizer):
    adapter = lm_eval.api.registry.get_model("grok1").create_from_arg_string(
        f"checkpoint={make_checkpoint(TEXT_ALL_EXPERTS)},tokenizer={tokenizer.source},mesh=1x1,dtype=float32",
        {"batch_size": "auto", "device": None, "max_batch_size": None},
    )
    assert isinstance(adapter, Grok1LM)
    assert adapter.model.mesh_shape == (1, 1)
    assert (adapter.eot_token_id, adapter.prefix_token_id, adapter.max_length) == (2, 1, 64)
