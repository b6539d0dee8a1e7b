"""Tests of the bundled model against values that its trainer computed with the same weights."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bard_training import export
from bard_training.evaluate import mistakes
from bard_training.model import forward

from grok1.checkpoint.pickled.framing import tensor_file_size
from grok1.checkpoint.reader import Checkpoint
from grok1.config import PRESETS
from grok1.model import Model
from grok1.params.table import tensor_table
from grok1.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
FLOAT32_ERROR = 1e-4  # relative error; typically 1e-6


@pytest.fixture(scope="module")
def excerpt():
    with np.load(Path(__file__).with_name("excerpt.npz")) as stored:
        return dict(stored)


def test_archive_is_small_and_matches_the_preset(archive, bard):
    assert archive.stat().st_size <= 8_000_000
    assert Checkpoint.open(bard).config == PRESETS["bard"]
    found = {path.name: path.stat().st_size for path in (bard / "ckpt-0").iterdir()}
    assert found == {spec.file_name: tensor_file_size(spec) for spec in tensor_table(PRESETS["bard"])}
    assert sum(found.values()) <= 8_000_000


def test_config_has_all_features_of_the_release():
    config = PRESETS["bard"]
    assert (config.num_experts, config.num_selected_experts) == (8, 2)
    assert 1 < config.num_kv_heads < config.num_q_heads
    assert config.num_q_heads * config.key_size == config.emb_size  # required by llama.cpp
    assert config.num_layers > 10  # so that file order and layer order differ
    assert all(size % 32 == 0 for size in (config.emb_size, config.ffn_size, config.kv_size))


@pytest.mark.parametrize(
    ("mesh", "kernels"), [((1, 1), "xla"), ((1, 1), "native"), ((2, 2), "native")], indirect=["kernels"]
)
def test_logits_match_the_trainer(bard, excerpt, make_engine, kernels, mesh, relative_error):
    model = Model(make_engine(bard, mesh, kernels=kernels), None)
    tokens, last = excerpt["tokens"], excerpt["last_logits"]
    logits = model.logits(tokens)
    assert relative_error(logits[-len(last) :], last) < FLOAT32_ERROR
    found = [entry.logprob for entry in model.score(tokens.tolist()).logprobs]
    np.testing.assert_allclose(found, excerpt["logprobs"], atol=1e-3)
    assert abs(np.mean(found) - np.mean(excerpt["logprobs"])) < 1e-5


def test_each_mistake_changes_logits_more_than_rounding(bard, excerpt, relative_error):
    config, params = export.read(bard)
    last = excerpt["last_logits"]
    distances = {}
    for name, misread, variant in mistakes(params, config.num_layers):
        logits, _ = forward(config, misread, excerpt["tokens"][None], variant)
        distances[name] = relative_error(np.asarray(logits[0, -len(last) :]), last)
    assert distances.pop("none") < FLOAT32_ERROR
    assert min(distances.values()) > 10 * FLOAT32_ERROR, distances


def test_tokenizer_is_lossless(bard):
    tokenizer = Tokenizer.read(bard / "tokenizer.model")
    assert tokenizer.vocab_size == PRESETS["bard"].vocab_size
    for text in ("ROMEO.\nBut, soft!\n\nJULIET.\n  Ay me!", " two  spaces ", "naïve\tπ\r\n", "\n\n\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_greedy_completion_is_english_and_independent_of_the_mesh(bard, make_engine):
    tokenizer = Tokenizer.read(bard / "tokenizer.model")
    texts = [
        Model(make_engine(bard, mesh), tokenizer).complete("ROMEO.\n", greedy=True, max_tokens=40).text
        for mesh in ((1, 1), (1, 2))
    ]
    assert texts[0] == texts[1]
    words = {word.strip(",.;:!?") for word in texts[0].lower().split()}
    assert words & {"i", "thou", "my", "the", "and", "you", "not"}


@pytest.mark.slow
def test_score_matches_the_documented_perplexity(bard):
    heldout = ROOT.parent / "shared" / "corpus" / "heldout.txt"
    if not heldout.is_file():
        pytest.skip("the held-out text is not available")
    command = [sys.executable, "-m", "grok1", "score", "-c", bard, heldout, "--mesh", "1,1", "--json"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    score = json.loads(done.stdout)
    documented = (ROOT / "docs" / "bard.md").read_text()
    perplexity, bits = re.search(r"\| int8 \| ([\d.]+) \| ([\d.]+) \|", documented).groups()
    assert (f"{score['perplexity']:.4f}", f"{score['bits_per_byte']:.4f}") == (perplexity, bits)
    assert score["bits_per_byte"] <= 1.60
