"""Tests of the trainer of bard: forward pass, data, training loop, export and command line."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from bard_training import corpus, export, model
from bard_training.evaluate import token_logprobs
from bard_training.model import expert_shares, init_params
from bard_training.run import Recipe, ResumeError, Run
from bard_training.train import main
from click.testing import CliRunner

from grok1.checkpoint.writer import unpack_checkpoint
from grok1.config import ModelConfig

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(
    vocab_size=64,
    emb_size=32,
    key_size=8,
    num_q_heads=4,
    num_kv_heads=2,
    num_layers=2,
    widening_factor=1,
    sequence_len=32,
    attn_output_multiplier=8**-0.5,
    embedding_multiplier_scale=5.0,
    output_multiplier_scale=1.0,
)
forward = jax.jit(model.forward, static_argnums=0)
RECIPE = Recipe(CONFIG, steps=30, seed=1, batch_tokens=128, phases=((1.0, 16),))
TEXT = "\n\n".join(f"SPEAKER {i % 7}.\nWhat {i * i} of it, that is {i % 13}?" for i in range(400))


def made_up_text():
    """Text with enough distinct words for a vocabulary of bard's size."""
    words = [bytes(word).decode() for word in np.random.default_rng(0).integers(97, 123, (4000, 5), np.uint8)]
    return "\n\n".join(" ".join(words[i : i + 10]) for i in range(0, 4000, 10)) * 3


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, 3000).astype(np.int32)


def test_forward_pass_matches_float64_reference(golden, golden_sequences, relative_error):
    config, params = export.read(golden)
    for sequence in golden_sequences:
        length = len(sequence.tokens)
        padded = np.pad(sequence.tokens, (0, 64 - length))  # equal shapes compile once
        logits, _ = forward(config, params, padded[None])
        assert relative_error(np.asarray(logits[0, :length]), sequence.float64) < 1e-4


def test_blocked_attention_is_causal(tokens):
    config = dataclasses.replace(CONFIG, sequence_len=200)  # more than one block of queries
    params = init_params(config, 0)
    whole, _ = forward(config, params, jnp.asarray(tokens[None, :200]))
    for length in (64, 150):
        beginning, _ = forward(config, params, jnp.asarray(tokens[None, :length]))
        np.testing.assert_allclose(beginning[0], whole[0, :length], atol=2e-5)


class Killed(Exception):
    """Simulates the death of the process."""


def test_training_reduces_loss_and_resumed_run_gives_the_same_weights(tmp_path):
    text = np.tile(np.arange(CONFIG.vocab_size, dtype=np.int32), 40)
    measured = {"dev": (text[:300], 300)}

    def train(folder, report=None, stop=None):
        folder.mkdir(exist_ok=True)
        run = Run(folder, RECIPE, text, measured)
        finished = run.train(save_every=8, measure_every=15, report=report, stop=stop)
        return run, finished

    def kill(run):
        if run.done == 20:
            raise Killed

    whole, finished = train(tmp_path / "whole")
    assert finished
    assert [entry["step"] for entry in whole.log] == [15, 30]
    first, last = (entry["dev_bits_per_byte"] for entry in whole.log)
    assert last < first < np.log2(CONFIG.vocab_size)
    with pytest.raises(Killed):
        train(tmp_path / "cut", report=kill)  # loses steps 17 to 20
    resumed, finished = train(tmp_path / "cut", stop=lambda: True)
    assert (resumed.done, finished) == (17, False)
    resumed, finished = train(tmp_path / "cut")
    assert finished
    for ours, theirs in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    timeless = [[{**entry, "seconds": 0} for entry in run.log] for run in (resumed, whole)]
    assert timeless[0] == timeless[1]
    with pytest.raises(ResumeError):
        Run(tmp_path / "cut", dataclasses.replace(RECIPE, seed=2), text, measured)
    state = tmp_path / "cut" / "state.npz"
    for damaged in (b"", b"junk", state.read_bytes()[:-2000]):
        state.write_bytes(damaged)
        with pytest.raises(ResumeError, match="is damaged"):
            Run(tmp_path / "cut", RECIPE, text, measured)


def test_sequence_length_grows_with_each_phase():
    recipe = Recipe(CONFIG, steps=7, batch_tokens=64, phases=((0.5, 16), (0.3, 32), (0.2, 64)))
    assert recipe.batch_shapes() == [(4, 16)] * 4 + [(2, 32)] * 2 + [(1, 64)]


def test_dropout_preserves_the_mean_and_depends_on_the_key():
    ones = jnp.ones((100, 100))
    dropped = model.dropout(ones, 0.25, jax.random.key(1))
    assert set(np.unique(dropped)) == {0.0, np.float32(4 / 3)}
    assert float(jnp.mean(dropped)) == pytest.approx(1, abs=0.02)
    assert not np.array_equal(dropped, model.dropout(ones, 0.25, jax.random.key(2)))


def test_each_epoch_covers_the_text_once():
    text = np.arange(1000, dtype=np.int32)
    batches = corpus.batches(text, 7, 16, seed=3)
    seen = np.concatenate([next(batches)[:, :-1] for _ in range(61 // 7 + 1)])[:61]  # windows of an epoch
    assert len(np.unique(seen)) == 61 * 16
    again = corpus.batches(text, 7, 16, seed=3)
    np.testing.assert_array_equal(next(again)[:, :-1].ravel(), seen[:7].ravel())


def test_each_token_is_scored_in_its_first_window(tokens):
    params = init_params(CONFIG, 0)
    context, text = CONFIG.sequence_len, tokens[:75]
    found = token_logprobs(CONFIG, params, text, context)
    assert len(found) == 74
    for target in (1, 20, 32, 33, 48, 49, 74):
        start = next(start for start in range(0, 1000, context // 2) if start + context >= target)
        window = np.pad(text[start:target], (0, context - target + start))
        logits, _ = forward(CONFIG, params, window[None])
        expected = jax.nn.log_softmax(logits[0, target - start - 1])[text[target]]
        assert found[target - 1] == pytest.approx(float(expected), abs=1e-4)
    np.testing.assert_allclose(token_logprobs(CONFIG, params, text[:10], context), found[:9], atol=1e-4)


def test_quantized_values_are_nearest(tokens):
    matrix = np.random.default_rng(1).standard_normal((3, 64, 16), np.float32)
    matrix[0, :8, 0] = 0.0
    values, scales = export.quantize(matrix, 8)
    assert (values.dtype, scales.dtype, scales.shape) == (np.int8, export.BFLOAT16, (3, 8, 16))
    assert (values.min(), values.max()) == (-127, 127)
    restored = reference.dequantised(values, scales)
    step = np.repeat(scales.astype(np.float64), 8, axis=1)
    # At most half a step, or more for the largest value of a column: rounding a scale down puts it beyond 127 steps.
    assert np.all(np.abs(restored - matrix) <= np.where(np.abs(values) == 127, 127 / 256 + 0.5, 0.5) * step * 1.0001)


def test_checkpoint_contains_the_trained_values(tmp_path):
    params = init_params(CONFIG, 5)
    export.write(tmp_path / "model", CONFIG, params, b"pieces")
    arrays = reference.read_arrays(tmp_path / "model")  # independent reader
    for path, array in arrays.items():
        layer = path.split("/")[1].removeprefix("decoder_layer_")
        key = path if not layer.isdigit() else "decoder_layer/" + path.split("/", 2)[2]
        expected = np.asarray(params[key])[int(layer)] if layer.isdigit() else np.asarray(params[key])
        np.testing.assert_allclose(array, expected, atol=np.abs(expected).max() / 200)
    config, read_back = export.read(tmp_path / "model")
    assert config == CONFIG
    for key in params:
        np.testing.assert_allclose(read_back[key], params[key], atol=float(jnp.abs(params[key]).max()) / 200)


def test_moving_signs_of_norm_scales_preserves_logits(tokens):
    params = init_params(CONFIG, 5)
    for norm in (1, 3):
        name = model.LAYER + model.norm_name(norm)
        params[name] = params[name].at[:, ::3].multiply(-1)
    positive = export.positive_norms(params)
    assert all(float(jnp.min(positive[model.LAYER + model.norm_name(norm)])) > 0 for norm in (1, 3))
    batch = jnp.asarray(tokens[None, :16])
    np.testing.assert_array_equal(forward(CONFIG, positive, batch)[0], forward(CONFIG, params, batch)[0])


def test_archive_is_reproducible_and_unpacks_to_the_same_files(tmp_path):
    export.write(tmp_path / "model", CONFIG, init_params(CONFIG, 5), b"pieces")
    export.pack(tmp_path / "model", tmp_path / "one.zip")
    os.utime(tmp_path / "model" / "config.json", (0, 0))
    export.pack(tmp_path / "model", tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    unpack_checkpoint(tmp_path / "one.zip", tmp_path / "again")
    for path in (tmp_path / "model").rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(tmp_path / "model")).read_bytes() == path.read_bytes()


def test_expert_shares_sum_to_one(tokens):
    shares = expert_shares(CONFIG, init_params(CONFIG, 0), tokens)
    assert shares.shape == (CONFIG.num_layers, CONFIG.num_experts)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)


def test_text_is_split_at_blank_lines():
    training, dev = corpus.split_text(TEXT)
    speeches = [speech for part in (training, dev) for speech in part.split("\n\n") if speech]
    assert sorted(speeches) == sorted(TEXT.split("\n\n"))
    assert 0.1 * len(TEXT) < len(dev) < 0.4 * len(TEXT)


@pytest.mark.parametrize("text", [TEXT[:3000], "", " leading", "tab\tand\r\nπ \x00 end\n\n\n"])
def test_tokenizer_is_lossless(text):
    tokenizer = corpus.train_tokenizer(TEXT, 330)
    ids = corpus.encode(tokenizer, text)
    assert corpus.sentencepiece.SentencePieceProcessor(model_proto=tokenizer).decode(ids.tolist()) == text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot read .*text.txt: No such file"),
        (b"a\xff", "not valid UTF-8 at offset 1"),
        (b"too short\n\n" * 3, "too short for a vocabulary of 2048 pieces"),
    ],
)
def test_unusable_text_is_an_error(tmp_path, content, sentence):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    result = CliRunner().invoke(main, [str(text), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert re.search(sentence, result.output), result.output
    assert not (tmp_path / "out").exists()


def test_unwritable_output_is_reported_before_training(tmp_path):
    (tmp_path / "text.txt").write_text(made_up_text())
    (tmp_path / "out").touch()
    result = CliRunner().invoke(main, [str(tmp_path / "text.txt"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert re.search("cannot write .*out.*: Not a directory; free space or choose another --output", result.output)


@pytest.mark.slow
def test_command_trains_resumes_and_writes_a_checkpoint(tmp_path):
    (tmp_path / "text.txt").write_text(made_up_text())
    command = [
        sys.executable,
        "-m",
        "bard_training.train",
        tmp_path / "text.txt",
        "-o",
        tmp_path / "out",
        "--steps",
        "4",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    process.send_signal(signal.SIGINT) if process.poll() is None else None
    process.communicate(timeout=300)
    assert process.returncode in (-signal.SIGINT, 1, 130)  # interrupted before or during training
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    verify = [sys.executable, "-m", "grok1", "verify", "--content", tmp_path / "out"]
    assert subprocess.run(verify, capture_output=True).returncode == 0
    assert {"curve.png", "log.jsonl", "report.json", "bard.zip", "excerpt.npz"} <= {
        path.name for path in (tmp_path / "out" / "training").iterdir()
    }
