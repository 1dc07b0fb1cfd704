"""Fine-tuning jobs for the language-model tables, and a tiny model and data to run them on without a download."""

from __future__ import annotations

import json
import random
import string
import tempfile
from pathlib import Path
from typing import Any

from zokernel.finetune.tasks import PromptTask, get_task


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
    from zokernel.finetune.arguments import DataArguments, ModelArguments
    from zokernel.finetune.job import finetune

    with tempfile.TemporaryDirectory() as temporary:
        output = folder or Path(temporary) / "run"
        config = ZOConfig(
            output_dir=str(output), **({"report_to": "none", "disable_tqdm": True, "save_strategy": "no"} | settings)
        )
        return finetune(ModelArguments(**model), DataArguments(**data), config)


def tiny_model(folder: Path) -> Path:
    """Write a random two-layer Llama with a byte-level tokenizer, and return its folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<eos>"])
    tokenizer.train_from_iterator([" terrible great Yes No Maybe"] * 8, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(fast),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=True,
            pad_token_id=fast.pad_token_id,
            eos_token_id=fast.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_data(folder: Path, task: PromptTask, *, size: int = 32, seed: int = 0) -> dict[str, str]:
    """Write splits whose columns are the template's and whose label can be read off the text.

    Returns:
        ``train_file``, ``validation_file`` and ``test_file``.
    """
    generator = random.Random(seed)
    columns = sorted({field for _, field, _, _ in string.Formatter().parse(task.template) if field})
    labels: list[Any] = list(task.labels) or list(range(len(task.label_words)))
    files = {}
    for split in ("train", "validation", "test"):
        rows = []
        for _ in range(size):
            k = generator.randrange(len(labels))
            filler = " ".join(generator.choice(["a", "the", "one"]) for _ in range(generator.randrange(1, 4)))
            rows.append(dict.fromkeys(columns, f"{filler} {'xyzuvw'[k]}") | {task.label_column: labels[k]})
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[f"{split}_file"] = str(path)
    return files


def tiny_setup(folder: Path, data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return model and data arguments of a job with its model and data replaced by tiny ones."""
    folder.mkdir(parents=True, exist_ok=True)
    wording: dict[str, Any] = {
        key: data[key] for key in ("template", "label_words", "labels", "label_column") if key in data
    }
    task = get_task(data.get("task", "sst2"), **wording)
    files = tiny_data(folder, task)
    limits = {"max_train_samples": 32, "max_eval_samples": 16, "max_test_samples": 16}
    return {"model_name_or_path": str(tiny_model(folder / "model"))}, {
        "task": data.get("task", "sst2"),
        **wording,
        **files,
        **limits,
    }
