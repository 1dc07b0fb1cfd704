"""Tiny models as their quantized files hold them: GGUF, and the packed integers of compressed-tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import build, save_plain_llama
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

KINDS = {
    "4bit": ("--load_in_4bit", "true"),
    "8bit": ("--load_in_8bit", "true"),
    "int8": ("--quantization", "torchao:int8"),
    "int4": ("--quantization", "torchao:int4"),
}


def save_llama(folder: Path) -> Path:
    """Save a Llama whose layers have 64 and 96 inputs: groups of 32 and blocks of 64 both occur."""
    save_plain_llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    build("llama", hidden_size=64, intermediate_size=96, num_key_value_heads=2, **ids).save_pretrained(folder)
    return folder


def save_gguf(folder: Path, target: Path) -> Path:
    """Write a Llama's folder as one GGUF file in fp32, tokenizer included."""
    from gguf import GGUFWriter

    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and token.endswith(">") else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in weights.items():
        key = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name)
        if key is None:
            _, _, layer, *rest = name.split(".")
            kind = ".".join(rest[:-1])
            key = f"blk.{layer}.{names[kind]}.weight"
            if kind in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp turns neighbours, not halves
                count = heads if kind.endswith("q_proj") else kv_heads
                tensor = (
                    tensor.reshape(count, 2, tensor.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
                )
        writer.add_tensor(key, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def save_packed(folder: Path, target: Path, *, group: int = 32) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a model's folder as compressed-tensors packs it into four bits, and return what the weights then are."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    shutil.copytree(folder, target)
    weights, packed, unpacked = load_file(folder / "model.safetensors"), {}, {}
    for name, weight in weights.items():
        if "_proj.weight" not in name:
            packed[name] = unpacked[name] = weight
            continue
        parts = weight.reshape(weight.shape[0], -1, group)
        scale = parts.abs().amax(-1) / 7
        integers = (parts / scale[..., None]).round().clamp(-8, 7)
        unpacked[name] = (integers * scale[..., None]).reshape(weight.shape)
        packed[f"{name}_packed"] = pack_to_int32(integers.reshape(weight.shape).to(torch.int8), 4)
        packed[f"{name}_scale"] = scale
        packed[f"{name}_shape"] = torch.tensor(weight.shape)
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    kind = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": True, "dynamic": False}
    scheme: dict[str, Any] = {"targets": ["Linear"], "weights": kind, "format": "pack-quantized"}
    declare(
        target,
        quant_method="compressed-tensors",
        format="pack-quantized",
        quantization_status="compressed",
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
    )
    return target, unpacked


def declare(folder: Path, **quantization: Any) -> None:
    """Let the configuration of a model say how its files are quantized."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
