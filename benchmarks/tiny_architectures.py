"""A tiny random model of almost every causal and masked language model of transformers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

from zokernel.finetune.models.kind import Kind, auto_class

MAX_PARAMETERS = 30_000_000
TABLES = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
_WIDTH = (
    "hidden_size d_model n_embd emb_dim dim embedding_size word_embed_proj_dim n_embed attention_hidden_size lru_width"
)
_LAYERS = "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers"
_HEADS = "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"
_INNER = "intermediate_size ffn_dim d_ff d_inner n_inner ffn_hidden_size hidden_dim encoder_ffn_dim decoder_ffn_dim dff"
_EIGHT = (
    "d_kv head_dim d_head qk_rope_head_dim qk_nope_head_dim v_head_dim state_size mamba_n_heads mamba_d_head "
    "mamba_d_state mamba_num_heads mamba_head_dim ssm_state_size linear_key_head_dim linear_value_head_dim "
    "global_head_dim block_size attention_window hidden_size_per_layer_input laurel_rank index_topk index_head_dim "
    "num_latents"
)
_SIXTEEN = "q_lora_rank kv_lora_rank qk_head_dim sliding_window attention_window_size bottleneck_size entity_emb_size"
_EXPERTS = (
    "num_local_experts num_experts n_routed_experts moe_num_experts linear_num_value_heads time_step_rank rotary_dim"
)
_TWO = (
    "num_key_value_heads n_head_kv num_experts_per_tok moe_topk moe_k linear_num_key_heads num_global_key_value_heads "
    "altup_num_inputs index_n_heads attn_layer_period"
)
_ONE = "n_group topk_group n_shared_experts first_k_dense_replace n_groups mamba_n_groups attn_layer_offset"
_POSITIONS = "max_position_embeddings n_positions n_ctx max_sequence_length seq_length context_length max_seq_len"
SIZES: dict[str, int] = {
    name: size
    for names, size in [
        (_WIDTH, 32),
        (_LAYERS, 2),
        (_HEADS, 4),
        (_INNER, 64),
        (_EIGHT, 8),
        (_SIXTEEN, 16),
        (_EXPERTS, 4),
        (_TWO, 2),
        (_ONE, 1),
        (_POSITIONS, 128),
        ("moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size d_embedding d_latents", 32),
        ("entity_vocab_size char_vocab_size", 60),
        ("num_kv_shared_layers", 0),
    ]
    for name in names.split()
}
_FOUR_LAYERS = "qwen3_5_text qwen3_5_moe_text qwen3_next qwen4_exp_text lfm3 kimi_linear bailing_hybrid recurrent_gemma"
_LATENT = "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 youtu"
EXTRA: dict[str, dict[str, Any]] = {
    **{name: {"num_hidden_layers": 4} for name in _FOUR_LAYERS.split()},
    **{name: {"num_key_value_heads": 4} for name in _LATENT.split()},
    "bamba": {"attn_layer_indices": [1]},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_expand": 2},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longformer": {"attention_window": [8, 8]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "ministral": {"head_dim": 8},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32, "use_bottleneck": False},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {
        "attention_head_size": 8,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "hash_seed": 0,
        "num_buckets": 4,
        "local_attn_chunk_length": 8,
    },
    "rwkv": {"num_hidden_layers": 8, "rescale_every": 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


def tiny_config(model_type: str, kind: Kind, **ids: int) -> PreTrainedConfig:
    """Return a small configuration of a model type.

    Args:
        model_type: As ``config.json`` has it.
        kind: Causal or masked, for types that can be both.
        **ids: ``vocab_size`` and the ids of special tokens.
    """
    extra = dict(EXTRA.get(model_type, {}))
    if kind == "causal" and model_type in TABLES["masked"]:
        extra |= {"causal": True} if model_type == "xlm" else {"is_decoder": True}
    return CONFIG_MAPPING[model_type](**(_shrunk(CONFIG_MAPPING[model_type], ids) | extra))


def _shrunk(cls: Any, ids: dict[str, int], depth: int = 0) -> dict[str, Any]:
    default: Any = None
    try:
        default = cls()
    except Exception:  # some have no defaults
        names = set(inspect.signature(cls.__init__).parameters)
    else:
        names = set(default.__dict__)
    for base in cls.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
    renamed = getattr(cls, "attribute_map", None) or {}
    sizes: dict[str, Any] = {}
    for name, size in (SIZES | ids).items():
        attribute = renamed.get(name, name) if renamed.get(name) in names else name
        if attribute in names:
            sizes.setdefault(attribute, size)
    for name in list(sizes) if default is not None else ():
        value = getattr(default, name, None)
        if isinstance(value, bool) or (value is None and name not in ids):
            del sizes[name]
        elif isinstance(value, (list, tuple)):
            sizes[name] = [sizes[name]] * 2
    for name, part in (getattr(cls, "sub_configs", None) or {}).items():
        if getattr(part, "model_type", None) and depth < 2:
            sizes[name] = _shrunk(part, ids, depth + 1)
    return sizes


def tiny_model(model_type: str, kind: Kind, **ids: int) -> Any:
    """Return a random model of a model type, with weights large enough that scores differ.

    Raises:
        MemoryError: If its configuration has sizes that this module does not know.
    """
    config = tiny_config(model_type, kind, **ids)
    auto = auto_class(kind)
    with torch.device("meta"):
        count = sum(p.numel() for p in auto.from_config(config).parameters())
    if count > MAX_PARAMETERS:
        raise MemoryError(f"{count:,} parameters")
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.ndim > 1 and parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
