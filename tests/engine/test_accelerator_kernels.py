"""Whole steps with GPU and TPU kernels, interpreted on the CPU."""

import dataclasses

import pytest

from grok1.model import Model, Request
from grok1.request import SamplingOptions


@pytest.mark.parametrize(("backend", "mesh"), [("gpu", (2, 2)), ("tpu", (1, 1))], ids=str)
def test_greedy_tokens_match_plain_jax(backend, mesh, make_checkpoint, make_engine, small_config):
    # The TPU kernels need whole tiles of 128; other sizes would fall back to XLA.
    wide = dataclasses.replace(small_config, emb_size=128, key_size=16, widening_factor=12)
    folder = make_checkpoint(wide if backend == "tpu" else small_config)
    options = SamplingOptions(temperature=0, max_tokens=3, ignore_eos=True)
    requests = [Request(prompt=[3 + i, 9, 27], options=options) for i in range(3)]
    found, expected = (
        {done.request_index: done.tokens for done in Model(engine, None).complete_many(requests, batch_size=4)}
        for engine in (make_engine(folder, mesh, kernels=backend), make_engine(folder, mesh, kernels="xla"))
    )
    assert found == expected
