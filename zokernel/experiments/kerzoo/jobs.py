"""Fine-tuning jobs for the language-model tables, and a tiny model and data to run them on without a download."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zokernel.finetune.tasks import get_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def finetune_job(
    *,
    model: dict[str, Any],
    data: dict[str, Any],
    settings: dict[str, Any],
    folder: Path | None = None,
) -> dict[str, Any]:
    """Run one fine-tuning job through the library's own pipeline.

    Args:
        model: Fields of ``ModelArguments``.
        data: Fields of ``DataArguments``.
        settings: Fields of ``ZOConfig``.
        folder: Where to write; a temporary folder when not given.

    Returns:
        The job's metrics, with the loss of every step under ``losses`` and the seconds since its start.
    """
    from zokernel.finetune import ZOConfig
    from zokernel.finetune.job import finetune
    from zokernel.finetune.settings.arguments import DataArguments, ModelArguments

    quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as temporary:
        output = folder or Path(temporary) / "run"
        config = ZOConfig(output_dir=str(output), **(quiet | settings))
        return finetune(ModelArguments(**model), DataArguments(**data), config)


def tiny_tokenizer(words: Sequence[str], special: dict[str, str], *, masked: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that knows a few words whole.

    Args:
        words: Words that are one token each after a space.
        special: Special tokens by transformers' names for them, such as ``eos_token``; their ids count up from zero.
        masked: Add a mask token that swallows the space before it.

    Returns:
        The tokenizer.

    Example:
        >>> tokenizer = tiny_tokenizer(["great", "bad"], {"eos_token": "<eos>", "pad_token": "<eos>"})
        >>> len(tokenizer(" great bad").input_ids), tokenizer.pad_token_id
        (2, 0)
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,  # more than there are merges to make
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(dict.fromkeys(special.values())),
    )
    tokenizer.train_from_iterator([f" {word} {word}" for word in words for _ in range(8)], trainer)
    mask = {"mask_token": AddedToken("<mask>", lstrip=True, special=True)} if masked else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **mask)


def tiny_model(folder: Path, *, masked: bool = False) -> Path:
    """Write a random two-layer Llama (or RoBERTa) with a byte-level tokenizer, and return its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM

    words = ["terrible", "great", "Yes", "No", "Maybe"]
    fast = tiny_tokenizer(words, {"eos_token": "<eos>", "pad_token": "<pad>"}, masked=masked)
    fast.save_pretrained(folder)
    shape: dict[str, Any] = {
        "vocab_size": len(fast),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": fast.pad_token_id,
        "eos_token_id": fast.eos_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if masked:
            RobertaForMaskedLM(RobertaConfig(max_position_embeddings=514, **shape)).save_pretrained(folder)
        else:
            LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shape)).save_pretrained(folder)
    return folder


def tiny_setup(folder: Path, data: dict[str, Any], *, masked: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return model and data arguments of a job with its model and data replaced by tiny ones."""
    from zokernel.finetune.tasks.toy import toy_files

    folder.mkdir(parents=True, exist_ok=True)
    wording: dict[str, Any] = {
        key: data[key] for key in ("template", "label_words", "labels", "label_column") if key in data
    }
    name = data.get("task", "sst2")
    task = get_task(name, **wording)
    files = toy_files(folder / "data", name, task, size=32)
    if "protocol" in data:  # which takes validation examples from the training file
        files.pop("validation_file", None)
    by_class = data.get("protocol") == "mezo-roberta"  # which draws k_shot of each class
    limits = {} if by_class else {"max_train_samples": 32, "max_eval_samples": 16}
    return {"model_name_or_path": str(tiny_model(folder / "model", masked=masked))}, {
        "task": name,
        **wording,
        **files,
        **({key: data[key] for key in ("protocol", "k_shot") if key in data}),
        **limits,
        "max_test_samples": 16,
        **({"max_new_tokens": 5} if task.kind == "generation" else {}),
    }
