"""How far every method gets with one budget of example-forwards: accuracy against forwards, on sarcasm headlines.

    python benchmarks/long_runs.py --headlines samples.jsonl --output_dir runs/long --contenders "auto, LoRA" "MeZO"
    python benchmarks/long_runs.py        # only prints the table of the committed runs

``samples.jsonl`` is evals/registry/data/sarcasm/samples.jsonl of the package evals 3.0.1.post1: 3,000 headlines train,
500 choose the step that is kept, 3,000 others are the test.  A backward pass counts as two forwards.  Each run is one
``zokernel finetune``.  A finished run is not repeated; one that was stopped goes on when the command is repeated.

``--sweep`` runs every rate of a method; choose by the validation column, with a smaller ``--budget``.  ``auto`` chooses
its own rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from directions import table
from same_settings import require_same_settings

from zokernel.experiments.kept_runs import KeptRuns, rows_sha256
from zokernel.experiments.kerzoo.real_tasks import DATA

COMMITTED = Path(__file__).resolve().parents[1] / "docs" / "results" / "long_runs.jsonl"
OWN = Path("runs/long_runs.jsonl")
WORDING = {name: value for name, value in DATA["headlines"].items() if not name.endswith("_file")}
SIZES = {"train": 3000, "validation": 500, "test": 3000}
EVALUATIONS = 10


@dataclass(frozen=True)
class Contender:
    """A method as it is run.

    Args:
        flags: Its flags.
        batch: Examples per step.
        cost: Forwards per step; a backward pass is two.
        rates: The learning rates of its sweep, the middle one first; none if it chooses.
    """

    flags: tuple[str, ...]
    batch: int
    cost: int
    rates: tuple[float, ...] = ()


LORA = ("--lora", "true")
CONTENDERS = {
    "AdamW, LoRA": Contender(("--method", "adamw", *LORA), 8, 3, (1e-3, 3e-4, 3e-3)),
    "MeZO": Contender(("--method", "mezo", "--lr_scheduler_type", "linear"), 16, 2, (3e-5, 1e-5, 1e-4)),
    "MeZO, LoRA": Contender(
        ("--method", "mezo", "--eps", "1e-2", "--lr_scheduler_type", "linear", *LORA), 16, 2, (3e-3, 1e-3, 1e-2)
    ),
    "auto": Contender(("--method", "auto", "--num_perturbations", "2"), 4, 3),
    "auto, batch 16": Contender(("--method", "auto", "--num_perturbations", "7"), 16, 8),
    "auto, LoRA": Contender(("--method", "auto", *LORA), 4, 2),
    "auto, LoRA, batch 16": Contender(("--method", "auto", *LORA), 16, 2),
    "GRZO": Contender(("--method", "grzo", "--lr_scheduler_type", "linear"), 16, 2, (3e-5, 1e-5, 1e-4)),
    "FZOO": Contender(("--method", "fzoo", "--lr_scheduler_type", "linear"), 16, 9, (3e-3, 1e-3, 1e-2)),
}


def write_rows(headlines: Path, folder: Path) -> dict[str, str]:
    """Write the three splits, and return their paths as ``train_file`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for line in headlines.read_text(encoding="utf-8").splitlines()[: sum(SIZES.values())]:
        row = json.loads(line)
        rows.append(json.dumps({"headline": row["input"][1]["content"], "kind": row["ideal"]}))
    paths, first = {}, 0
    for name, size in SIZES.items():
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(rows[first : first + size]) + "\n", encoding="utf-8")
        paths[f"{name}_file"], first = str(path), first + size
    return paths


def run(folder: Path, contender: Contender, data: dict[str, str], budget: int, rate: float | None, seed: int) -> None:
    """Train one contender; an unfinished run is resumed, and a finished one is kept."""
    steps = budget // (contender.batch * contender.cost)
    flags = {
        "--max_train_samples": "-1",
        "--max_eval_samples": "-1",
        "--max_test_samples": "-1",
        "--per_device_train_batch_size": str(contender.batch),
        "--per_device_eval_batch_size": "32",
        "--precision": "bf16",
        "--max_steps": str(steps),
        "--eval_steps": str(max(1, steps // EVALUATIONS)),
        "--seed": str(seed),
        "--report_to": "none",
        "--output_dir": str(folder),
        **({} if rate is None else {"--learning_rate": str(rate)}),
    }
    words = [word for pair in flags.items() for word in pair]
    for name, value in (data | WORDING).items():
        words += [f"--{name}", *([value] if isinstance(value, str) else value)]
    if code := subprocess.call([sys.executable, "-m", "zokernel", "finetune", *contender.flags, *words]):
        raise SystemExit(code)


def read_measurements(folder: Path) -> dict[str, Any]:
    """Return what a finished run measured."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        "learning_rate": metrics["learning_rate"],
        "steps": metrics["steps"],
        "before": [metrics["before"]["accuracy"], metrics["before"]["loss"]],
        "after": [metrics["after"]["accuracy"], metrics["after"]["loss"]],
        "validation": [[row["step"], row["accuracy"], round(row["loss"], 4)] for row in metrics["evaluations"]],
        "seconds": round(metrics["train_seconds"]),
        "peak_mib": metrics["peak_memory_training"] >> 20,
    }


def table_row(row: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    contender, (before, _), (after, _) = CONTENDERS[row["method"]], row["before"], row["after"]
    half = 1.96 * math.sqrt(after * (1 - after) / SIZES["test"])
    per_step = contender.batch * contender.cost
    course = " ".join(f"{step * per_step}: {accuracy:.3f}" for step, accuracy, _ in row["validation"])
    rate = f"{row['learning_rate']:.2g}" + ("" if contender.rates else " (chosen)")
    cells = [row["method"], rate, str(row["seed"]), str(row["steps"] * per_step), f"{before:.3f}"]
    return [*cells, f"{after:.3f} ± {half:.3f}", str(row["seconds"]), str(row["peak_mib"]), course]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headlines", type=Path, help="without it nothing is trained")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/long"))
    parser.add_argument("--runs", type=Path, help=f"finished runs, to which new ones are added: {OWN} by default")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--budget", type=int, default=36_000, help="example-forwards of a run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rate", type=float, help="one rate for the contenders named, not the middle of the sweep")
    parser.add_argument("--sweep", action="store_true", help="run every rate of the contenders named")
    args = parser.parse_args()
    runs = KeptRuns(args.runs or (OWN if args.headlines else COMMITTED))
    if args.headlines is not None:
        data = write_rows(args.headlines, args.output_dir)
        shared = {"data": rows_sha256(Path(path).read_text(encoding="utf-8") for path in data.values())}
        require_same_settings(runs, {}, **shared)
        for name, seed in itertools.product(args.contenders, args.seeds):
            contender = CONTENDERS[name]
            rates = contender.rates if args.sweep else (args.rate or next(iter(contender.rates), None),)
            for rate in rates or (None,):  # auto chooses its own
                key = {"method": name, "rate": rate, "budget": args.budget, "seed": seed}
                if runs.find(**key) is None:
                    label = f"{name} {rate or 'chosen'} {args.budget} {seed}".replace(",", "").replace(" ", "-")
                    folder = args.output_dir / label
                    run(folder, contender, data, args.budget, rate, seed)
                    runs.add(key | shared | read_measurements(folder))
    head = ["method", "rate", "seed", "example-forwards", "before", "after (test)", "s", "peak MiB", "validation"]
    print(table(head, [table_row(row) for row in runs.rows]))


if __name__ == "__main__":
    main()
