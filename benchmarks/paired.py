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

from zokernel.finetune.scoring.options import classification_loss, option_scores

SMOLLM2: dict[str, Any] = {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
SMOLLM2 |= {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
LLAMA: dict[str, Any] = {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}
LLAMA |= {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
SHAPES = {"SmolLM2-135M": SMOLLM2, "Llama-3.2-1B": LLAMA}
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
    return add_adapter(model, untrained=untrained) if lora else model


def add_adapter(model: nn.Module, *, untrained: bool = False) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapter = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", init_lora_weights=untrained)
    return get_peft_model(model, adapter).eval()


def build(shape: str, *, device: str = "cpu", lora: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a Llama of random weights in one of :data:`SHAPES`: for timings, which do not depend on the values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).to(dtype).eval()
    return add_adapter(model) if lora else model


def trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def examples(count: int, length: int) -> list[dict[str, Any]]:
    """Return encoded movie reviews under the wording of SST-2: ``{sentence} It was`` terrible or great.

    Prompts have ``length`` tokens (or fewer, once those run out), as in training, whose batches are grouped by length.
    """
    from transformers import AutoTokenizer

    from zokernel.data import resolve_model_path
    from zokernel.finetune import DataArguments, EncodedDataset, encode
    from zokernel.finetune.data.datasets import load_splits, load_task

    wording: dict[str, Any] = {"template": "{sentence} It was", "label_words": ["terrible", "great"]}
    arguments = DataArguments(task="movie-reviews", max_train_samples=1000, **wording)
    task = load_task(arguments)
    rows = load_splits(arguments, task, seed=0).train
    dataset = EncodedDataset(encode(task, rows, AutoTokenizer.from_pretrained(resolve_model_path("smollm2"))))
    items = [dataset[number] for number in range(len(dataset))]
    fitting = [item for item in items if len(item["input_ids"]) <= length]
    return sorted(fitting, key=lambda item: len(item["input_ids"]) != length)[:count]


def random_examples(count: int, length: int) -> list[dict[str, Any]]:
    """Return encoded examples of random tokens, with options of one token, for models of random weights."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 40000, (count, length), generator=generator).tolist()
    return [{"input_ids": p, "option_ids": [[11], [12]], "label": n % 2} for n, p in enumerate(prompts)]


def make_batch(
    count: int, length: int = 38, *, items: list[dict[str, Any]] | None = None, device: str = "cpu"
) -> dict[str, Any]:
    from zokernel.finetune.data.collate import Collator, to_device

    return to_device(Collator(pad_token_id=2)(examples(count, length) if items is None else items), device)


def autocast(*, bf16: bool = True, device: str = "cpu") -> torch.autocast:
    """Return the context of a forward in training: every weight is used once, so none is kept in bf16."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False)


def make_closure(model: nn.Module, batch: dict[str, Any], *, bf16: bool) -> Callable[[], Tensor]:
    """Return the loss of the product: one forward scores both options, logits at the last position only."""
    device = batch["labels"].device.type

    def closure() -> Tensor:
        with autocast(bf16=bf16, device=device):
            return classification_loss(option_scores(model, batch), batch["labels"])

    return closure


def clock() -> tuple[float, float]:
    """Return wall and CPU time in seconds, once a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def take_turns(contenders: dict[str, Callable[[], Any]], rounds: int, *, warm_up: int = 1) -> Times:
    """Run all contenders in turn, ``rounds`` times; return (wall, CPU) seconds of every run."""
    times: Times = {name: [] for name in contenders}
    for number in range(-warm_up, rounds):
        for name, run in contenders.items():
            wall, cpu = clock()
            run()
            end = clock()
            if number >= 0:
                times[name].append((end[0] - wall, end[1] - cpu))
    return times


def median_ratios(above: list[tuple[float, float]], below: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the medians over rounds of the ratios of wall times and of CPU times."""
    wall = statistics.median(a[0] / b[0] for a, b in zip(above, below))
    return wall, statistics.median(a[1] / b[1] for a, b in zip(above, below))


def median_seconds(times: list[tuple[float, float]]) -> float:
    return statistics.median(wall for wall, _ in times)
