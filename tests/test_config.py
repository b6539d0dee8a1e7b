import dataclasses
import json
import math

import pytest

from grok1.config import PRESETS, ModelConfig, preset
from grok1.errors import ConfigError
from grok1.params.table import num_parameters


def test_default_config_is_the_release():
    config = ModelConfig()
    assert config == PRESETS["grok-1"] == preset("grok-1")
    assert (config.num_layers, config.emb_size, config.vocab_size, config.sequence_len) == (64, 6144, 131072, 8192)
    assert (config.num_q_heads, config.num_kv_heads, config.key_size) == (48, 8, 128)
    assert (config.num_experts, config.num_selected_experts, config.ffn_size) == (8, 2, 32768)
    assert (config.pad_id, config.bos_id, config.eos_id, config.unk_id) == (0, 1, 2, 3)
    assert config.embedding_multiplier_scale == 78.38367176906169
    assert config.output_multiplier_scale == 0.5773502691896257
    assert config.attn_output_multiplier == 0.08838834764831845
    assert (config.rms_norm_eps, config.rotary_base, config.attn_logit_cap) == (1e-5, 10000, 30)
    assert (config.q_size, config.kv_size) == (6144, 1024)


@pytest.mark.parametrize(
    ("emb_size", "widening_factor", "ffn_size"),
    [(6144, 8, 32768), (128, 4, 344), (128, 6, 512), (48, 2.75, 88), (60, 25, 1000), (2048, 6, 8192), (16, 1, 16)],
)
def test_expert_width(emb_size, widening_factor, ffn_size):
    assert ModelConfig(emb_size=emb_size, widening_factor=widening_factor).ffn_size == ffn_size


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_round_trip(name):
    config = preset(name)
    assert ModelConfig.from_json(config.to_json()) == config
    assert config.to_json().endswith("}\n")


def test_preset_sizes():
    assert 15e6 < num_parameters(preset("tiny")) < 30e6
    assert 3.0e9 < num_parameters(preset("bench-3b")) < 3.6e9
    assert preset("tiny").num_layers > 10  # to test the order of the files
    with pytest.raises(ConfigError, match=r"grok-2.*tiny"):
        preset("grok-2")


def test_sample_config(golden):
    config = ModelConfig.read(golden / "config.json")
    assert dataclasses.asdict(config) == json.loads((golden / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("vocab_size", "emb_size", "key_size", "num_q_heads", "num_layers", "sequence_len")),
        *((name, -8) for name in ("num_kv_heads", "num_experts", "num_selected_experts", "widening_factor")),
        ("num_layers", 1.0),
        ("num_layers", True),
        ("num_layers", "64"),
        ("num_layers", None),
        ("num_layers", 10**6),
        ("emb_size", 2**31),
        ("widening_factor", math.nan),
        ("widening_factor", "8"),
        ("widening_factor", 1e9),
        ("attn_output_multiplier", math.inf),
        ("attn_output_multiplier", 0),
        ("embedding_multiplier_scale", -1.0),
        ("output_multiplier_scale", False),
        ("vocab_size", 3),
        ("key_size", 127),
        ("num_q_heads", 47),
        ("num_selected_experts", 9),
    ],
)
def test_invalid_value_error_names_the_key(name, value):
    with pytest.raises(ConfigError, match=name):
        ModelConfig(**{name: value})
    stated = {**dataclasses.asdict(ModelConfig()), name: value}
    with pytest.raises(ConfigError, match=rf"^model/config\.json: .*{name}"):
        ModelConfig.from_json(json.dumps(stated), "model/config.json")


def test_query_width_must_be_a_multiple_of_the_scale_groups():
    with pytest.raises(ConfigError, match="multiple of 8"):
        ModelConfig(num_q_heads=6, num_kv_heads=2, key_size=2)
    assert ModelConfig(num_q_heads=4, num_kv_heads=2, key_size=2).q_size == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("emb_size"), "lacks the keys emb_size"),
        (lambda values: values.update(quantized=True), 'unknown key "quantized"'),
    ],
)
def test_keys_must_match_the_config(change, message):
    values = dataclasses.asdict(ModelConfig())
    change(values)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", b"\xff\xfe{}", "[" * 100000])
def test_invalid_config_text(text):
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_json(text)


def test_unreadable_config(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.read(tmp_path / "config.json")
