import dataclasses
import gzip

import pytest

from grok1.config import ModelConfig
from grok1.small_tokenizer import train_small_tokenizer
from grok1.tokenizer import Tokenizer

CONFIG = ModelConfig(
    vocab_size=512,
    emb_size=48,
    key_size=4,
    num_q_heads=8,
    num_kv_heads=4,
    num_layers=2,
    widening_factor=2,
    num_experts=2,  # both are selected, so that no rounding changes which
    sequence_len=96,
    attn_output_multiplier=0.5,
)


@pytest.fixture(scope="session")
def config():
    """A small model's, with room for 95 tokens and one more."""
    return dataclasses.replace(CONFIG)


@pytest.fixture(scope="session")
def tokenizer(config):
    return Tokenizer.from_bytes(train_small_tokenizer(config.vocab_size), "tokenizer.model")


@pytest.fixture
def write(tmp_path):
    """Writes a file, compressed if its name says so."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write
