"""A ZOTrainer of the tiny language model on the tiny reviews."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zokernel.data import load_table
from zokernel.finetune import Collator, EncodedDataset, ZOConfig, ZOTrainer, encode, get_task

TASK = get_task("sst2", label_words=["bad", "good"])


def load_parts(model_path, reviews_path, dtype=torch.float32):
    """Return a fresh model, its tokenizer and the encoded splits."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).eval()
    data = {
        split: EncodedDataset(encode(TASK, load_table(reviews_path / f"{split}.jsonl"), tokenizer))
        for split in ("train", "validation")
    }
    return model, tokenizer, data


def make_trainer(parts, folder, **settings):
    """Return a trainer that neither evaluates nor saves unless told to."""
    model, tokenizer, data = parts
    options = {
        "max_steps": 20,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "precision": "fp32",
        "seed": 3,
        "disable_tqdm": True,
        "report_to": "none",
        **settings,
    }
    return ZOTrainer(
        model,
        ZOConfig(output_dir=str(folder), **options),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
