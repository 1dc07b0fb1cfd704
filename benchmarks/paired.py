"""What the speed benchmarks share: the model, a batch of prompts, and timing of contenders that take turns.

Wall time says what a user waits for, on a machine that does nothing else.  CPU time (of all threads of the process)
is hardly changed by other processes, so on a shared machine its ratios are the ones to read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.finetune.scoring import classification_loss, option_scores

Times = dict[str, list[tuple[float, float]]]


def load(*, lora: bool = False, untrained: bool = False) -> nn.Module:
    """Return SmolLM2-135M in fp32, its weights in memory (not in a mapped file); or with a LoRA adapter of rank 8.

    The adapter is as if trained for a while, or ``untrained``: one that changes nothing yet.
    """
    from transformers import AutoModelForCausalLM, logging

    from zokernel.data import resolve_model_path

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(resolve_model_path("smollm2"), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.0)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        adapter = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", init_lora_weights=untrained)
        model = get_peft_model(model, adapter).eval()
    return model


def trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def examples(count: int, length: int) -> list[dict[str, Any]]:
    """Return encoded movie reviews under the wording of SST-2: ``{sentence} It was`` terrible or great.

    Prompts have ``length`` tokens (or fewer, once those run out), as in training, whose batches are grouped by length.
    """
    from transformers import AutoTokenizer

    from zokernel.data import resolve_model_path
    from zokernel.finetune.arguments import DataArguments
    from zokernel.finetune.collate import EncodedDataset
    from zokernel.finetune.datasets import load_splits, load_task
    from zokernel.finetune.tasks import encode

    wording: dict[str, Any] = {"template": "{sentence} It was", "label_words": ["terrible", "great"]}
    arguments = DataArguments(task="movie-reviews", max_train_samples=1000, **wording)
    task = load_task(arguments)
    rows = load_splits(arguments, task, seed=0).train
    dataset = EncodedDataset(encode(task, rows, AutoTokenizer.from_pretrained(resolve_model_path("smollm2"))))
    items = [dataset[number] for number in range(len(dataset))]
    fitting = [item for item in items if len(item["input_ids"]) <= length]
    return sorted(fitting, key=lambda item: len(item["input_ids"]) != length)[:count]


def make_batch(count: int, length: int = 38) -> dict[str, Any]:
    from zokernel.finetune.collate import Collator

    return Collator(pad_token_id=2)(examples(count, length))


def autocast(*, bf16: bool = True) -> torch.autocast:
    """Return the context of a forward in training: every weight is used once, so none is kept in bf16."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16, cache_enabled=False)


def make_closure(model: nn.Module, batch: dict[str, Any], *, bf16: bool) -> Callable[[], Tensor]:
    """Return the loss of the product: one forward scores both options, logits at the last position only."""

    def closure() -> Tensor:
        with autocast(bf16=bf16):
            return classification_loss(option_scores(model, batch), batch["labels"])

    return closure


def take_turns(contenders: dict[str, Callable[[], Any]], rounds: int, *, warm_up: int = 1) -> Times:
    """Run all contenders in turn, ``rounds`` times; return (wall, CPU) seconds of every run."""
    times: Times = {name: [] for name in contenders}
    for number in range(-warm_up, rounds):
        for name, run in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if number >= 0:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def median_ratios(above: list[tuple[float, float]], below: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the medians over rounds of the ratios of wall times and of CPU times."""
    wall = statistics.median(a[0] / b[0] for a, b in zip(above, below))
    return wall, statistics.median(a[1] / b[1] for a, b in zip(above, below))


def median_seconds(times: list[tuple[float, float]]) -> float:
    return statistics.median(wall for wall, _ in times)
