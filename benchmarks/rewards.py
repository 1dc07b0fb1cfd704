"""Teach SmolLM2 a form of answer by a reward alone: ``es`` and ``eggroll`` beside ``mezo``, at equal generations.

Prompts are sums such as ``37 + 5 =``.  The reward is 1 for an answer that is a number and the end of the line, and 0.5
for a number that goes on with a full stop or words; whether the number is right does not count.  Every method takes
equally many members, prompts and generations.  Each has one sweep of three learning rates on validation prompts, with a
seed of its own; the best is run with every seed, and judged on prompts that neither training nor the sweep has seen.

python benchmarks/rewards.py --output runs/rewards.jsonl           # finished runs are not repeated
python benchmarks/rewards.py --output runs/rewards.jsonl --table   # prints the table of the finished runs
python benchmarks/rewards.py --speed es    # steps beside bare generation of as many rows and tokens: time and memory
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paired import median_ratios, take_turns
from same_settings import require_same_settings
from torch import nn

from zokernel.experiments.kept_runs import KeptRuns
from zokernel.finetune.rewards.functions import Reward, Rewards
from zokernel.finetune.rewards.generate import Sampling, generate
from zokernel.finetune.rewards.objective import RewardObjective
from zokernel.finetune.rewards.prompts import PromptCollator, PromptDataset, encode_prompts
from zokernel.optim.registry import get_method
from zokernel.perturb import Stacked

PAIRS, PROMPTS, GENERATIONS, TOKENS = 4, 4, 12, 5
SEEDS, SWEPT_WITH = (0, 1, 2), 100
FORM, NUMBER = re.compile(r" ?-?\d+\n"), re.compile(r" ?-?\d")


@dataclass(frozen=True)
class Contender:
    """A method, what it trains, its radius, and the learning rates of its sweep."""

    trains: str
    eps: float
    rates: tuple[float, float, float]


CONTENDERS = {
    "es": Contender("LoRA", 3e-2, (2e-2, 6e-2, 0.18)),
    "eggroll": Contender("all weights", 3e-3, (1e-3, 3e-3, 1e-2)),
    "mezo": Contender("LoRA", 3e-2, (3e-3, 1e-2, 3e-2)),
}


def score(completions: list[str], **columns: Any) -> list[float]:
    """Return 1 for a number and the end of the line, 0.5 for a number that goes on, else 0."""
    return [1.0 if FORM.match(text) else 0.5 if NUMBER.match(text) else 0.0 for text in completions]


def splits(tokenizer: Any, *, held_out: int = 48, validation: int = 24, train: int = 96) -> dict[str, PromptDataset]:
    """Return prompts to train on, to choose a rate by, and to judge by: no two are the same."""
    prompts = [f"{a} {sign} {b} =" for a in range(10, 60) for b in range(2, 10) for sign in "+-*"]
    random.Random(0).shuffle(prompts)
    sizes = {"held-out": held_out, "validation": validation, "train": train}
    datasets, begin = {}, 0
    for name, size in sizes.items():
        rows = [{"prompt": prompt} for prompt in prompts[begin : begin + size]]
        datasets[name] = encode_prompts(rows, tokenizer, max_length=64, where=name)
        begin += size
    return datasets


class Bench:
    """SmolLM2 and its prompts, loaded once; every run starts from the published weights."""

    def __init__(self, model: str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from zokernel.data import resolve_model_path

        path = resolve_model_path(model)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.load = lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.prompts = splits(self.tokenizer)
        self.collate = PromptCollator(self.tokenizer.pad_token_id)
        self.before: dict[str, dict[str, float]] = {}
        ends = [self.tokenizer.eos_token_id]
        self.objective = RewardObjective(Rewards((Reward("form", score),), (1.0,)), self.tokenizer, TOKENS, ends=ends)

    def batch(self, split: str, places: Any) -> dict[str, Any]:
        """Return prompts of a split as a batch."""
        return self.collate([self.prompts[split][place] for place in places])

    def adapted(self, method: str) -> nn.Module:
        """Return the published model, with an adapter if the method trains one."""
        model: nn.Module = self.load()
        if CONTENDERS[method].trains == "LoRA":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")).eval()
        return model

    def judge(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return the mean reward and the share of answers that have the form."""
        texts: list[str] = []
        for begin in range(0, len(self.prompts[split]), 24):
            places = range(begin, min(begin + 24, len(self.prompts[split])))
            texts += self.objective.generate(model, self.batch(split, places))
        rewards = score(texts)
        return {"reward": statistics.mean(rewards), "pass_rate": statistics.mean(r == 1.0 for r in rewards)}

    def run(self, method: str, rate: float, seed: int, split: str, generations: int) -> dict[str, Any]:
        """Train once, and judge before and after."""
        torch.manual_seed(seed)
        contender, model = CONTENDERS[method], self.adapted(method)
        start = time.perf_counter()
        if split not in self.before:  # no method has changed anything yet
            self.before[split] = self.judge(model, split)
        batch: dict[str, Any] = {}
        stacked = Stacked(lambda copies: self.objective.stacked(model, batch, copies), max_copies=2 * PAIRS)
        options = {"eps": contender.eps, "num_perturbations": PAIRS, "seed": seed, "perturb": stacked}
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer: Any = get_method(method)(trained, lr=rate, **options)
        optimizer.watches_loss = False
        order, course = random.Random(seed), []
        for step in range(generations):
            batch |= self.batch("train", order.sample(range(len(self.prompts["train"])), PROMPTS))
            self.objective.seed, self.objective.step = seed, step
            course.append(round(-optimizer.step(lambda: 0.0), 4))
            print(f"{method} {rate:g}, seed {seed}, generation {step + 1}: {course[-1]}", flush=True)
        after = self.judge(model, split)
        settings = {"method": method, "rate": rate, "seed": seed, "split": split, "generations": generations}
        return settings | {
            "before": self.before[split],
            "after": after,
            "course": course,
            "seconds": round(time.perf_counter() - start, 1),
        }


def speed(bench: Bench, method: str, *, tokens: int, rounds: int) -> str:
    """Return the throughput and the peak memory of steps relative to bare generation, taken in turns in one process."""
    model = bench.adapted(method)
    objective = RewardObjective(bench.objective.rewards, bench.tokenizer, tokens)  # no token ends an answer early
    batch = bench.batch("train", range(PROMPTS))
    stacked = Stacked(lambda copies: objective.stacked(model, batch, copies), max_copies=2 * PAIRS)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer: Any = get_method(method)(
        trained, lr=1e-6, eps=CONTENDERS[method].eps, num_perturbations=PAIRS, perturb=stacked
    )
    optimizer.watches_loss = False

    def bare() -> None:
        generate(
            model,
            batch["prompts"],
            batch["prompts_mask"],
            rows=range(PROMPTS),
            copies=2 * PAIRS,
            max_new_tokens=tokens,
            ends=[],
            pad_token_id=bench.tokenizer.pad_token_id,
            sampling=Sampling(),
        )

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    bare()
    memory = peak()
    # The compiler of the directions is loaded once, whatever the model.
    tiny: Any = get_method(method)([torch.nn.Parameter(torch.ones(64, 64))], lr=1e-6, num_perturbations=2)
    tiny.step(lambda: 0.0)
    bare()
    compiled = peak()
    times = take_turns({"bare": bare, "step": lambda: optimizer.step(lambda: 0.0)}, rounds)
    wall, cpu = median_ratios(times["bare"], times["step"])
    return (
        f"{method}, {2 * PAIRS} members x {PROMPTS} prompts, {tokens} tokens: throughput {wall:.2f} of bare generation "
        f"(CPU time {cpu:.2f}); peak memory {peak() / memory:.2f} x ({memory:.0f} -> {peak():.0f} MiB), or "
        f"{peak() / compiled:.2f} x with the compiler of directions loaded before ({compiled:.0f} MiB)."
    )


def best_rate(rows: list[dict[str, Any]], method: str) -> float | None:
    """Return the rate of the sweep with the highest reward on the validation prompts, once all were tried."""
    swept = [row for row in rows if row["method"] == method and row["split"] == "validation"]
    if len(swept) < len(CONTENDERS[method].rates):
        return None
    return float(max(swept, key=lambda row: row["after"]["reward"])["rate"])


def interval(values: list[float]) -> float:
    """Return half the 95 % interval of a mean by Student's t; not a number for fewer than two values."""
    from scipy.stats import t

    if len(values) < 2:
        return math.nan
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table in Markdown of the runs on held-out prompts."""
    lines = [
        "| method | trains | rate | pass rate before | after, by seed | gain in points, 95 % interval | mean reward |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, contender in CONTENDERS.items():
        rate = best_rate(rows, method)
        runs = [r for r in rows if r["method"] == method and r["split"] == "held-out" and r["rate"] == rate]
        runs.sort(key=lambda row: row["seed"])
        if not runs:
            lines.append(f"| `{method}` | {contender.trains} | not measured | | | | |")
            continue
        gains = [100 * (row["after"]["pass_rate"] - row["before"]["pass_rate"]) for row in runs]
        after = ", ".join(f"{100 * row['after']['pass_rate']:.0f}" for row in runs)
        means = [statistics.mean(row[when]["reward"] for row in runs) for when in ("before", "after")]
        before = 100 * runs[0]["before"]["pass_rate"]
        lines.append(
            f"| `{method}` | {contender.trains} | {rate:g} | {before:.0f} % | {after} % | "
            f"{statistics.mean(gains):+.1f} ± {interval(gains):.1f} | {means[0]:.2f} → {means[1]:.2f} |"
        )
    return "\n".join(lines)


def main(output: Path, *, model: str, generations: int, only_table: bool) -> None:
    runs, shared = KeptRuns(output), {"model": model, "generations": generations}
    require_same_settings(runs, {}, **shared)
    bench = None if only_table else Bench(model)

    def ensure_run(method: str, rate: float, seed: int, split: str) -> None:
        if bench is not None and runs.find(method=method, rate=rate, seed=seed, split=split) is None:
            print(json.dumps(runs.add(bench.run(method, rate, seed, split, generations) | shared)), flush=True)

    for method, contender in CONTENDERS.items():
        for rate in contender.rates:
            ensure_run(method, rate, SWEPT_WITH, "validation")
    for seed in SEEDS:
        for method in CONTENDERS:
            rate = best_rate(runs.rows, method)
            if rate is not None:
                ensure_run(method, rate, seed, "held-out")
    print(table(runs.rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/rewards.jsonl"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--generations", type=int, default=GENERATIONS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--speed", choices=list(CONTENDERS))
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.speed:
        print(speed(Bench(arguments.model), arguments.speed, tokens=arguments.tokens, rounds=arguments.rounds))
        raise SystemExit
    main(arguments.output, model=arguments.model, generations=arguments.generations, only_table=arguments.table)
