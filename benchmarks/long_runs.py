"""How far every method gets with one budget of example-forwards: accuracy against forwards, on three tasks.

    python benchmarks/long_runs.py --headlines samples.jsonl --contenders "auto, LoRA" "MeZO"
    python benchmarks/long_runs.py --data_folder DIR --tasks SST-2 TREC
    python benchmarks/long_runs.py        # only prints the table of the committed runs

``samples.jsonl`` is evals/registry/data/sarcasm/samples.jsonl of the package evals 3.0.1.post1: 3,000 headlines train,
500 choose the step that is kept, 3,000 others are the test.  ``DIR`` holds sst2/{train,dev}.tsv and
trec/{train,test}.csv: of the published training rows, 3,000 train and 500 others choose the step, and the published
dev or test file is the test.

A backward pass counts as two forwards.  Each run is one ``zokernel finetune``.  A finished run is not repeated; one
that was stopped goes on when the command is repeated.

A method first runs at every rate of its sweep with a quarter of the budget; the rate with the least validation loss is
then taken for the whole budget, and only those runs are scored on the test.  ``auto`` chooses its own rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from directions import table
from same_settings import require_same_settings

from zokernel.data import load_table
from zokernel.experiments.kept_runs import KeptRuns, rows_sha256
from zokernel.experiments.kerzoo.real_tasks import DATA

COMMITTED = Path(__file__).resolve().parents[1] / "docs" / "results" / "long_runs.jsonl"
OWN = Path("runs/long_runs.jsonl")
TASKS = ("headlines", "SST-2", "TREC")
WORDING = {
    task: {name: value for name, value in DATA[task].items() if name != "column_names" and not name.endswith("_file")}
    for task in TASKS
}
SIZES = {"train": 3000, "validation": 500, "test": 3000}
EVALUATIONS = 10
STOPPED = 1  # exit code of a run whose loss is no longer finite
SWEPT = 4  # a run of the sweep has this share of the budget, and is evaluated at its end


@dataclass(frozen=True)
class Contender:
    """A method as it is run.

    Args:
        flags: Its flags.
        batch: Examples per step.
        cost: Forwards per step; a backward pass is two.
        rates: The learning rates of its sweep; none if it chooses.
    """

    flags: tuple[str, ...]
    batch: int
    cost: int
    rates: tuple[float, ...] = ()


LORA = ("--lora", "true")
LINEAR = ("--lr_scheduler_type", "linear")
CONTENDERS = {
    "AdamW, LoRA": Contender(("--method", "adamw", *LORA), 8, 3, (3e-4, 1e-3, 3e-3)),
    "AdamW": Contender(("--method", "adamw"), 8, 3, (3e-6, 1e-5, 3e-5)),
    "auto, LoRA, batch 16": Contender(("--method", "auto", *LORA), 16, 2),
    "auto, LoRA": Contender(("--method", "auto", *LORA), 4, 2),
    "auto, batch 16": Contender(("--method", "auto", "--num_perturbations", "7"), 16, 8),
    "auto": Contender(("--method", "auto", "--num_perturbations", "2"), 4, 3),
    "MeZO": Contender(("--method", "mezo", *LINEAR), 16, 2, (1e-5, 3e-5, 1e-4)),
    "MeZO, LoRA": Contender(("--method", "mezo", "--eps", "1e-2", *LINEAR, *LORA), 16, 2, (1e-3, 3e-3, 1e-2)),
    "FZOO": Contender(("--method", "fzoo", *LINEAR), 16, 9, (1e-3, 3e-3, 1e-2)),
    "GRZO": Contender(("--method", "grzo", *LINEAR), 16, 2, (1e-5, 3e-5, 1e-4)),
    "ZO-Muon": Contender(("--method", "zo_muon", *LINEAR), 16, 5, (1e-3, 3e-3, 1e-2)),
    "SubZero+": Contender(("--method", "subzero_plus", "--num_perturbations", "8", *LINEAR), 16, 9, (3e-6, 1e-5, 3e-5)),
}


def write_splits(splits: dict[str, list[dict[str, Any]]], folder: Path) -> dict[str, str]:
    """Write the splits of a task, and return their paths as ``train_file`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in splits.items():
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
        paths[f"{name}_file"] = str(path)
    return paths


def write_headlines(headlines: Path, folder: Path) -> dict[str, str]:
    """Write the three splits of the headlines, and return their paths as ``train_file`` and so on."""
    rows = []
    for line in headlines.read_text(encoding="utf-8").splitlines()[: sum(SIZES.values())]:
        row = json.loads(line)
        rows.append({"headline": row["input"][1]["content"], "kind": row["ideal"]})
    remaining = iter(rows)
    return write_splits({name: list(itertools.islice(remaining, size)) for name, size in SIZES.items()}, folder)


def write_task(task: str, data_folder: Path, folder: Path) -> dict[str, str]:
    """Write the three splits of a published task, and return their paths as ``train_file`` and so on."""
    columns = DATA[task].get("column_names")
    train, test = (
        [dict(row) for row in load_table(data_folder / DATA[task][name], column_names=columns)]
        for name in ("train_file", "validation_file")
    )
    drawn = random.Random(0).sample(train, SIZES["train"] + SIZES["validation"])
    splits = {"train": drawn[: SIZES["train"]], "validation": drawn[SIZES["train"] :], "test": test}
    return write_splits(splits, folder)


def run(
    folder: Path,
    contender: Contender,
    data: dict[str, Any],
    budget: int,
    rate: float | None,
    seed: int,
    *,
    sweeps: bool = False,
) -> int:
    """Train one contender, and return the exit code; an unfinished run is resumed, and a finished one is kept."""
    steps = budget // (contender.batch * contender.cost)
    flags = {
        "--max_train_samples": "-1",
        "--max_eval_samples": "-1",
        "--max_test_samples": "1" if sweeps else "-1",
        "--per_device_train_batch_size": str(contender.batch),
        "--per_device_eval_batch_size": "32",
        "--precision": "bf16",
        "--max_steps": str(steps),
        "--eval_steps": str(steps if sweeps else max(1, steps // EVALUATIONS)),
        "--seed": str(seed),
        "--report_to": "none",
        "--output_dir": str(folder),
        **({} if rate is None else {"--learning_rate": str(rate)}),
    }
    words = [word for pair in flags.items() for word in pair]
    for name, value in data.items():
        words += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return subprocess.call([sys.executable, "-m", "zokernel", "finetune", *contender.flags, *words])


def read_measurements(folder: Path, *, sweeps: bool = False) -> dict[str, Any]:
    """Return what a finished run measured; a run of a sweep has no score on the test."""
    metrics = json.loads((folder / "metrics.json").read_text())
    scores = {name: [metrics[name]["accuracy"], metrics[name]["loss"]] for name in ("before", "after")}
    return {
        "learning_rate": metrics["learning_rate"],
        "steps": metrics["steps"],
        **({} if sweeps else scores),
        "validation": [[row["step"], row["accuracy"], round(row["loss"], 4)] for row in metrics["evaluations"]],
        "seconds": round(metrics["train_seconds"]),
        "peak_mib": metrics["peak_memory_training"] >> 20,
    }


def last_loss(row: dict[str, Any]) -> float:
    """Return the validation loss at the end of a run; infinity for one that diverged."""
    loss = row["validation"][-1][2] if row["validation"] else None
    return math.inf if loss is None or not math.isfinite(loss) else float(loss)


def best_rate(rows: list[dict[str, Any]]) -> float:
    """Return the rate of the run with the least validation loss at its end.

    Example:
        >>> best_rate([{"rate": 1.0, "validation": [[9, 0.5, 0.7]]}, {"rate": 2.0, "validation": [[9, 0.6, 0.6]]}])
        2.0
    """
    return float(min(rows, key=last_loss)["rate"])


def run_all(runs: KeptRuns, task: str, data: dict[str, Any], args: argparse.Namespace) -> None:
    """Make every missing run of a task: sweeps from the first seed, then the whole budget from every seed."""
    shared = {"data": rows_sha256(Path(data[f"{split}_file"]).read_text(encoding="utf-8") for split in SIZES)}
    require_same_settings(runs, {"task": task}, **shared)

    def finished(name: str, rate: float | None, budget: int, seed: int) -> dict[str, Any]:
        key = {"task": task, "method": name, "rate": rate, "budget": budget, "seed": seed}
        row = runs.find(**key)
        if row is None:
            label = f"{task} {name} {rate or 'chosen'} {budget} {seed}".replace(",", "").replace(" ", "-")
            folder, sweeps = args.output_dir / label, budget != args.budget
            code = run(folder, CONTENDERS[name], data, budget, rate, seed, sweeps=sweeps)
            if code not in (0, STOPPED):
                raise SystemExit(code)
            row = runs.add(key | shared | ({"validation": []} if code else read_measurements(folder, sweeps=sweeps)))
        return row

    for name in args.contenders:
        rates = CONTENDERS[name].rates
        rate = args.rate if rates else None
        if rates and rate is None:
            rate = best_rate([finished(name, swept, args.budget // SWEPT, args.seeds[0]) for swept in rates])
        for seed in args.seeds if not args.only_sweep else ():
            finished(name, rate, args.budget, seed)


def table_row(row: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    contender = CONTENDERS[row["method"]]
    if "after" not in row:
        return [row["task"], row["method"], str(row["rate"]), str(row["seed"]), "", "", "diverged", "", "", "", ""]
    (before, _), (after, loss) = row["before"], row["after"]
    per_step = contender.batch * contender.cost
    course = " ".join(f"{step * per_step}: {accuracy:.3f}" for step, accuracy, _ in row["validation"])
    rate = f"{row['learning_rate']:.2g}" + ("" if contender.rates else " (chosen)")
    cells = [*map(str, (row["task"], row["method"], rate, row["seed"], row["steps"] * per_step)), f"{before:.3f}"]
    return [*cells, f"{after:.3f}", f"{loss:.3f}", str(row["seconds"]), str(row["peak_mib"]), course]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headlines", type=Path, help="the file of headlines")
    parser.add_argument("--data_folder", type=Path, help="the folder of SST-2 and TREC")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="those whose data are given")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/long"))
    parser.add_argument("--runs", type=Path, help=f"finished runs, to which new ones are added: {OWN} by default")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--budget", type=int, default=36_000, help="example-forwards of a run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rate", type=float, help="one rate for the contenders named, without a sweep")
    parser.add_argument("--only_sweep", action="store_true", help="only the short runs that choose the rates")
    args = parser.parse_args()
    trains = args.headlines is not None or args.data_folder is not None
    runs = KeptRuns(args.runs or (OWN if trains else COMMITTED))
    for task in args.tasks if trains else ():
        folder = args.output_dir / "data" / task
        if task == "headlines" and args.headlines is not None:
            files = write_headlines(args.headlines, folder)
        elif task != "headlines" and args.data_folder is not None:
            files = write_task(task, args.data_folder, folder)
        else:
            continue
        run_all(runs, task, WORDING[task] | files, args)
    head = ["task", "method", "rate", "seed", "example-forwards", "before", "after (test)", "loss", "s", "peak MiB"]
    whole = [row for row in runs.rows if "after" in row or row["budget"] == args.budget]
    print(table([*head, "validation"], [table_row(row) for row in whole]))


if __name__ == "__main__":
    main()
