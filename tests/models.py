"""Every tiny language model of the tests: one table of families, one set of common sizes, and how a model is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from zokernel.experiments.kerzoo.jobs import tiny_tokenizer

SIZES = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 514}
# Family -> configuration, model, and what a tiny one is made of where nothing else is asked for.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**WIDE, "tie_word_embeddings": True}),
    "opt": ("OPTConfig", "OPTForCausalLM", {**SIZES, "ffn_dim": 48, "max_position_embeddings": 512}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**SIZES, "n_positions": 512}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**SIZES, "multi_query": False}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**WIDE, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**WIDE, "num_key_value_heads": 2, "head_dim": 8}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", WIDE),
    "bert": ("BertConfig", "BertForMaskedLM", WIDE),
    "esm": ("EsmConfig", "EsmForMaskedLM", WIDE),
    "luke": ("LukeConfig", "LukeForMaskedLM", {**WIDE, "entity_vocab_size": 8, "entity_emb_size": 16}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**SIZES, "d_kv": 8, "intermediate_size": 48}),
    "bart": ("BartConfig", "BartForConditionalGeneration", {**SIZES, "decoder_layers": 2, "encoder_ffn_dim": 48}),
}
CAUSAL = ("llama", "opt", "gpt2", "falcon", "qwen2", "qwen3")
MASKED = ("roberta", "bert", "esm", "luke")
SEQ2SEQ = ("t5", "bart")
# What each family calls a common size.
OWN_NAMES = {
    "gpt2": {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    "opt": {"intermediate_size": "ffn_dim"},
    "falcon": {"intermediate_size": "ffn_hidden_size"},
    "t5": {
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
    },
    "bart": {
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
    },
}
WORDS = ["terrible", "great", "bad", "good", "Yes", "No", "Maybe", "right", "wrong", "It was", "Rome", "Oslo"]
FRAMES = {"t5": "$A </s>", "bart": "<s> $A </s>"}  # what a tokenizer puts around a text
# Positions scaled as Llama 3.1 scales them.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def build(family: str, **settings: Any) -> nn.Module:
    """Build a random model of ``family``; sizes go by the common names (``hidden_size``, ...) in every family."""
    config, model, sizes = FAMILIES[family]
    names = OWN_NAMES.get(family, {})
    options = {names.get(name, name): value for name, value in (sizes | settings).items()}
    if family == "opt":
        options.setdefault("word_embed_proj_dim", options["hidden_size"])
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def save_tokenizer(folder: Path, *, masked: bool = False, frame: str = ""):
    """Train and save a byte-level BPE with a BOS that it puts first, as most published tokenizers do."""
    from tokenizers import processors

    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
    fast = tiny_tokenizer(WORDS, special, masked=masked)
    single = frame or ("<s> $A </s>" if masked else "<s> $A")
    ends = [(token, fast.convert_tokens_to_ids(token)) for token in single.split() if token != "$A"]
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    fast.save_pretrained(folder)
    return fast


def save_model(folder: Path, family: str) -> Path:
    """Save a two-layer model of ``family`` with its tokenizer, and return the folder."""
    fast = save_tokenizer(folder, masked=family in MASKED, frame=FRAMES.get(family, ""))
    ids = {"pad_token_id": fast.pad_token_id, "bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id}
    extra = {"num_key_value_heads": 2, "rope_parameters": LLAMA3} if family == "llama" else {}
    if family in SEQ2SEQ:
        extra = {"decoder_start_token_id": fast.pad_token_id if family == "t5" else fast.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(family, vocab_size=len(fast), **ids, **extra)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    # Ten times the usual start, so that scores differ enough for a mistake to show.
                    parameter.normal_(std=0.2)
        model.save_pretrained(folder)
    return folder


def save_plain_llama(folder: Path) -> Path:
    """Save a Llama as transformers initialises it, with a tokenizer that puts nothing first, and return the folder."""
    words = ["terrible", "great", "bad", "good", "movie", "It was", "Yes", "No"]
    fast = tiny_tokenizer(words, {"eos_token": "<eos>", "pad_token": "<eos>"})
    fast.save_pretrained(folder)
    ids = {"vocab_size": len(fast), "pad_token_id": fast.pad_token_id, "eos_token_id": fast.eos_token_id}
    torch.manual_seed(0)
    build("llama", num_key_value_heads=2, **ids).save_pretrained(folder)
    return folder
