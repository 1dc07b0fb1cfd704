"""Figure 4 and Table 13 on a real language model: SmolLM2-135M with LoRA, at matched effective learning rates.

Without data of one's own the movie reviews are used.  With ``--set data_folder=DIR`` the tasks are SST-2, TREC and RTE,
read from ``DIR/sst2/{train,dev}.tsv``, ``DIR/trec/{train,test}.csv`` and ``DIR/rte/{train,dev}.tsv``;
``--set tasks='["SST-2"]'`` takes some of them.  A further task is ``headlines``, real or sarcastic, from
``DIR/headlines/{train,test}.jsonl`` as ``benchmarks/long_runs.py`` writes them.

``--set lora=false`` trains all weights.  ``--set sweep=true`` also trains every method at four effective rates from
the first seed, chooses one by the loss of the validation examples, and trains the other seeds there.  With
``--set runs=FILE`` finished runs are kept in a file, and an experiment that was stopped goes on from it.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from zokernel.errors import LossError, RunError, UsageError
from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.criteria import NOT_RUN, Interval, below, combined, interval, shown
from zokernel.experiments.kept_runs import KeptRuns, rows_sha256
from zokernel.experiments.kerzoo.jobs import finetune_job, tiny_setup
from zokernel.experiments.kerzoo.methods import CONSTANT
from zokernel.figures import figures
from zokernel.files import read_json
from zokernel.kernels.plan import plain

logger = logging.getLogger(__name__)

KEPT = ("learning_rate", "effective_lr", "before", "after", "forwards", "train_seconds", "evaluations")
MATCHED = "MeZO-3 at KerZOO's effective lr"
DATA: dict[str, dict[str, Any]] = {  # data arguments by task; files are relative to the folder of the data
    "SST-2": {"task": "sst2", "train_file": "sst2/train.tsv", "validation_file": "sst2/dev.tsv"},
    "TREC": {
        "task": "trec",
        "train_file": "trec/train.csv",
        "validation_file": "trec/test.csv",
        "column_names": ["label", "question"],
    },
    "RTE": {"task": "rte", "train_file": "rte/train.tsv", "validation_file": "rte/dev.tsv"},
    "headlines": {
        "train_file": "headlines/train.jsonl",
        "validation_file": "headlines/test.jsonl",
        "template": "Headline: {headline}\nThis headline is",
        "label_column": "kind",
        "labels": ["0", "1"],
        "label_words": ["news", "satire"],
    },
}
OF_THE_PAPER = ("SST-2", "TREC", "RTE")


# Methods by name; KerZOO's rate is a quarter of its effective one.
METHODS: dict[str, dict[str, Any]] = {
    "MeZO-1": {"method": "mezo"},
    "MeZO-3": {"method": "mezo", "num_perturbations": 3},
    "KerZOO": {"method": "kerzoo"},
    "KerZOO as printed": {"method": "kerzoo", "method_args": ["radius_schedule=literal", "averaging=journal"]},
}
SWEEP = (4 / 9, 4 / 3, 4.0, 12.0)  # effective rates of the sweep, over the nominal rate of the experiment


def rate_of(method: str, effective: float) -> float:
    """Return the nominal rate at which a method moves as far as MeZO at an effective one.

    Example:
        >>> rate_of("MeZO-3", 4e-3), rate_of("KerZOO", 4e-3)
        (0.004, 0.001)
    """
    return effective / CONSTANT if method.startswith("KerZOO") else effective


def settings_of(method: str, learning_rate: float, steps: int) -> dict[str, Any]:
    """Return the settings of a method at a nominal rate."""
    found = METHODS[method] | {"learning_rate": learning_rate}
    if "method_args" in found:
        found["method_args"] = [*found["method_args"], f"total_steps={steps}"]
    return found


def lines(lr: float, steps: int) -> dict[str, dict[str, Any]]:
    """Return the settings of every line at a given rate: equal nominal rates, and MeZO-3 at KerZOO's effective one."""
    found = {method: settings_of(method, lr, steps) for method in METHODS}
    return found | {MATCHED: settings_of("MeZO-3", CONSTANT * lr, steps)}


def best(
    method: str, lr: float, steps: int, train: Callable[[dict[str, Any], int], dict[str, Any]], seed: int
) -> dict[str, Any]:
    """Return the settings of a method at the effective rate of the sweep with the lowest validation loss."""
    tried = [settings_of(method, rate_of(method, factor * lr), steps) for factor in SWEEP]
    return min(tried, key=lambda line: last_loss(train(line, seed)))


def last_loss(metrics: dict[str, Any]) -> float:
    """Return the validation loss at the end of a run; infinity if it stopped before, or is not finite."""
    return or_infinity(metrics["evaluations"][-1]["loss"]) if metrics["evaluations"] else math.inf


def or_infinity(loss: float | None) -> float:
    """Return a loss, or infinity for one that is not finite, which files keep as null."""
    return math.inf if loss is None or not math.isfinite(loss) else loss


def outcome(**job: Any) -> dict[str, Any]:
    """Return what a run gave; one that diverged has the score before it, infinite losses and no evaluations.

    Args:
        **job: Arguments of :func:`finetune_job`.
    """
    from zokernel.finetune.storage.run_folder import RUN_FILE

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        try:
            return finetune_job(**job, folder=folder)
        except RunError as error:
            if not isinstance(error.__cause__, LossError):
                raise
            logger.warning("A run at learning rate %g diverged: %s", job["settings"]["learning_rate"], error.__cause__)
            before = read_json(folder / RUN_FILE)["before"]
    lost = {"after": {"loss": math.inf, "accuracy": None}, "evaluations": []}
    return dict.fromkeys(KEPT) | lost | {"learning_rate": job["settings"]["learning_rate"], "before": before}


def tasks(config: Config) -> dict[str, dict[str, Any]]:
    """Return the data arguments of every task, by its name."""
    folder = config.options.get("data_folder")
    if folder is None:
        if config.scale == "full":
            return {"SST-2": {"task": "sst2", "dataset_name": "stanfordnlp/sst2"}}
        return {"movie reviews": {"task": "movie-reviews", "dataset_name": "movie-reviews"}}
    found: dict[str, dict[str, Any]] = {}
    for name in config.options.get("tasks", OF_THE_PAPER):
        if name not in DATA:
            raise UsageError(f"There is no task {name!r}: choose from {', '.join(DATA)}.")
        files = {key: str(Path(folder) / DATA[name][key]) for key in ("train_file", "validation_file")}
        found[name] = DATA[name] | files
    return found


def hashes(data: dict[str, Any]) -> dict[str, str]:
    """Return the hashes of the files of a task, which are those of other rows once a file is another."""
    from zokernel.data import load_table

    columns = data.get("column_names")
    splits = [split for split in ("train_file", "validation_file") if split in data]
    return {split: rows_sha256(load_table(data[split], column_names=columns)) for split in splits}


@experiment(
    "kerzoo/language_model", "Figure 4, Table 13: SmolLM2 with LoRA on real tasks, at equal and matched learning rates"
)
def run(config: Config) -> Result:
    """Train every line from several seeds on the same data."""
    steps = config.pick("steps", smoke=3, cpu=60, full=4000)
    seeds = config.pick("seeds", smoke=1, cpu=5, full=5)
    lora = config.options.get("lora", True)
    lr = config.pick("lr", smoke=1e-3, cpu=3e-4 if lora else 3e-6, full=1e-4 if lora else 1e-6)
    name = config.pick("model", smoke="tiny", cpu="smollm2", full="facebook/opt-2.7b")
    limits = {"max_train_samples": 1000, "max_eval_samples": 100}
    limits["max_test_samples"] = config.pick("test", smoke=8, cpu=200)
    settings = {
        "max_steps": steps,
        "eps": 1e-2 if lora else 1e-3,
        "per_device_train_batch_size": config.pick("batch_size", smoke=4, cpu=4, full=16),
        "precision": config.pick("precision", smoke="fp32", cpu="fp32", full="auto"),
        "eval_strategy": "steps",
        "eval_steps": steps,
        "load_best_model_at_end": False,
        "logging_steps": 1,
    }
    kept = config.options.get("runs")
    runs = KeptRuns(None if kept is None else Path(kept))
    sweep = config.options.get("sweep", False)
    rows: list[dict[str, Any]] = []
    data_by_task = tasks(config)
    for task, data in data_by_task.items():
        with tempfile.TemporaryDirectory() as temporary:
            arguments, model_arguments = data | limits, {"model_name_or_path": name, "lora": lora}
            if name == "tiny":
                tiny, arguments = tiny_setup(Path(temporary), {"task": data.get("task", "sst2")})
                model_arguments |= tiny

            rows_read = {} if kept is None or name == "tiny" else hashes(data)

            def train(line: dict[str, Any], seed: int) -> dict[str, Any]:
                chosen = settings | line | {"seed": seed}
                key = {"task": task, "data": data, "rows": rows_read, "model": name, "lora": lora}  # noqa: B023
                known = json.dumps(key | {"settings": chosen, **limits}, sort_keys=True)
                found = runs.find(run=known)
                if found is None:
                    metrics = outcome(model=model_arguments, data=arguments, settings=chosen)  # noqa: B023
                    found = runs.add({"run": known, "metrics": plain({part: metrics[part] for part in KEPT})})
                return dict(found["metrics"])

            compared = lines(lr, steps)
            if sweep:
                compared |= {f"{method}, best rate": best(method, lr, steps, train, config.seed) for method in METHODS}
            for label, line in compared.items():
                found = [train(line, seed) for seed in range(config.seed, config.seed + seeds)]
                rows.append({"task": task, "method": label} | summarise(found))
                logger.info("%s, %s: test loss %s", task, label, rows[-1]["test_loss"])
    gaps = {task: gap(rows, task) for task in data_by_task}
    verdict = judge(gaps, seeds, steps)
    parts = []
    for task, (mean, low, high) in gaps.items():
        losses = ", ".join(f"{np.mean(row['test_loss']):.3f} ({row['method']})" for row in rows if row["task"] == task)
        before = next(row["test_loss_before"] for row in rows if row["task"] == task)
        parts.append(
            f"{task}: the test loss went from {before:.3f} to {losses}; KerZOO minus MeZO-3 at the same effective rate "
            f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]."
        )
    summary = f"After {steps} steps with {seeds} seeds. " + " ".join(parts)
    numbers = {"rows": rows, "gaps": gaps, "steps": steps}
    if sweep:
        numbers["gaps_best"] = {
            task: gap(rows, task, "KerZOO, best rate", "MeZO-3, best rate") for task in data_by_task
        }
        told = "; ".join(f"{task} {shown(found, 3)}" for task, found in numbers["gaps_best"].items())
        summary += f" Each at the best rate of its sweep, KerZOO minus MeZO-3: {told}."
    return Result(summary, numbers, {}, {"language_model": draw(rows)}, [verdict])


def summarise(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one line's numbers over its seeds; the losses of runs that diverged are infinite."""
    ended = next((m for m in found if m["evaluations"]), found[0])
    return {
        "learning_rate": ended["learning_rate"],
        "effective_lr": ended["effective_lr"],
        "test_loss_before": ended["before"]["loss"],
        "test_accuracy_before": ended["before"]["accuracy"],
        "test_loss": [or_infinity(m["after"]["loss"]) for m in found],
        "test_accuracy": [m["after"]["accuracy"] for m in found],
        "forwards": ended["forwards"],
        "seconds": [m["train_seconds"] for m in found],
    }


def gap(rows: list[dict[str, Any]], task: str, method: str = "KerZOO", beside: str = MATCHED) -> Interval:
    """Return the test loss of one line minus that of another, paired by seed, with its interval."""
    after = {row["method"]: np.array(row["test_loss"]) for row in rows if row["task"] == task}
    with np.errstate(invalid="ignore"):  # two runs that diverged
        return interval(after[method] - after[beside], logs=False)


def judge(gaps: dict[str, Interval], seeds: int, steps: int) -> Verdict:
    """Judge whether KerZOO's test loss is below MeZO-3's at the same effective rate, task by task."""
    numbers = "; ".join(f"{task} {mean:+.3f} [{low:+.3f}, {high:+.3f}]" for task, (mean, low, high) in gaps.items())
    return Verdict(
        "KerZOO's advantage over MeZO is more than a longer mean step (Figure 4).",
        NOT_RUN if seeds < 3 else combined(below(found, 0.0) for found in gaps.values()),
        f"Test loss of KerZOO minus MeZO-3 at the same effective learning rate (95%, {seeds} seeds, at most {steps} "
        f"steps, one rate; required: below zero): {numbers}.",
        id="kerzoo-language-model",
    )


def draw(rows: list[dict[str, Any]]) -> Any:
    """Draw the test loss of every seed, one panel per task."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    with figures() as Figure:
        figure = Figure(figsize=(3.4 * len(names) + 1, 3.6), layout="constrained")
        for axis, task in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
            chosen = [row for row in rows if row["task"] == task]
            for position, row in enumerate(chosen):
                loss = row["test_loss"]
                axis.plot([position] * len(loss), loss, "o", color=f"C{position}", alpha=0.7)
                axis.plot([position - 0.2, position + 0.2], [np.mean(loss)] * 2, color=f"C{position}")
            axis.axhline(chosen[0]["test_loss_before"], color="#999999", linestyle=":", label="before training")
            costs = [f"{row['forwards']} forwards" if row["forwards"] else "diverged" for row in chosen]
            ticks = [f"{row['method'].split(' ')[0]}\n{cost}" for row, cost in zip(chosen, costs)]
            axis.set_xticks(range(len(chosen)), ticks, fontsize=8)
            axis.set(ylabel="test loss", title=f"{task}, one dot per seed")
            axis.legend()
    return figure
