"""The programs that are lowered for abstract parameters are those that run."""

import re

import numpy as np
import pytest

from grok1.engine.engine import Engine, PromptPart
from grok1.params.sharding import make_mesh
from grok1.params.tree import abstract_parameters


def _computation(program):
    """The program's text without what differs from one place in the source to the next."""
    text = program.as_text()
    text = text[text.index("\n\n%") :] if "\nFileNames" in text else text
    return re.sub(r", metadata=\{[^}]*\}", "", text)


def _sizes(program):
    analysis = program.memory_analysis()
    return [
        getattr(analysis, f"{kind}_size_in_bytes") for kind in ("argument", "output", "alias", "temp", "generated_code")
    ]


@pytest.fixture(scope="module", params=[(1, 1), (1, 8), (2, 4)], ids=str)
def engines(request, make_checkpoint, make_engine, small_config):
    """An engine with weights and one without, on the same mesh."""
    mesh = make_mesh(small_config, request.param)
    engine = make_engine(make_checkpoint(small_config), request.param)
    params = abstract_parameters(small_config, mesh, packed=engine.kernels.packs_weights)
    abstract = Engine(small_config, params, mesh, kernels=engine.kernels)
    return engine, abstract


def test_the_decode_step(engines):
    engine, abstract = engines
    slots = 2 * engine.data_rows
    engine.decode(engine.new_batch(slots), np.ones(slots, bool))
    ran = engine._programs["decode", slots, 0]
    compiled = abstract.lower_decode(slots).compile(abstract.compiler_options)
    assert _computation(compiled) == _computation(ran)
    assert _sizes(compiled) == _sizes(ran)


def test_the_prefill_step(engines):
    engine, abstract = engines
    slots = 2 * engine.data_rows
    engine.read_prompts(engine.new_batch(slots), [PromptPart(0, np.arange(3, 23), 0, None)])
    ran = engine._programs["prompts", slots, engine.data_rows, 32, 0]
    compiled = abstract.lower_prefill(slots, 20).compile(abstract.compiler_options)
    assert _computation(compiled) == _computation(ran)
    assert _sizes(compiled) == _sizes(ran)
