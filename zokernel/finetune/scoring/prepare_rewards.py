"""Prompts and rewards made ready for a model."""

from __future__ import annotations

import json
import logging
from typing import Any

from torch import nn

from zokernel.finetune.data.datasets import Splits
from zokernel.finetune.rewards.objective import RewardObjective
from zokernel.finetune.rewards.prompts import PromptDataset, encode_prompts, ends_of, rewards_of
from zokernel.finetune.rewards.start import Start
from zokernel.finetune.scoring.continuations import Sample, shown_prompt
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.readable import plural

logger = logging.getLogger(__name__)

SAMPLES = 3  # prompts whose answers the report shows


def prompt_datasets(splits: Splits, tokenizer: Any, *, max_length: int) -> dict[str, PromptDataset]:
    """Tokenize the prompts of the splits; those to evaluate on are sorted by length, which wastes less on padding."""
    datasets = {}
    for split, rows in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        datasets[split] = encode_prompts(rows, tokenizer, max_length=max_length, where=split.capitalize())
        if split != "train":
            datasets[split] = datasets[split].longest(len(rows))
    logger.info("Data: %s.", ", ".join(plural(len(prompts), f"{split} prompt") for split, prompts in datasets.items()))
    return datasets


def reward_objective(model: nn.Module, tokenizer: Any, splits: Splits, data: DataArguments) -> RewardObjective:
    """Return the loss of prompts: the negative mean reward, and the penalty on leaving the weights as they are now."""
    return RewardObjective(
        rewards_of(data),
        tokenizer,
        data.max_new_tokens,
        samples=data.num_generations,
        temperature=data.temperature,
        ends=ends_of(model, tokenizer, splits.train),
        beta=data.beta,
        start=Start(model) if data.beta else None,
    )


def reward_samples(datasets: dict[str, PromptDataset], tokenizer: Any) -> list[Sample]:
    """Return the first held-out prompts; in the place of an answer, the other columns of their rows."""
    samples = []
    for example in datasets["test"].examples[:SAMPLES]:
        rest = {name: value for name, value in example.row.items() if name != "prompt"}
        columns = "\n".join(f"{name}: {_text(value)}" for name, value in rest.items())
        samples.append(Sample(example.input_ids, shown_prompt(tokenizer, example.input_ids), columns))
    return samples


def _text(value: Any) -> str:
    """Return a value as text; what is none as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
