"""Results for the sample checkpoint, compared with the release's code and with float64."""

import dataclasses

import jax
import numpy as np
import pytest

import grok1
from grok1.checkpoint.reader import Checkpoint
from grok1.engine.chunks import PrefillChunk
from grok1.errors import MeshError
from grok1.model import Model
from grok1.params.sharding import make_mesh
from grok1.request import SamplingOptions

FLOAT32_ERROR = 1e-4  # relative error; typically 2e-6


def test_reference_agrees_with_published_float64_logits(golden, golden_sequences, make_reference):
    for sequence in golden_sequences:
        found, _ = make_reference(golden)(sequence.tokens)
        # The published logits are rounded to float32.
        np.testing.assert_allclose(found, sequence.float64, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("mesh", "kernels"),
    [
        *(((1, 1), "xla"), ((1, 8), "xla"), ((2, 4), "xla")),
        *(((1, 1), "native"), ((1, 2), "native"), ((1, 8), "native"), ((2, 8), "native"), ((8, 1), "native")),
    ],
    indirect=["kernels"],
)
def test_logits_are_closer_to_float64_than_the_releases_code(
    mesh, kernels, golden, golden_sequences, make_engine, relative_error
):
    model = Model(make_engine(golden, mesh, kernels=kernels), None)
    for sequence in golden_sequences:
        # Pad to one length, so that programs compile once; later tokens do not affect earlier logits.
        padded = np.concatenate([sequence.tokens, np.full(64 - len(sequence.tokens), 7)])
        found = model.logits(padded)[: len(sequence.tokens)]
        error = relative_error(found, sequence.float64)
        assert error <= relative_error(sequence.upstream, sequence.float64)
        assert error < FLOAT32_ERROR


@pytest.mark.parametrize("mesh", [(1, 8), (2, 4)])
def test_greedy_tokens_do_not_depend_on_the_mesh(mesh, golden, golden_sequences, make_engine):
    prompt = golden_sequences[1].tokens.tolist()
    texts = [
        Model(make_engine(golden, shape), None).complete(prompt, greedy=True, max_tokens=12, ignore_eos=True).tokens
        for shape in ((1, 1), mesh)
    ]
    assert texts[0] == texts[1]


def test_interpreted_gpu_kernels(golden, golden_sequences, make_engine, relative_error):
    model = Model(make_engine(golden, (1, 2), kernels="gpu"), None)
    sequence = golden_sequences[0]
    assert relative_error(model.logits(sequence.tokens), sequence.float64) < FLOAT32_ERROR


def test_load_end_to_end(golden, golden_sequences, relative_error):
    stages = []
    model = grok1.load(golden, mesh=(1, 8), progress=stages.append)
    sequence = golden_sequences[3]
    assert relative_error(model.logits(sequence.tokens), sequence.float64) < FLOAT32_ERROR
    assert model.mesh_shape == (1, 8)
    loading = [stage for stage in stages if stage.stage == "loading"]
    assert loading[-1].done == loading[-1].total > 0
    assert {stage.stage for stage in stages} == {"checking", "loading", "compiling", "running"}


def test_logits_token_by_token(golden, golden_sequences, make_engine, relative_error):
    engine = make_engine(golden, (1, 1))
    sequence = golden_sequences[3]
    half = len(sequence.tokens) // 2
    logits, cache = engine.logits(engine.new_cache(1), sequence.tokens[None, :half], 0)
    parts = [np.asarray(logits[0])]
    for position in range(half, len(sequence.tokens)):
        logits, cache = engine.logits(cache, sequence.tokens[None, position : position + 1], position)
        parts.append(np.asarray(logits[0]))
    assert relative_error(np.concatenate(parts), sequence.float64) < FLOAT32_ERROR


def test_decoding_given_tokens_matches_a_full_forward_pass(golden, golden_sequences, make_engine):
    engine = make_engine(golden, (2, 4))
    sequence = golden_sequences[3]
    half = len(sequence.tokens) // 2
    slots, slot = 4, 3
    chunk = PrefillChunk(slot, sequence.tokens[:half], 0, (SamplingOptions(temperature=0), 0))
    state, sampled, [row] = engine.prefill(engine.new_batch(slots), [chunk], logprobs=True)
    active = np.arange(slots) == slot
    for position in range(half, len(sequence.tokens) + 1):
        expected = log_softmax(sequence.float64[position - 1])
        found = jax.device_get(sampled)
        assert found.tokens[row] == np.argmax(expected)
        np.testing.assert_allclose(found.logprobs[row], expected.max(), atol=1e-4)
        np.testing.assert_allclose(found.top_logprobs[row], np.sort(expected)[:-21:-1], atol=1e-4)
        np.testing.assert_allclose(found.top_logprobs[row], expected[found.top_tokens[row]], atol=1e-4)
        if position == len(sequence.tokens):
            break
        forced = np.array(state.tokens)
        forced[slot] = sequence.tokens[position]
        forced = jax.device_put(forced, state.tokens.sharding)
        state, sampled = engine.decode(dataclasses.replace(state, tokens=forced), active, logprobs=True)
        row = slot


def test_log_probabilities_of_completion_and_score_match(golden, golden_sequences, make_engine):
    model = Model(make_engine(golden, (1, 1)), None)
    prompt = golden_sequences[2].tokens.tolist()
    done = model.complete(prompt, greedy=True, max_tokens=15, logprobs=5, ignore_eos=True)
    score = model.score(prompt + done.tokens, top_logprobs=5)
    scored = score.logprobs[-len(done.tokens) :]
    for generated, reference in zip(done.logprobs, scored, strict=True):
        assert generated.logprob == pytest.approx(reference.logprob, abs=1e-4)
        assert [token for token, _ in generated.top] == [token for token, _ in reference.top]
        assert generated.top[0][1] == generated.logprob


def test_the_error_for_an_unsupported_mesh_suggests_another(golden):
    config = Checkpoint.open(golden).config
    with pytest.raises(MeshError, match=r"344 .* 16; use --mesh 1,8"):
        make_mesh(config, (1, 16))
    assert make_mesh(config, (1, 8)).devices.shape == (1, 8)
    assert make_mesh(config).devices.shape == (1, 8)


def test_bfloat16_error_is_small(golden, golden_sequences, make_engine, relative_error):
    # Typically 1 to 7 %, like the release's code, whose activations are also bfloat16.
    model = Model(make_engine(golden, (1, 8), "bfloat16"), None)
    for sequence in golden_sequences[-2:]:
        error = relative_error(model.logits(sequence.tokens), sequence.float64)
        assert FLOAT32_ERROR < error < 0.1


def log_softmax(logits):
    shifted = logits - np.max(logits)
    return shifted - np.log(np.sum(np.exp(shifted)))
