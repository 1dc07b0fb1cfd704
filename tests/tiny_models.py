"""Tiny random language models of several families behind one byte-level tokenizer, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ["terrible", "great", "bad", "good", "Yes", "No", "Maybe", "right", "wrong", "It was", "Rome", "Oslo"]
CAUSAL = ("llama", "opt", "gpt2", "qwen2", "qwen3")
MASKED = ("roberta", "bert")


def save_tokenizer(folder: Path, *, masked: bool = False):
    """Train and save a byte-level BPE with a BOS that it puts first, as most published tokenizers do."""
    from tokenizers import processors

    from zokernel.experiments.kerzoo.jobs import tiny_tokenizer

    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
    fast = tiny_tokenizer(WORDS, special, masked=masked)
    ends = [("<s>", 0), ("</s>", 2)] if masked else [("<s>", 0)]
    single = "<s> $A </s>" if masked else "<s> $A"
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    fast.save_pretrained(folder)
    return fast


def save_model(folder: Path, family: str) -> Path:
    """Save a two-layer model of ``family`` with its tokenizer, and return the folder."""
    import transformers as tf

    fast = save_tokenizer(folder, masked=family in MASKED)
    ids = {"pad_token_id": fast.pad_token_id, "bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id}
    shape = {"vocab_size": len(fast), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **ids}
    wide = {**shape, "intermediate_size": 48, "max_position_embeddings": 514}
    grouped = {**wide, "num_key_value_heads": 2}
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 = {**grouped, "rope_parameters": {**rope, "original_max_position_embeddings": 64}}
    opt = {**shape, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 512}
    gpt2 = {"vocab_size": len(fast), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, **ids}
    make = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(tie_word_embeddings=True, **llama3)),
        "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**opt)),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**gpt2)),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**grouped)),
        "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(head_dim=8, **grouped)),
        "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**wide)),
        "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**wide)),
    }[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    # Ten times the usual start, so that scores differ enough for a mistake to show.
                    parameter.normal_(std=0.2)
        model.save_pretrained(folder)
    return folder
