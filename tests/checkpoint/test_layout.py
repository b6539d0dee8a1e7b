import csv
import dataclasses

from grok1.checkpoint.pickled.framing import tensor_file_size
from grok1.config import PRESETS, ModelConfig
from grok1.params.table import num_active_parameters, num_parameters, tensor_table


def test_release_table_in_every_column(release_table):
    def numbers(shape):
        return "" if shape is None else ",".join(map(str, shape))

    table = tensor_table(PRESETS["grok-1"])
    ours = [
        {
            "file": spec.file_name,
            "parameter": spec.parameter,
            "shape": numbers(spec.shape),
            "dtype": str(spec.dtype),
            "scales_shape": numbers(spec.scales_shape),
            "file_bytes": str(tensor_file_size(spec)),
        }
        for spec in table
    ]
    with release_table.open() as file:
        assert ours == list(csv.DictReader(file, delimiter="\t"))


def test_release_sizes():
    table = tensor_table(PRESETS["grok-1"])
    assert len(table) == 770
    assert sum(tensor_file_size(spec) for spec in table) == 318_239_886_140


def test_golden_file_sizes(golden):
    table = tensor_table(ModelConfig.read(golden / "config.json"))
    found = {path.name: path.stat().st_size for path in (golden / "ckpt-0").iterdir()}
    assert found == {spec.file_name: tensor_file_size(spec) for spec in table}


def test_the_release_has_314_billion_weights_and_uses_84_a_token():
    config = ModelConfig()
    assert num_parameters(config) == 315_684_820_992
    assert num_active_parameters(config) == 83_756_587_008


def test_parameters_are_those_of_the_files(golden):
    config = ModelConfig.read(golden / "config.json")
    assert config.ffn_size == 344
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 8 * 128 * 344 + 4 * 128 + 128 * 8
    assert num_parameters(config) == 512 * 128 + 128 + 12 * layer
    assert num_parameters(config) - num_active_parameters(config) == 12 * 3 * 6 * 128 * 344


def test_layers_come_in_the_order_of_their_paths(small_config):
    layers = [spec.layer for spec in tensor_table(small_config)][2::12]
    assert layers == [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
    for position, spec in enumerate(tensor_table(small_config)):
        assert spec.index == position


def test_names_of_a_tensor_of_layer_10(small_config):
    spec = tensor_table(small_config)[26]
    assert spec.parameter == "transformer/decoder_layer_10/moe/linear/w"
    assert (spec.layer, spec.path) == (10, "transformer/decoder_layer/moe/linear/w")
    assert (spec.module, spec.name) == ("transformer/decoder_layer/moe/linear", "w")
    assert spec.file_name == "tensor00026_000"


def test_names_of_a_tensor_outside_the_layers(small_config):
    spec = tensor_table(small_config)[0]
    assert spec.layer is None
    assert (spec.module, spec.name) == ("language_model/in_out_embed", "embeddings")
    assert spec.path == spec.parameter


def test_array_bytes_count_scales(small_config):
    linear_1 = tensor_table(small_config)[3]
    assert linear_1.shape == (3, small_config.ffn_size, 16)
    assert linear_1.scales_shape == (3, 8, 16)
    assert linear_1.num_weights == 3 * small_config.ffn_size * 16
    assert linear_1.array_bytes == linear_1.num_weights + 2 * 3 * 8 * 16


def test_heads_that_do_not_fill_the_embedding():
    config = dataclasses.replace(PRESETS["tiny"], key_size=4, num_layers=1)
    shapes = {spec.parameter.split("/", 2)[-1]: spec.shape for spec in tensor_table(config)[2:]}
    assert shapes["multi_head_attention/query/w"] == (128, 64)
    assert shapes["multi_head_attention/key/w"] == (128, 32)
    assert shapes["multi_head_attention/linear/w"] == (64, 128)
