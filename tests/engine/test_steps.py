"""Steps sent by one engine and replayed by another."""

import gc

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grok1.engine.engine import Engine
from grok1.engine.replay import Step, StepSender
from grok1.model import Model

ARRAYS = hnp.arrays(st.sampled_from([np.int32, np.bool_, np.float32, np.uint32]), hnp.array_shapes(min_dims=0))


@given(
    st.lists(st.one_of(st.integers(0, 9), st.text(max_size=5)), max_size=4),
    st.integers(0, 2**40),
    st.lists(st.integers(0, 99), max_size=3),
    st.lists(ARRAYS, max_size=4),
)
def test_encoded_steps_decode_to_the_same_step(key, handle, freed, arrays):
    step = Step.decode(Step(tuple(key), handle, freed, arrays).encode())
    assert (step.key, step.handle, step.freed) == (tuple(key), handle, freed)
    assert [array.dtype for array in step.arrays] == [array.dtype for array in arrays]
    for found, expected in zip(step.arrays, arrays, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_replayed_steps_give_the_same_states(make_checkpoint, small_config, make_engine):
    original = make_engine(make_checkpoint(small_config), (2, 2))
    messages = []
    parts = (original.config, original.params, original.mesh)
    first = Engine(*parts, kernels=original.kernels, sender=StepSender(messages.append))
    second = Engine(*parts, kernels=original.kernels)
    model = Model(first, None)
    model.complete([1, 2, 3], greedy=True, max_tokens=6, ignore_eos=True)
    model.score(list(range(1, 40)))
    model.logits([4, 5, 6])
    batch = first.copy_prefix(first.new_batch(4), 0, 1, 16)
    gc.collect()
    kept = first.new_cache(2)  # sends the handles freed so far
    for message in messages:
        second.replay(Step.decode(message))
    assert len(second.replayed) == 2
    for found, expected in zip(second.replayed.values(), (batch, kept), strict=True):
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
