"""Expert layers, compared with float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from built import require_kernels

from grok1.ops.cpu import library as cpu
from grok1.ops.cpu.kernels import KERNELS as CPU
from grok1.ops.experts import reference_gated_experts
from grok1.ops.gpu.kernels import KERNELS as GPU
from grok1.ops.tpu.kernels import KERNELS as TPU
from grok1.ops.xla.kernels import XLA
from grok1.params.weights import Panels, QuantizedMatrix, panels_shape

LAYERS, EXPERTS = 2, 4


def random_weight(rng, inner, columns, groups):
    weight = rng.integers(-127, 128, (LAYERS, EXPERTS, inner, columns)).astype(np.int8)
    scales = (rng.uniform(0.5, 2, (LAYERS, EXPERTS, groups, columns)) / 127 / inner**0.5).astype(ml_dtypes.bfloat16)
    return QuantizedMatrix(jnp.asarray(weight), jnp.asarray(scales))


def pack(weight):
    require_kernels()
    panels = np.zeros(panels_shape(weight.shape, weight.groups), np.uint8)
    group_rows = weight.shape[-2] // weight.groups
    for index in np.ndindex(*weight.shape[:-2]):
        cpu.pack_box(np.asarray(weight.values[index]), panels[index], 0, 0, weight.groups, group_rows)
    return QuantizedMatrix(jnp.asarray(panels), weight.scales, layout=Panels(group_rows))


def exact(x, weights, layer, experts, factors):
    """Compute the layer in float64, one expert at a time. Rows without experts give 0."""
    gate, value, project = (
        reference.dequantised(np.asarray(w.values[layer]), np.asarray(w.scales[layer])) for w in weights
    )
    out = np.zeros((len(x), project.shape[-1]))
    for row, choice in np.ndindex(experts.shape):
        expert = experts[row, choice]
        if expert < EXPERTS:
            u = x[row].astype(np.float64) @ gate[expert]
            gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
            output = (gelu * (x[row].astype(np.float64) @ value[expert])) @ project[expert]
            out[row] += factors[row, choice] * output
    return out


CASES = [  # rows, embedding size, expert width, dtype
    (1, 24, 48, np.float32),
    (3, 40, 88, ml_dtypes.bfloat16),
    (16, 128, 1024, np.float32),
    (50, 16, 136, np.float32),
    (40, 128, 1024, ml_dtypes.bfloat16),
]


@pytest.mark.parametrize("kernels", [XLA, CPU, GPU, TPU], ids=lambda kernels: kernels.backend)
@pytest.mark.parametrize(("rows", "inner", "ffn", "dtype"), CASES)
def test_each_row_uses_its_experts(rows, inner, ffn, dtype, kernels):
    check_gated_experts(rows, inner, ffn, dtype, kernels.gated_experts, kernels.packs_weights)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("rows", "inner", "ffn", "dtype"), [(3, 24, 48, np.float32), (20, 16, 48, ml_dtypes.bfloat16)])
def test_the_reference_implementation(rows, inner, ffn, dtype, packed):
    check_gated_experts(rows, inner, ffn, dtype, reference_gated_experts, packed, 1e-5)


def check_gated_experts(rows, inner, ffn, dtype, gated_experts, packed, tolerance=None):
    tolerance = tolerance or (1e-5 if dtype == np.float32 else 2e-2)
    rng = np.random.default_rng(rows)
    weights = [random_weight(rng, inner, ffn, 1), random_weight(rng, inner, ffn, 1), random_weight(rng, ffn, inner, 8)]
    x = rng.standard_normal((rows, inner)).astype(dtype)
    experts = rng.integers(0, EXPERTS, (rows, 2)).astype(np.int32)
    experts[rng.random(rows) < 0.2] = EXPERTS
    used = [pack(weight) for weight in weights] if packed else weights
    factors = rng.uniform(0.1, 1, experts.shape).astype(np.float32)
    found = jax.jit(gated_experts)(x, *used, 1, experts, factors)
    expected = exact(x, weights, 1, experts, factors)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=tolerance)
    assert not np.asarray(found)[np.all(experts == EXPERTS, axis=1)].any()


@pytest.mark.parametrize("rows", [1, 17])
def test_mixed_layouts_are_rejected(rows):
    rng = np.random.default_rng(0)
    gate, value, project = random_weight(rng, 8, 16, 1), random_weight(rng, 8, 16, 1), random_weight(rng, 16, 8, 8)
    x, experts, factors = jnp.zeros((rows, 8)), jnp.zeros((rows, 2), int), jnp.ones((rows, 2))
    for kernels in (XLA, CPU, GPU, TPU):
        with pytest.raises(TypeError, match=r"kernels need (un)?packed matrices"):
            kernels.gated_experts(x, pack(gate), value, project, 0, experts, factors)


@pytest.mark.parametrize("kernels", [XLA, CPU, GPU, TPU], ids=lambda kernels: kernels.backend)
def test_products_reject_the_wrong_layout(kernels):
    weight = random_weight(np.random.default_rng(0), 8, 16, 1)
    with pytest.raises(TypeError, match=r"kernels need (un)?packed matrices"):
        kernels.matmul(jnp.zeros((1, 8)), weight if kernels.packs_weights else pack(weight), (0, 0))
