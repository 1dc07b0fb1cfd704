"""Does training with the rate that ``zokernel plan`` advises go well?  Each plan is followed, beside a sweep of five.

Six tasks, all weights and LoRA, three seeds: the plan is made with a run's seed, then MeZO trains at the advised rate
and at the five rates of the sweep, with the same batches and directions and the command's settings (constant rate,
one direction per step, its default eps).  Losses are those of the same 256 training examples (all, where there are
fewer) before and after.  Finished plans and runs are kept in a file, so that a stopped benchmark goes on.

    python benchmarks/plan_followed.py --data_folder DIR --headlines samples.jsonl
    python benchmarks/plan_followed.py        # only prints the table of the committed runs

``DIR`` holds {sst2,rte}/train.tsv and trec/train.csv; ``samples.jsonl`` is evals/registry/data/sarcasm/samples.jsonl of
the package evals 3.0.1.post1.  The tickets are made up here; movie-reviews comes with the library.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paired
import torch
from directions import table
from long_runs import WORDING, write_headlines
from same_settings import require_same_settings

from zokernel.experiments.kept_runs import KeptRuns, rows_sha256

TASKS = ("tickets", "sst2", "trec", "rte", "movie-reviews", "headlines")
SWEEP = {"full": (3e-6, 1e-5, 3e-5, 1e-4, 3e-4), "lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
EPS = {"full": 1e-3, "lora": 1e-2}
COMMITTED = Path(__file__).resolve().parents[1] / "docs" / "results" / "plan_followed.jsonl"
OWN = Path("runs/plan_followed.jsonl")
MEASURED = 256  # training examples whose loss is followed; 64 may be far easier than the rest
ROWS = 1000
RESTS_ON = (
    "reach",
    "slope",
    "gradient_norm",
    "noise_scale",
    "trace_hessian",
    "trace_fisher",
    "learning_rate",
    "forwards",
)
DIVERGED = 1.2  # the loss at the end is so many times that of the start
BLEW_UP = 10  # the loss of a step is so many times that of the start, even if the end is a model that only guesses

MESSAGES = {
    "billing": (
        "I was charged twice for order {n}.",
        "The refund for order {n} has not arrived.",
        "Why is there a fee of {n} cents on my invoice?",
        "My card was declined although it is valid.",
        "Please send the receipt for {n}.",
    ),
    "account": (
        "Please close my account number {n}.",
        "I cannot log in since Monday.",
        "How do I change the address of account {n}?",
        "The password mail never comes.",
        "Someone else uses my user name.",
    ),
    "technical": (
        "The app crashes when I open page {n}.",
        "Error {n} appears during the upload.",
        "Search has found nothing since the update.",
        "The export file is empty.",
        "Video stops after {n} seconds.",
    ),
}
ENDINGS = ("", " It is urgent.", " This is the third time I write.", " No answer so far.", " Thank you.")


@dataclass(frozen=True)
class Sources:
    """Where data are: the folder of the published sets, the file of headlines, and a folder for files made here."""

    data: Path
    headlines: Path
    scratch: Path

    def arguments(self, task: str) -> dict[str, Any]:
        """Return the data flags of a task."""
        if task == "tickets":
            return {
                "train_file": str(self._tickets()),
                "template": "{message} This ticket is about",
                "label_words": list(MESSAGES),
                "labels": list(MESSAGES),
                "label_column": "team",
            }
        if task == "headlines":
            return {"train_file": write_headlines(self.headlines, self.scratch)["train_file"], **WORDING["headlines"]}
        if task == "movie-reviews":
            return {"dataset_name": task}
        columns = {"column_names": ["label", "question"]} if task == "trec" else {}
        return {"task": task, "train_file": str(self.data / task / f"train.{'csv' if columns else 'tsv'}"), **columns}

    def _tickets(self) -> Path:
        path, draw = self.scratch / "tickets.csv", random.Random(0)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["message", "team"])
            for _ in range(200):
                team = draw.choice(list(MESSAGES))
                text = draw.choice(MESSAGES[team]).format(n=draw.randrange(1000, 9999)) + draw.choice(ENDINGS)
                writer.writerow([text, team])
        return path


def training_rows(data: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """Return a task and its training rows, given its data flags."""
    from zokernel.finetune import DataArguments
    from zokernel.finetune.data.datasets import load_splits, load_task

    arguments = DataArguments(max_train_samples=ROWS, max_eval_samples=40, **data)
    wording = load_task(arguments)
    return wording, load_splits(arguments, wording, seed=0).train


class Course:
    """A model, a task's examples, and the weights that every run starts from.

    Args:
        wording: The task.
        rows: Its training rows.
        lora: Train a LoRA adapter, not all weights.
    """

    def __init__(self, wording: Any, rows: list[dict[str, Any]], *, lora: bool):
        from transformers import AutoTokenizer

        from zokernel.data import resolve_model_path
        from zokernel.finetune.data.collate import Collator, EncodedDataset
        from zokernel.finetune.tasks import encode

        tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("smollm2"))
        encoded = EncodedDataset(encode(wording, rows, tokenizer))
        self.examples = [encoded[n] for n in range(len(encoded))]
        self.collate = Collator(pad_token_id=tokenizer.pad_token_id or 0)
        self.model = paired.load(lora=lora, untrained=True)
        self.start = {name: p.detach().clone() for name, p in paired.trained(self.model)}
        self.before = self.loss()

    @torch.no_grad()
    def loss(self) -> float:
        """Return the mean loss of the measured examples."""
        items = sorted(self.examples[:MEASURED], key=lambda item: len(item["input_ids"]))
        total = 0.0
        for first in range(0, len(items), 32):
            batch = self.collate(items[first : first + 32])
            total += float(paired.make_closure(self.model, batch, bf16=True)()) * len(batch["labels"])
        return total / len(items)

    def run(self, lr: float, *, eps: float, seed: int, steps: int, batch: int) -> dict[str, float]:
        """Train from the start; return the loss before, after, and the highest that a step saw."""
        from zokernel.errors import LossError
        from zokernel.optim import MeZO

        weights = paired.trained(self.model)
        with torch.no_grad():
            for name, p in weights:
                p.copy_(self.start[name])
        before, highest = self.before, 0.0
        optimizer = MeZO(weights, lr=lr, eps=eps, seed=seed, perturb="in_forward")
        draw = random.Random(seed)
        for _ in range(steps):
            items = self.collate(draw.sample(self.examples, batch))
            try:
                highest = max(highest, float(optimizer.step(paired.make_closure(self.model, items, bf16=True))))
            except LossError:
                return {"before": before, "after": math.inf, "highest": math.inf}
        return {"before": before, "after": self.loss(), "highest": highest}


def advice(data: dict[str, Any], *, lora: bool, seed: int, steps: int, batch: int, num_probes: int) -> dict[str, Any]:
    """Return the rate that ``zokernel plan`` advises (as it prints it), or none, and the measurements it rests on."""
    from zokernel.commands.plan import PlanArguments, plan_for
    from zokernel.finetune import DataArguments, ModelArguments

    plan = plan_for(
        ModelArguments(lora=lora),
        DataArguments(max_train_samples=ROWS, max_eval_samples=40, **data),
        PlanArguments(seed=seed, max_steps=steps, update_examples=batch, num_probes=num_probes, num_perturbations=[1]),
    ).plan
    rate = plan.run_rate[min(plan.run_rate)]
    record = plan.as_dict()
    lr = float(f"{rate.value:.1e}") if rate.known else None
    return {"lr": lr, "plan": {name: record[name] for name in RESTS_ON}}


def follow(records: KeptRuns, sources: Sources, settings: argparse.Namespace) -> None:
    """Make every missing plan and run."""
    fixed = {"steps": settings.steps, "batch": settings.batch}
    data = {task: sources.arguments(task) for task in settings.tasks}
    loaded = {task: training_rows(data[task]) for task in settings.tasks}
    hashes = {task: {"data": rows_sha256(rows), "measured": MEASURED} for task, (_, rows) in loaded.items()}
    for task, shared in hashes.items():
        require_same_settings(records, {"task": task}, **shared)
    for seed, task, train in itertools.product(settings.seeds, settings.tasks, settings.train):
        place = {"task": task, "train": train, "seed": seed, **fixed}
        shared, course = hashes[task], None
        probes = {"num_probes": settings.num_probes}
        planned = None if settings.no_plan else records.find(kind="plan", **place, **probes)
        if planned is None and not settings.no_plan:
            start = time.perf_counter()
            advised = advice(data[task], lora=train == "lora", seed=seed, **fixed, **probes)
            planned = {"kind": "plan", **place, **shared, **probes, **advised}
            records.add(planned | {"seconds": round(time.perf_counter() - start)})
            print(f"{task} {train} seed {seed}: advised {planned['lr']}", flush=True)
        rates = [planned["lr"]] if planned and planned["lr"] is not None else []
        for lr in [*rates, *(() if settings.no_sweep else SWEEP[train])]:
            if records.find(kind="run", lr=lr, **place) is None:
                course = course or Course(*loaded[task], lora=train == "lora")
                start = time.perf_counter()
                losses = course.run(lr, eps=EPS[train], seed=seed, **fixed)
                row = {"kind": "run", **place, **shared, "lr": lr}
                row |= {name: round(loss, 4) for name, loss in losses.items()}
                records.add(row | {"seconds": round(time.perf_counter() - start)})
                print(f"{task} {train} seed {seed} lr {lr:g}: {row['before']} -> {row['after']}", flush=True)


def diverged(row: dict[str, Any]) -> bool:
    """Return whether a run ended far above its start, or was so far up that what is left only guesses.

    Example:
        >>> [diverged({"before": 1.0, "after": 0.69, "highest": highest}) for highest in (2.0, 1e5)]
        [False, True]
    """
    return not (row["after"] <= DIVERGED * row["before"] and row["highest"] <= BLEW_UP * row["before"])


def summary(records: KeptRuns, settings: argparse.Namespace) -> str:
    """Return the table: for each task and what is trained, the advised rates beside the best of the sweep.

    The best rate has the least mean loss at the end, of the rates at which no run diverged.
    """
    lines, followed, num_diverged = [], 0, 0
    for task, train in itertools.product(settings.tasks, settings.train):
        place = {"task": task, "train": train, "steps": settings.steps, "batch": settings.batch}
        advised = {
            seed: run
            for seed in settings.seeds
            if (plan := records.find(kind="plan", num_probes=settings.num_probes, seed=seed, **place))
            and (run := records.find(kind="run", lr=plan["lr"], seed=seed, **place))
        }
        swept = {
            lr: {seed: row for seed in settings.seeds if (row := records.find(kind="run", lr=lr, seed=seed, **place))}
            for lr in SWEEP[train]
        }
        followed += len(advised)
        num_diverged += sum(map(diverged, advised.values()))
        if not any((advised, *swept.values())):
            continue
        start = next(row["before"] for rows in (advised, *swept.values()) for row in rows.values())
        row = {"task": task, "trained": train, "start": f"{start:.3f}"}
        row["advised rates"] = " ".join(f"{run['lr']:.1e}" for run in advised.values())
        row["ends at"] = " ".join(map(ending, advised.values()))
        row |= {f"rate {n}": rate_cell(swept[lr], lr) for n, lr in enumerate(SWEEP[train], 1)}
        lines.append(row | {"advised - best": gap_cell(advised, swept)})
    if not lines:
        return "Nothing yet."
    printed = table(list(lines[0]), [list(line.values()) for line in lines])
    return f"{printed}\n\n{followed} plans followed, {num_diverged} of the runs diverged."


def ending(row: dict[str, Any]) -> str:
    """Return the loss at the end of a run, or that it diverged."""
    return "diverged" if diverged(row) else f"{row['after']:.3f}"


def rate_cell(runs: dict[int, dict[str, Any]], lr: float) -> str:
    """Return a rate of the sweep with the mean of its losses at the end, or how many of its runs diverged."""
    count = sum(map(diverged, runs.values()))
    if not runs or count:
        return f"{lr:g}: {count} of {len(runs)} diverged" if runs else f"{lr:g}:"
    return f"{lr:g}: {statistics.fmean(row['after'] for row in runs.values()):.3f}"


def gap_cell(advised: dict[int, dict[str, Any]], swept: dict[float, dict[int, dict[str, Any]]]) -> str:
    """Return the mean gap between the losses at the end and those at the best rate of the sweep, with its error."""
    whole = [runs for runs in swept.values() if runs.keys() >= advised.keys() and not any(map(diverged, runs.values()))]
    if not advised or not whole or any(map(diverged, advised.values())):
        return ""
    best = min(whole, key=lambda runs: statistics.fmean(runs[seed]["after"] for seed in advised))
    gaps = [run["after"] - best[seed]["after"] for seed, run in advised.items()]
    spread = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return f"{statistics.fmean(gaps):.3f} ± {spread:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_folder", type=Path, help="without it nothing is trained")
    parser.add_argument("--headlines", type=Path, default=Path("samples.jsonl"))
    parser.add_argument("--runs", type=Path, help=f"finished runs, to which new ones are added: {OWN} by default")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--train", nargs="+", choices=list(SWEEP), default=list(SWEEP))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--num_probes", type=int, default=32, help="probes of a plan")
    parser.add_argument("--no_sweep", action="store_true", help="only plans and the runs that follow them")
    parser.add_argument("--no_plan", action="store_true", help="only the sweep")
    settings = parser.parse_args()
    records = KeptRuns(settings.runs or (OWN if settings.data_folder else COMMITTED))
    if settings.data_folder is not None:
        with tempfile.TemporaryDirectory() as scratch:
            follow(records, Sources(settings.data_folder, settings.headlines, Path(scratch)), settings)
    print(summary(records, settings))


if __name__ == "__main__":
    main()
