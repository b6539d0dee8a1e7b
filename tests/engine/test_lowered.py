"""Programs compiled with abstract parameters are the ones that run."""

import re

import numpy as np
import pytest

from grok1.engine.chunks import PrefillChunk
from grok1.engine.engine import Engine
from grok1.engine.programs import StepKey
from grok1.params.sharding import make_mesh
from grok1.params.tree import abstract_parameters


def _computation(program):
    """Return the program's text without source locations."""
    text = program.as_text()
    if "\nFileNames" in text:
        text = text[re.search(r"\n\n(ENTRY )?%", text).start() :]
    return re.sub(r", metadata=\{[^}]*\}", "", text)


def _sizes(program):
    analysis = program.memory_analysis()
    return [
        getattr(analysis, f"{kind}_size_in_bytes") for kind in ("argument", "output", "alias", "temp", "generated_code")
    ]


def _check(engine, abstract, key):
    ran = engine.compiled[key]
    compiled = abstract.compile(key)
    assert _computation(compiled) == _computation(ran)
    assert _sizes(compiled) == _sizes(ran)


@pytest.fixture(scope="module", params=[(1, 1), (2, 4)], ids=str)
def engines(request, make_checkpoint, make_engine, small_config):
    """An engine with weights and one with abstract parameters, on the same mesh."""
    mesh = make_mesh(small_config, request.param)
    engine = make_engine(make_checkpoint(small_config), request.param)
    params = abstract_parameters(small_config, mesh, packed=engine.kernels.packs_weights)
    abstract = Engine(small_config, params, mesh, kernels=engine.kernels)
    return engine, abstract


def test_the_decode_step(engines):
    engine, abstract = engines
    slots = 2 * engine.data_rows
    engine.decode(engine.new_batch(slots), np.ones(slots, bool))
    _check(engine, abstract, StepKey("decode", slots))


def test_the_prefill_step(engines):
    engine, abstract = engines
    slots = 2 * engine.data_rows
    engine.prefill(engine.new_batch(slots), [PrefillChunk(0, np.arange(3, 23), 0)])
    _check(engine, abstract, StepKey("prefill", slots, engine.data_rows, abstract.chunk_bucket(20)))


def test_the_other_steps(engines):
    engine, abstract = engines
    slots, tokens = 2 * engine.data_rows, np.arange(3, 8)
    cache = engine.copy_prefix(engine.new_cache(slots), 0, 1, 16)
    _, cache = engine.logits(cache, np.tile(tokens, (slots, 1)), 0)
    engine.score(cache, [PrefillChunk(0, tokens, 0, targets=tokens)])
    for key in (
        StepKey("new_cache", slots),
        StepKey("copy_prefix", slots, engine.data_rows),
        StepKey("logits", slots, slots, 16),
        StepKey("score", slots, engine.data_rows, 16, 1),
    ):
        _check(engine, abstract, key)
