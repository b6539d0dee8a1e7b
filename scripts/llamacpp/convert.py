"""Convert a checkpoint in the release's format to GGUF with Q8_0 weights: convert.py CHECKPOINT OUT.gguf.

The GGUF file has no vocabulary, so llama.cpp accepts token ids only. `num_q_heads * key_size` must equal `emb_size`,
and the rows of all matrices must have a multiple of 32 values.
"""

import sys
from pathlib import Path

import gguf
import numpy as np

from grok1.checkpoint.reader import Checkpoint

KIND = gguf.GGMLQuantizationType.Q8_0
NAMES = {  # suffix of the parameter's path: llama.cpp's name
    "moe/linear": "ffn_gate_exps",
    "moe/linear_1": "ffn_down_exps",
    "moe/linear_v": "ffn_up_exps",
    "multi_head_attention/key": "attn_k",
    "multi_head_attention/linear": "attn_output",
    "multi_head_attention/query": "attn_q",
    "multi_head_attention/value": "attn_v",
    "rms_norm": "attn_norm",
    "rms_norm_1": "attn_output_norm",
    "rms_norm_2": "ffn_norm",
    "rms_norm_3": "layer_output_norm",
    "router": "ffn_gate_inp",
}


def tensor_name(module: str, layer: int | None) -> str:
    """Return llama.cpp's name for a parameter of the release."""
    if layer is None:
        return "token_embd.weight" if module.endswith("in_out_embed") else "output_norm.weight"
    end = next(end for end in sorted(NAMES, key=len, reverse=True) if module.endswith(f"/{end}"))
    return f"blk.{layer}.{NAMES[end]}.weight"


def values(checkpoint: Checkpoint, index: int) -> np.ndarray:
    """Return a parameter, dequantized to float32."""
    weight, scales = checkpoint.weight_view(index), checkpoint.scales_view(index)
    if scales is None:
        return np.asarray(weight, np.float32)
    *lead, rows, columns = weight.shape
    groups = scales.shape[-2]
    grouped = weight.reshape(*lead, groups, rows // groups, columns).astype(np.float32)
    return (grouped * scales.astype(np.float32)[..., None, :]).reshape(weight.shape)


def main(folder: str, out: str) -> None:
    """Convert the checkpoint in `folder` to the GGUF file `out`."""
    checkpoint = Checkpoint.open(Path(folder))
    config = checkpoint.config
    writer = gguf.GGUFWriter(out, "grok")
    writer.add_context_length(config.sequence_len)
    writer.add_embedding_length(config.emb_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_q_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.key_size)
    writer.add_key_length(config.key_size)
    writer.add_value_length(config.key_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_selected_experts)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_logit_scale(config.output_multiplier_scale)
    writer.add_embedding_scale(config.embedding_multiplier_scale)
    writer.add_float32("grok.attention.output_scale", config.attn_output_multiplier)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for spec in checkpoint.table:
        name, array = tensor_name(spec.module, spec.layer), values(checkpoint, spec.index)
        if spec.scales_shape is not None:
            array = array.swapaxes(-1, -2)  # llama.cpp stores one row per output
        elif name.endswith("ffn_gate_inp.weight"):
            array = array.T
        array = np.ascontiguousarray(array)
        if spec.scales_shape is not None or name == "token_embd.weight":
            writer.add_tensor(name, gguf.quants.quantize(array, KIND), raw_dtype=KIND)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
