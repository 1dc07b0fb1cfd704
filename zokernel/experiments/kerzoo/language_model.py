"""Figure 4 and Table 13 on a real language model, SmolLM2-135M, at matched effective learning rates.

Without data of one's own the movie reviews are used.  With ``--set data_folder=DIR`` the tasks are SST-2, TREC and RTE,
read from ``DIR/sst2/{train,dev}.tsv``, ``DIR/trec/{train,test}.csv`` and ``DIR/rte/{train,dev}.tsv``;
``--set tasks='["SST-2"]'`` takes some of them.  A further task is ``headlines``, real or sarcastic, from
``DIR/headlines/{train,test}.jsonl`` as ``benchmarks/long_runs.py`` writes them.

LoRA is trained, ``--set trained='["LoRA", "all weights"]'`` compares the methods on both.  ``--set sweep=true`` also
trains every method at four effective rates from the first seed, chooses one by the loss of the validation examples,
and trains the other seeds there.  With ``--set runs=FILE`` finished runs are kept in a file, and an experiment that was
stopped goes on from it.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from zokernel.errors import LossError, RunError, UsageError
from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.criteria import NOT_RUN, Interval, below, combined, interval
from zokernel.experiments.kept_runs import KeptRuns
from zokernel.experiments.kerzoo.jobs import finetune_job, tiny_setup
from zokernel.experiments.kerzoo.loss_figure import draw
from zokernel.experiments.kerzoo.methods import CONSTANT, MATCHED
from zokernel.experiments.kerzoo.real_tasks import hashes, tasks
from zokernel.files import read_json
from zokernel.kernels.plan_record import plain
from zokernel.readable import plural

logger = logging.getLogger(__name__)

KEPT = ("learning_rate", "effective_lr", "before", "after", "forwards", "train_seconds", "evaluations")
VARIANTS = {"": "KerZOO", ", as printed": "KerZOO as printed"}  # with a constant radius, and with a shrinking one
TRAINED = ("LoRA", "all weights")

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
    settings = METHODS[method] | {"learning_rate": learning_rate}
    if "method_args" in settings:
        settings["method_args"] = [*settings["method_args"], f"total_steps={steps}"]
    return settings


def lines(lr: float, steps: int) -> dict[str, dict[str, Any]]:
    """Return the settings of every line at a given rate: equal nominal rates, and MeZO-3 at KerZOO's effective one."""
    by_method = {method: settings_of(method, lr, steps) for method in METHODS}
    return by_method | {MATCHED: settings_of("MeZO-3", CONSTANT * lr, steps)}


def best(
    method: str, lr: float, steps: int, train: Callable[[dict[str, Any], int], dict[str, Any]], seed: int
) -> dict[str, Any]:
    """Return the settings of a method at the effective rate of the sweep with the lowest validation loss."""
    candidates = [settings_of(method, rate_of(method, factor * lr), steps) for factor in SWEEP]
    return min(candidates, key=lambda line: last_loss(train(line, seed)))


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


@dataclass(frozen=True)
class Panel:
    """What all runs of one comparison share: the model, what is trained of it, the data, and the settings.

    Attributes:
        task: Name of the task.
        trained: ``LoRA`` or ``all weights``.
        lr: The nominal learning rate.
        model: Fields of ``ModelArguments``.
        data: Fields of ``DataArguments``.
        settings: Fields of ``ZOConfig`` that all runs share.
        key: What tells a kept run from others, beside its settings; a hash of both is kept.  Hashes of rows are in it
            if runs are kept in a file; there are none of the tiny model, whose files are temporary.
        runs: Where finished runs are kept.
        seconds: How long each run took to train, by the key of the run.
    """

    task: str
    trained: str
    lr: float
    model: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    key: dict[str, Any]
    runs: KeptRuns
    seconds: dict[str, float] = field(default_factory=dict)

    def train(self, line: dict[str, Any], seed: int) -> dict[str, Any]:
        """Return what one run gave; a run that is kept is not trained again."""
        settings = self.settings | line | {"seed": seed}
        key = sha256(json.dumps(self.key | {"settings": settings}, sort_keys=True).encode()).hexdigest()[:16]
        run = self.runs.find(run=key)
        if run is None:
            metrics = outcome(model=self.model, data=self.data, settings=settings)
            names = {"run": key, "task": self.task, "trained": self.trained, "line": line, "seed": seed}
            run = self.runs.add(names | {"metrics": plain({part: metrics[part] for part in KEPT})})
        self.seconds[key] = run["metrics"]["train_seconds"] or 0.0
        return dict(run["metrics"])

    def compare(self, steps: int, seeds: range, *, sweep: bool) -> list[dict[str, Any]]:
        """Return the numbers of every line, each trained from all seeds."""
        compared = lines(self.lr, steps)
        if sweep:
            best_rates = {method: best(method, self.lr, steps, self.train, seeds[0]) for method in METHODS}
            compared |= {f"{method}, best rate": line for method, line in best_rates.items()}
        rows = []
        for method, line in compared.items():
            numbers = summarise([self.train(line, seed) for seed in seeds])
            rows.append({"task": self.task, "trained": self.trained, "method": method} | numbers)
            logger.info("%s, %s, %s: test loss %s", self.task, self.trained, method, rows[-1]["test_loss"])
        return rows


def panels(config: Config, steps: int, temporary: Path) -> list[Panel]:
    """Return every task with everything that is trained on it.

    Args:
        config: The configuration of the experiment.
        steps: Steps of every run.
        temporary: An empty folder for the tiny model of the smoke scale.
    """
    name = config.pick("model", smoke="tiny", cpu="smollm2", full="facebook/opt-2.7b")
    limits = {"max_train_samples": 1000, "max_eval_samples": 100}
    limits["max_test_samples"] = config.pick("test", smoke=8, cpu=200)
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": config.pick("batch_size", smoke=4, cpu=4, full=16),
        "precision": config.pick("precision", smoke="fp32", cpu="fp32", full="auto"),
        "eval_strategy": "steps",
        "eval_steps": steps,
        "load_best_model_at_end": False,
        "logging_steps": 1,
    }
    runs_file = config.options.get("runs")
    runs = KeptRuns(None if runs_file is None else Path(runs_file))
    chosen = config.options.get("trained", ["LoRA"])
    if unknown := set(chosen) - set(TRAINED):
        raise UsageError(f"There is no {min(unknown)!r} to train: choose from {', '.join(TRAINED)}.")
    all_panels = []
    for task, data in tasks(config).items():
        rows = hashes(data) if runs_file is not None and name != "tiny" else {}
        for trained in chosen:
            lora = trained == "LoRA"
            lr = config.pick("lr", smoke=1e-3, cpu=3e-4 if lora else 3e-6, full=1e-4 if lora else 1e-6)
            model: dict[str, Any] = {"model_name_or_path": name, "lora": lora}
            key = {"task": task, "data": data, "rows": rows, "model": name, "lora": lora} | limits
            arguments = data | limits
            if name == "tiny":
                tiny, arguments = tiny_setup(temporary / f"{task} {trained}", {"task": data.get("task", "sst2")})
                model |= tiny
            eps = {"eps": 1e-2 if lora else 1e-3}
            all_panels.append(Panel(task, trained, lr, model, arguments, settings | eps, key, runs))
    return all_panels


@experiment(
    "kerzoo/language_model", "Figure 4, Table 13: SmolLM2 on real tasks, at equal, matched and swept learning rates"
)
def run(config: Config) -> Result:
    """Train every line from several seeds on the same data."""
    steps = config.pick("steps", smoke=3, cpu=60, full=4000)
    seeds = config.pick("seeds", smoke=1, cpu=5, full=5)
    sweep = config.options.get("sweep", False)
    rows: list[dict[str, Any]] = []
    seconds = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        for panel in panels(config, steps, Path(temporary)):
            rows += panel.compare(steps, range(config.seed, config.seed + seeds), sweep=sweep)
            seconds += sum(panel.seconds.values())
    gaps = gaps_by_panel(rows, beside=MATCHED)
    numbers = {"rows": rows, "gaps": gaps, "steps": steps, "seconds": round(seconds, 2)}
    if sweep:
        numbers["gaps_best"] = gaps_by_panel(rows, beside="MeZO-3, best rate", suffix=", best rate")
    summary = f"After {steps} steps with {plural(seeds, 'seed')}. {summary_of(rows)}"
    if sweep:
        summary += f" Each at the best rate of its sweep, KerZOO minus MeZO-3: {format_gaps(numbers['gaps_best'])}."
    return Result(summary, numbers, {}, {"language_model": draw(by_panel(rows))}, [judge(gaps, seeds, steps)])


def by_panel(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every comparison, by its name.

    Example:
        >>> list(by_panel([{"task": "TREC", "trained": "LoRA"}]))
        ['TREC, LoRA']
    """
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(f"{row['task']}, {row['trained']}", []).append(row)
    return grouped


def summary_of(rows: list[dict[str, Any]]) -> str:
    """Return between which lines' mean test losses each comparison ends, one sentence per comparison."""
    sentences = []
    for name, lines in by_panel(rows).items():
        means = {row["method"]: float(np.mean(row["test_loss"])) for row in lines}
        first, *_, last = sorted(means, key=lambda method: means[method])
        sentences.append(
            f"{name}: the mean test loss, {lines[0]['test_loss_before']:.3f} before training, ends between "
            f"{means[first]:.3f} ({first}) and {means[last]:.3f} ({last})."
        )
    return " ".join(sentences)


def format_gaps(gaps: dict[str, Interval]) -> str:
    """Return differences of losses as text.

    Example:
        >>> format_gaps({"TREC, LoRA": (0.5, 0.25, 0.75)})
        'TREC, LoRA +0.500 [+0.250, +0.750]'
    """
    return "; ".join(f"{name} {mean:+.3f} [{low:+.3f}, {high:+.3f}]" for name, (mean, low, high) in gaps.items())


def summarise(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one line's numbers over its seeds; the losses of runs that diverged are infinite."""
    ended = next((m for m in metrics if m["evaluations"]), metrics[0])
    return {
        "learning_rate": ended["learning_rate"],
        "effective_lr": ended["effective_lr"],
        "test_loss_before": ended["before"]["loss"],
        "test_accuracy_before": ended["before"]["accuracy"],
        "test_loss": [or_infinity(m["after"]["loss"]) for m in metrics],
        "test_accuracy": [m["after"]["accuracy"] for m in metrics],
        "forwards": ended["forwards"],
        "seconds": [m["train_seconds"] for m in metrics],
    }


def gaps_by_panel(rows: list[dict[str, Any]], *, beside: str, suffix: str = "") -> dict[str, Interval]:
    """Return the test loss of KerZOO, repaired and as printed, minus that of a line of MeZO, paired by seed.

    Args:
        rows: The numbers of all lines.
        beside: The line of MeZO.
        suffix: What the names of KerZOO's lines end with.

    Returns:
        Means with 95% intervals, by comparison.
    """
    gaps = {}
    with np.errstate(invalid="ignore"):  # two runs that diverged
        for name, chosen in by_panel(rows).items():
            after = {row["method"]: np.array(row["test_loss"]) for row in chosen}
            for variant, method in VARIANTS.items():
                gaps[name + variant] = interval(after[method + suffix] - after[beside], logs=False)
    return gaps


def judge(gaps: dict[str, Interval], seeds: int, steps: int) -> Verdict:
    """Judge whether KerZOO's test loss is below MeZO-3's at the same effective rate, comparison by comparison."""
    return Verdict(
        "KerZOO's advantage over MeZO is more than a longer mean step (Figure 4).",
        NOT_RUN if seeds < 3 else combined(below(gap, 0.0) for gap in gaps.values()),
        f"Test loss of KerZOO minus MeZO-3 at the same effective learning rate (95%, {seeds} seeds, at most {steps} "
        f"steps, one rate; required: below zero): {format_gaps(gaps)}.",
        id="kerzoo-language-model",
    )
