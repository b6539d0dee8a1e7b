"""The network's parameter tree is the one that a checkpoint is loaded into."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import SHARDED

from grok1.checkpoint.load import load_parameters
from grok1.checkpoint.reader import Checkpoint
from grok1.network import KVCache, ModelShard, network
from grok1.params.sharding import make_mesh
from grok1.params.table import parameter_table
from grok1.params.tree import abstract_parameters


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return Checkpoint.open(make_checkpoint(SHARDED))


def initialise(shard):
    """Return the parameters that the network creates for one shard."""
    config = shard.config
    cache = jnp.zeros((config.num_layers, 1, shard.num_kv_heads, config.sequence_len, config.key_size), shard.dtype)
    tokens = jnp.zeros((1, 2), jnp.int32)
    return network(shard).init(None, tokens, tokens, KVCache(cache, cache), False)


def describe(tree):
    return jax.tree.map(lambda array: (array.shape, array.dtype), tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_network_parameters_match_loaded_parameters(dtype, checkpoint):
    asked = jax.eval_shape(functools.partial(initialise, ModelShard(SHARDED, dtype=jnp.dtype(dtype))))
    loaded = load_parameters(checkpoint, make_mesh(SHARDED, (1, 1)), np.dtype(dtype))
    assert jax.tree.structure(asked) == jax.tree.structure(loaded)
    assert describe(asked) == describe(loaded)


@pytest.mark.parametrize("shape", [(1, 2), (2, 8), (1, 16)])
def test_network_parameters_of_a_shard_match_loaded_shards(shape, checkpoint):
    mesh = make_mesh(SHARDED, shape)
    loaded = load_parameters(checkpoint, mesh)
    specs = jax.tree.map(lambda array: array.sharding.spec, loaded)
    shard = ModelShard(SHARDED, shape[1])
    asked = jax.eval_shape(
        jax.shard_map(functools.partial(initialise, shard), mesh=mesh, in_specs=(), out_specs=specs, check_vma=False)
    )
    assert describe(asked) == describe(loaded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 8), (1, 16)])
def test_abstract_parameters_match_loaded_parameters(shape, dtype, checkpoint):
    mesh = make_mesh(SHARDED, shape)
    loaded = load_parameters(checkpoint, mesh, np.dtype(dtype))
    abstract = abstract_parameters(SHARDED, mesh, np.dtype(dtype))
    assert jax.tree.structure(abstract) == jax.tree.structure(loaded)
    assert describe(abstract) == describe(loaded)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, abstract, loaded)))


def test_names_match_the_release():
    asked = jax.eval_shape(functools.partial(initialise, ModelShard(SHARDED)))
    names = {f"{module}/{name}" for module, parameters in asked.items() for name in parameters}
    assert names == {spec.path for spec in parameter_table(SHARDED)}
    assert names == {
        "language_model/in_out_embed/embeddings",
        "language_model/rms_norm/scale",
        "transformer/decoder_layer/moe/linear/w",
        "transformer/decoder_layer/moe/linear_1/w",
        "transformer/decoder_layer/moe/linear_v/w",
        "transformer/decoder_layer/multi_head_attention/key/w",
        "transformer/decoder_layer/multi_head_attention/linear/w",
        "transformer/decoder_layer/multi_head_attention/query/w",
        "transformer/decoder_layer/multi_head_attention/value/w",
        "transformer/decoder_layer/rms_norm/scale",
        "transformer/decoder_layer/rms_norm_1/scale",
        "transformer/decoder_layer/rms_norm_2/scale",
        "transformer/decoder_layer/rms_norm_3/scale",
        "transformer/decoder_layer/router/w",
    }
