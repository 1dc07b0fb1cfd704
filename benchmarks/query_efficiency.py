"""How many tokens and forwards each method needs to reach the training loss that MeZO reaches, on real tasks.

The target is the mean training loss that MeZO at the published batch of 16 ends at, at the best of its learning rates.
Every contender gets a sweep of as many rates on seed 0 and then runs its best one from other seeds; MeZO runs all of
its rates that came close, of which the best sets the target.  Training loss is that of the same examples for all,
between evaluations it is interpolated; tokens are those of the batches, padding included; evaluations are not counted.
Finished runs are kept in a file, so that a stopped benchmark goes on.

    python benchmarks/query_efficiency.py --tasks sst2 trec --train full lora --data_folder DIR
    python benchmarks/query_efficiency.py                       # trains nothing: the tables of the committed runs

``DIR`` holds {sst2,rte}/{train,dev}.tsv and trec/{train,test}.csv.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paired
import torch
import torch.nn.functional as F
from directions import machine, table
from query_contenders import CONTENDERS, EPS, FORWARDS, RATES, REFERENCE, Contender, rates_of
from same_settings import require_same_settings

from zokernel.directions.families.blockwise import layer_of, natural_order
from zokernel.errors import LossError
from zokernel.experiments.kept_runs import rows_sha256
from zokernel.finetune.models.freezing import freeze_
from zokernel.finetune.scoring.options import option_scores
from zokernel.finetune.settings.auto import SCHEDULE, cooldown_steps
from zokernel.optim import get_method

COLUMNS = ("task", "train", "contender", "lr", "seed", "curve", "held_out", "data")  # committed runs have no data
COMMITTED = Path(__file__).resolve().parents[1] / "docs" / "results" / "queries.jsonl"
OWN = Path("runs/queries.jsonl")
FILES = {
    "sst2": ("train.tsv", "dev.tsv", None),
    "trec": ("train.csv", "test.csv", ["label", "question"]),
    "rte": ("train.tsv", "dev.tsv", None),
}
SWEEP_SEED = 0
CLOSE = 1.1  # MeZO, which sets the target, runs all seeds at rates whose sweep ended within a tenth of the best one's
MEASURED = 64  # training examples whose loss is followed
POINTS = 8  # evaluations a run

AXES = ("forwards", "tokens", "CPU time")  # columns of a curve, before its loss
BY_TARGET = {"auto": 1, "auto, batch 16": 0}  # whose costs are followed over targets, and which


def in_last_third(weights: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Return the weights of the last third of a model's layers."""
    layers = sorted({layer_of(name) for name, _ in weights}, key=natural_order)
    last_layers = set(layers[len(layers) - len(layers) // 3 :])
    return [(name, tensor) for name, tensor in weights if layer_of(name) in last_layers]


class Arena:
    """A model, its examples, and the weights that every run starts from.

    Args:
        task: A key of :data:`FILES`.
        train: ``full`` or ``lora``.
        folder: Where the data sets are.
    """

    def __init__(self, task: str, train: str, folder: Path):
        from transformers import AutoTokenizer

        from zokernel.data import resolve_model_path
        from zokernel.finetune import Collator, DataArguments, EncodedDataset, encode
        from zokernel.finetune.data.datasets import load_splits, load_task

        training, testing, columns = FILES[task]
        arguments = DataArguments(
            task=task,
            train_file=str(folder / task / training),
            validation_file=str(folder / task / testing),
            column_names=columns,
            max_train_samples=1000,
            max_eval_samples=100,
            max_test_samples=300,
        )
        wording = load_task(arguments)
        splits = load_splits(arguments, wording, seed=0)
        self.data = rows_sha256(splits.train + splits.test)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("smollm2"))
        encoded = (EncodedDataset(encode(wording, rows, tokenizer)) for rows in (splits.train, splits.test))
        self.examples, self.held_out = ([data[n] for n in range(len(data))] for data in encoded)
        self.collate = Collator(pad_token_id=2)
        self.train = train
        self.model = paired.load(lora=train == "lora", untrained=True)
        self.trained = paired.trained(self.model)
        self.start = {name: p.detach().clone() for name, p in self.trained}

    def reset(self) -> None:
        """Put the weights back to the start, none of them frozen."""
        with torch.no_grad():
            for name, p in self.trained:
                p.requires_grad_(True).copy_(self.start[name])

    def batches(self, size: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yield random batches of about equally long examples, as transformers groups them."""
        order = random.Random(seed)
        while True:
            indices = list(range(len(self.examples)))
            order.shuffle(indices)
            batches = []
            for first in range(0, len(indices), 50 * size):
                several = sorted(indices[first : first + 50 * size], key=self.length)
                batches += [several[k : k + size] for k in range(0, len(several) - size + 1, size)]
            order.shuffle(batches)
            for batch in batches:
                yield self.collate([self.examples[n] for n in batch])

    def length(self, index: int) -> int:
        """Return the tokens of a training example."""
        return len(self.examples[index]["input_ids"])

    @torch.no_grad()
    def score(self, items: list[dict[str, Any]]) -> tuple[float, float]:
        """Return mean loss and accuracy."""
        items = sorted(items, key=lambda item: len(item["input_ids"]))
        loss = right = 0.0
        for first in range(0, len(items), 32):
            batch = self.collate(items[first : first + 32])
            with paired.autocast():
                scores = option_scores(self.model, batch).float()
            loss += float(F.cross_entropy(scores, batch["labels"], reduction="sum"))
            right += float((scores.argmax(-1) == batch["labels"]).sum())
        return loss / len(items), right / len(items)


def race(arena: Arena, contender: Contender, lr: float, seed: int, forwards: int) -> dict[str, Any]:
    """Train until ``forwards`` are spent; return the curve of (forwards, tokens, CPU seconds, training loss)."""
    arena.reset()
    torch.manual_seed(seed)
    full = arena.train == "full"
    if contender.frozen is not None and full:
        freeze_(arena.model, layers=contender.frozen, vectors=True)
    weights = paired.trained(arena.model)
    if contender.last_third and not full:
        weights = in_last_third(weights)
    eps = EPS["full"] if full else contender.lora_eps
    options = {"eps": eps, "seed": seed, **contender.options, **({"perturb": "in_forward"} if full else {})}
    method: Any = get_method(contender.method)
    optimizer = method(weights, lr=lr, **options)
    steps = forwards // optimizer.forwards_per_step
    interval = max(1, round(steps / POINTS))
    tokens, seconds = 0, 0.0
    measured = arena.examples[:MEASURED]
    curve = [(0, 0, 0.0, arena.score(measured)[0])]
    batches = arena.batches(contender.batch, seed)
    for step in range(steps):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_at(contender.schedule, step, steps)
        start, before = time.process_time(), optimizer.num_forwards
        try:
            optimizer.step(paired.make_closure(arena.model, batch, bf16=True))
        except LossError:
            curve.append((optimizer.num_forwards, tokens, seconds, math.inf))
            break
        seconds += time.process_time() - start
        tokens += (optimizer.num_forwards - before) * batch["input_ids"].numel()
        if (step + 1) % interval == 0 or step + 1 == steps:
            curve.append((optimizer.num_forwards, tokens, seconds, arena.score(measured)[0]))
    # Rounded, since runs are committed.
    rounded = [(*counts, round(spent), round(loss, 4)) for *counts, spent, loss in curve]
    return {"curve": rounded, "held_out": [round(value, 4) for value in arena.score(arena.held_out)]}


def rate_at(schedule: str, step: int, steps: int) -> float:
    """Return the rate of a step, relative to the run's first."""
    falls_over = {"constant": 0, "linear": steps, SCHEDULE: cooldown_steps(steps)}[schedule]
    return min(1.0, (steps - step) / falls_over) if falls_over else 1.0


def crossing(curve: list[list[float]], target: float, column: int) -> float:
    """Return how much of a column was spent when the loss first came down to ``target``; infinite if it never did."""
    for before, after in itertools.pairwise(curve):
        if after[3] <= target:
            share = (before[3] - target) / (before[3] - after[3]) if before[3] > target else 0.0
            return before[column] + share * (after[column] - before[column])
    return math.inf


def costs(rows: list[dict[str, Any]], target: float, column: int, unit: float) -> tuple[list[float], str]:
    """Return what runs spent of a column to reach ``target``, sorted and over ``unit``, and how many of them did."""
    shares = sorted(crossing(row["curve"], target, column) / unit for row in rows)
    return shares, f"{sum(share < math.inf for share in shares)} of {len(shares)}"


def diverged(curve: list[list[float]]) -> bool:
    """Return whether the loss ever rose well above the start: such runs can end low by accident."""
    return max(point[3] for point in curve) > 1.2 * curve[0][3]


class Runs:
    """Finished runs, in a file of one JSON array per line: the values of :data:`COLUMNS`."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [dict(zip(COLUMNS, json.loads(line))) for line in lines]

    def find(self, **settings: Any) -> list[dict[str, Any]]:
        """Return the runs with these settings."""
        return [row for row in self.rows if all(row[key] == value for key, value in settings.items())]

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished run."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps([row[name] for name in COLUMNS], separators=(",", ":")) + "\n")

    def finalists(self, *, several: bool, **settings: Any) -> list[float]:
        """Return the rate whose sweep ended lowest; or several, if others came close; none if all diverged."""
        sweep = [row for row in self.find(seed=SWEEP_SEED, **settings) if not diverged(row["curve"])]
        ends = {row["lr"]: row["curve"][-1][3] for row in sweep}
        best = min(ends.values(), default=math.inf)
        return [lr for lr, end in ends.items() if end == best or (several and end <= CLOSE * best)]

    def all_diverged(self, **settings: Any) -> bool:
        """Return whether there was a sweep of which no rate is left."""
        return bool(self.find(seed=SWEEP_SEED, **settings)) and not self.finalists(several=False, **settings)

    def evaluation_runs(self, **settings: Any) -> list[dict[str, Any]]:
        """Return the runs that did not serve to choose a rate."""
        return [row for row in self.find(**settings) if row["seed"] != SWEEP_SEED]

    def best_lr(self, **settings: Any) -> float:
        """Return the contender's default rate, or the one that ended lowest on average over the other seeds."""
        name, task, train = settings["contender"], settings["task"], settings["train"]
        if not CONTENDERS[name].swept:
            return rates_of(name, task, train)[0]
        ends: dict[float, list[float]] = {}
        for row in self.evaluation_runs(**settings):
            ends.setdefault(row["lr"], []).append(row["curve"][-1][3])
        return min(ends, key=lambda lr: statistics.mean(ends[lr]))

    def final(self, **settings: Any) -> list[dict[str, Any]]:
        """Return the runs at the best rate."""
        return self.evaluation_runs(lr=self.best_lr(**settings), **settings)


def compete(arena: Arena, task: str, name: str, runs: Runs, seeds: int) -> None:
    """Run what is missing of a contender's sweep and of its best rate."""
    contender = CONTENDERS[name]
    key = {"task": task, "train": arena.train, "contender": name}
    shared = {"data": arena.data}
    require_same_settings(runs, {"task": task}, **shared)

    def once(lr: float, seed: int) -> None:
        if not runs.find(lr=lr, seed=seed, **key):
            runs.add(key | shared | {"lr": lr, "seed": seed} | race(arena, contender, lr, seed, FORWARDS[task]))

    rates = rates_of(name, task, arena.train)
    if contender.swept:
        for lr in rates:
            once(lr, SWEEP_SEED)
        rates = runs.finalists(several=name == REFERENCE, **key)
    for lr in rates:
        for seed in range(SWEEP_SEED + 1, SWEEP_SEED + 1 + seeds):
            once(lr, seed)


def tables(runs: Runs) -> str:
    """Return a table for each task and kind of training."""
    parts = []
    for task, train in itertools.product(FILES, RATES):
        key = {"task": task, "train": train}
        if not runs.evaluation_runs(contender=REFERENCE, **key):
            continue
        reference = runs.final(contender=REFERENCE, **key)
        target = statistics.mean(row["curve"][-1][3] for row in reference)
        budgets = [statistics.median(row["curve"][-1][column] for row in reference) for column in range(3)]
        rows = []
        for name in CONTENDERS:
            final_runs = runs.final(contender=name, **key) if runs.evaluation_runs(contender=name, **key) else []
            if not final_runs:
                if runs.all_diverged(contender=name, **key):
                    rows.append([name, "diverges at all three", *[""] * 7])
                continue
            cells = [name, f"{runs.best_lr(contender=name, **key):g}"]
            for column in (1, 0, 2):
                shares, num_reached = costs(final_runs, target, column, budgets[column])
                cells.append(spread(shares))
            cells.append(num_reached)
            cells.append(mean_error([row["curve"][-1][3] for row in final_runs]))
            cells += [mean_error([row["held_out"][column] for row in final_runs]) for column in (0, 1)]
            rows.append(cells)
        header = ["method", "lr", "tokens", "forwards", "CPU time", "reached", "training loss at the end"]
        header += ["held-out loss", "held-out accuracy"]
        title = f"{task}, {train}: target {target:.3f}, where {REFERENCE} spends {budgets[1]:.0f} tokens"
        parts.append(f"{title} in {budgets[0]:.0f} forwards ({budgets[2]:.0f} s of CPU time)\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def by_target(runs: Runs) -> str:
    """Return what ``auto`` needs to reach where MeZO was after each quarter of its steps, as shares of MeZO's costs."""
    rows = []
    for task, train in itertools.product(FILES, RATES):
        key = {"task": task, "train": train}
        if not all(runs.evaluation_runs(contender=name, **key) for name in (REFERENCE, *BY_TARGET)):
            continue
        curves = [row["curve"] for row in runs.final(contender=REFERENCE, **key)]
        points = len(curves[0]) - 1
        for point in sorted({max(1, points * quarter // 4) for quarter in (1, 2, 3, 4)}):
            target = statistics.mean(curve[point][3] for curve in curves)
            cells = [f"{task}, {train}", f"{curves[0][point][0] / 2:.0f}", f"{target:.3f}"]
            for name, column in BY_TARGET.items():
                budget = statistics.median(curve[point][column] for curve in curves)
                shares, num_reached = costs(runs.final(contender=name, **key), target, column, budget)
                cells.append(f"{spread(shares)}, {num_reached}")
            rows.append(cells)
    header = ["", "MeZO's steps", "training loss", *(f"{name}: {AXES[column]}" for name, column in BY_TARGET.items())]
    return table(header, rows) if rows else ""


def spread(values: list[float]) -> str:
    """Return median and range; a run that never arrived counts as infinite."""
    low, middle, high = values[0], statistics.median(values), values[-1]
    limits = f"[{low:.2f}, {high:.2f}]".replace("inf", "-")
    return f"{'never' if math.isinf(middle) else f'{middle:.2f}'} {limits}"


def mean_error(values: list[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument("--train", nargs="+", choices=list(EPS), default=list(EPS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data_folder", type=Path, help="the data sets; without them nothing is trained")
    parser.add_argument("--runs", type=Path, help=f"finished runs, to which new ones are added: {OWN} by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = Runs(options.runs or (OWN if options.data_folder else COMMITTED))
    if options.data_folder is not None:
        for task in options.tasks:
            for train in options.train:
                arena = Arena(task, train, options.data_folder)
                for name in options.contenders:
                    compete(arena, task, name, runs, options.seeds)
        print(f"Machine: {machine()}.\n")
    print(tables(runs) or f"{runs.path} holds no runs yet: give --data_folder.")
    print(f"\n{by_target(runs)}")


if __name__ == "__main__":
    main()
