"""The paper's language task: SST-2 sentences as prompts, next-token prediction over the full vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.experiments.base import Config
from zokernel.experiments.entk.nets import random_prompt, tiny_language_model

# The five sentences of the paper's appendix E.3, with their labels.
FIVE = (
    ("well-nigh unendurable ... though the picture strains to become cinematic poetry , it remains depressingly "
     "prosaic and dull .", 0),
    ("a big , gorgeous , sprawling swashbuckler that delivers its diversions in grand , uncomplicated fashion .", 1),
    ("it 's not that kung pow is n't funny some of the time -- it just is n't any funnier than bad martial arts movies "
     "are all by themselves , without all oedekerk 's impish augmentation .", 0),
    ("the jobs it employs are short , carefully placed and dead-center .", 1),
    ("so unremittingly awful that labeling it a dog probably constitutes cruelty to canines .", 0),
)  # fmt: skip
TEMPLATE = "{} It was"
WORDS = (" terrible", " great")


@dataclass(frozen=True)
class LanguageTask:
    """A causal language model, batches to train on and sentences to watch.

    Attributes:
        model: The model.
        batches: One training batch per step: token ids, attention mask and, as ``targets``, the label word's token.
        observed: The five sentences, the same way.
        vocab_size: V.
        source: Model and data in words.
    """

    model: nn.Module
    batches: list[dict[str, Tensor]]
    observed: dict[str, Tensor]
    vocab_size: int
    source: str


def training_rows(config: Config) -> tuple[list[dict[str, Any]], str]:
    """Return labelled sentences to train on and their name: of the option ``train_file``, or the movie reviews."""
    from zokernel.data import load_rows, load_table

    file = config.options.get("train_file")
    if file is None:
        return load_rows("movie-reviews", "train"), "movie-reviews"
    return load_table(file), "/".join(Path(file).parts[-2:])


def language_task(config: Config, *, steps: int, batch_size: int, name: str | None = None) -> LanguageTask:
    """Load a language model and sentences, or at smoke scale a tiny random Llama and random tokens.

    The training sentences are SST-2's if the option ``train_file`` names its train.tsv, and the movie reviews of
    ``zokernel fetch`` otherwise.

    Args:
        config: The experiment's configuration.
        steps: Training batches to make.
        batch_size: Sentences in each.
        name: A model's folder or hub id, SmolLM2 by default; at smoke scale the width of the tiny Llama.

    Returns:
        The task.
    """
    if config.scale == "smoke":
        return _tiny_task(config, steps, batch_size, int(name or 16))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from zokernel.data import resolve_model_path

    path = resolve_model_path(name or "smollm2")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows, data_name = training_rows(config)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    sample = [rows[n] for n in order[: steps * batch_size]]
    pairs = [(str(row["sentence"]).strip(), int(row["label"])) for row in sample]
    model_name = "SmolLM2-135M" if name in (None, "smollm2") else Path(name).name
    targets = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in WORDS]

    def encode(part: Any) -> dict[str, Tensor]:
        prompts = [TEMPLATE.format(text) for text, _ in part]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right")
        labels = torch.tensor([targets[label] for _, label in part])
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "targets": labels}

    return LanguageTask(
        model,
        [encode(pairs[n * batch_size : (n + 1) * batch_size]) for n in range(steps)],
        encode(FIVE),
        model.config.vocab_size,
        f"{model_name}, {data_name}, template '{TEMPLATE}'",
    )


def _tiny_task(config: Config, steps: int, batch_size: int, width: int) -> LanguageTask:
    model = tiny_language_model("llama", config.seed, width=width)

    def batch(first: int, count: int) -> dict[str, Tensor]:
        parts = [random_prompt(first + n) for n in range(count)]
        batch_of_prompts = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return batch_of_prompts | {"targets": torch.tensor([3 + (first + n) % 2 for n in range(count)])}

    batches = [batch(100 * (step + 1), batch_size) for step in range(steps)]
    return LanguageTask(model, batches, batch(0, 5), 97, "a tiny random Llama on random tokens (no download)")


class Tail(nn.Module):
    """The last blocks of a Llama-like model, fed with cached hidden states: exact while the blocks below are frozen.

    Args:
        model: The causal language model.
        num_blocks: How many of the last decoder blocks to keep (with the final norm and the frozen head).
    """

    def __init__(self, model: nn.Module, num_blocks: int):
        super().__init__()
        decoder: Any = model.model
        self.blocks = nn.ModuleList(list(decoder.layers)[-num_blocks:])
        self.norm = decoder.norm
        head: Any = model.lm_head
        self.head_weight = head.weight.detach()

    @torch.no_grad()
    def cache(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Run the model once and keep what enters the first kept block."""
        cached: dict[str, Any] = {}

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cached["hidden"], cached["kwargs"] = args[0], dict(kwargs)

        handle = self.blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        finally:
            handle.remove()
        cached["last"] = batch["attention_mask"].sum(1) - 1
        return cached

    def forward(self, cached: dict[str, Any]) -> Tensor:
        """Return the logits at the last token of every row, (N, V)."""
        hidden = cached["hidden"]
        for block in self.blocks:
            out = block(hidden, **cached["kwargs"])
            hidden = out[0] if isinstance(out, tuple) else out
        last = hidden[torch.arange(len(hidden)), cached["last"]]
        return self.norm(last) @ self.head_weight.T
