"""Predict how outputs and loss evolve under zeroth-order training, before running it.

zokernel evolve --features features.npz --output_dir runs/evolve
zokernel evolve --model_name_or_path my_package.models:build --train_file data.npz --simulate 200
zokernel evolve --model_name_or_path gpt2 --train_file reviews.csv --label_words " bad" " good"

The model is linearised at its present weights and the loss is |f - y|^2 / 2n.
"""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zokernel.commands.evolve_inputs import EvolveInputs, TextTask, from_factory, from_features, from_language_model
from zokernel.commands.loading import add_loading_flags, load_language_model, refuse_loading_flags
from zokernel.commands.parser import add_switch
from zokernel.distributions import Distribution
from zokernel.dynamics.budget import QueryRow, query_budget, steps_to_reach
from zokernel.dynamics.descent import resolve_moments
from zokernel.dynamics.evolution import Evolution
from zokernel.dynamics.simulation import Simulation, record_steps, simulate
from zokernel.errors import UsageError
from zokernel.figures import save
from zokernel.files import check_output_dir, write_json
from zokernel.readable import plural
from zokernel.theory.stability import stability_limit_of_features

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

DENSE_BUDGET = 2e11  # multiplications that the exact recursion may take for a distribution with a diagonal term


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``zokernel evolve``."""
    add = parser.add_argument
    add("--features", type=Path, help=".npz (features, targets, ...) or .csv/.tsv (target in the last column)")
    add("--target_column", help="target column of a table (default: the last)")
    add("--model_name_or_path", help="package.module:factory of an nn.Module, a hub id, or a local model folder")
    add_loading_flags(parser)
    add("--train_file", type=Path, help="data for the model: .npz (inputs, targets), or a table")
    add("--text_column", default="sentence", help="text column for a language model")
    add("--label_column", default="label", help="label column, 0 or 1")
    add("--label_words", nargs=2, default=(" terrible", " great"), metavar=("ZERO", "ONE"), help="words of the labels")
    add("--template", default="{} It was", help="prompt, with columns in braces ({}: the text)")
    add("--trainable_parameters", metavar="REGEX", help="train only the parameters whose name matches")
    add("--max_examples", type=int, help="use only the first N examples (default for language models: 16)")
    add_switch(parser, "--no_offset", help="start from J theta_0, as the paper's code does, not from f(theta_0)")
    add("--learning_rate", type=float, help="default: half of the stability limit")
    add("--num_perturbations", type=int, default=1, help="directions averaged per step")
    add("--distribution", default="gaussian", help="distribution of the directions")
    add("--coupling", default="zo_sgd", help="zo_sgd, shared or independent")
    add("--steps", type=int, nargs="+", default=[10, 100, 1000, 10_000], help="steps to report")
    add("--target_loss", type=float, help="loss to reach (default: a tenth of the reducible loss remaining)")
    simulated = "add N simulated runs of the linearised model to the figure and the table"
    add("--simulate", type=int, default=0, metavar="N", help=simulated)
    add("--seed", type=int, default=0, help="seed of the simulated runs")
    add("--output_dir", type=Path, default=Path("runs/evolve"), help="folder of the results")


def main(args: argparse.Namespace) -> int:
    """Read the inputs, predict, print a report, and write ``evolution.json`` and ``evolution.png``."""
    if min(args.steps) < 0:
        raise UsageError("Steps to report must be zero or more.")
    if args.simulate == 1 or args.simulate < 0:
        raise UsageError("--simulate needs at least 2 runs.")
    check_output_dir(args.output_dir)
    inputs = _inputs(args)
    evolution, limit = _evolution(args, inputs)
    floor, start = evolution.floor, float(evolution.expected_loss(0)[0])
    target = args.target_loss if args.target_loss is not None else floor + 0.1 * (start - floor)
    target_step = steps_to_reach(evolution, target)
    budget = _budget(args, inputs, target)
    reported = sorted({0, *args.steps})
    curve = sorted({*record_steps(max(reported), 120), *reported})
    runs = _simulate(args, inputs, evolution, curve) if args.simulate else None
    prediction = Prediction(evolution, limit, reported, target, target_step, budget, runs)
    record = _record(args, inputs, prediction)
    record["command"] = args.command_line
    _print(record)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save(_figure(evolution, curve, runs, record), args.output_dir / "evolution.png", dpi=160)
    write_json(args.output_dir / "evolution.json", record)
    print(f"written: {args.output_dir / 'evolution.json'}, {args.output_dir / 'evolution.png'}")
    return 0


def _inputs(args: argparse.Namespace) -> EvolveInputs:
    if (args.features is None) == (args.model_name_or_path is None):
        raise UsageError("Give either --features, or --model_name_or_path with --train_file.")
    if args.max_examples is not None and args.max_examples < 1:
        raise UsageError(f"--max_examples must be at least 1, not {args.max_examples}.")
    if args.features is not None:
        refuse_loading_flags(args, str(args.features))
        return from_features(args.features, target_column=args.target_column, max_examples=args.max_examples)
    if args.train_file is None:
        raise UsageError("A model needs data: give --train_file.")
    name = args.model_name_or_path
    if ":" in name and not Path(name).exists():
        refuse_loading_flags(args, name)
        return from_factory(name, args.train_file, offset=not args.no_offset, max_examples=args.max_examples)
    if args.no_offset:
        raise UsageError("--no_offset is for small networks (package.module:factory) only.")
    task = TextTask(args.text_column, args.label_column, tuple(args.label_words), args.template)
    trainable, count = args.trainable_parameters, args.max_examples or 16
    load = partial(load_language_model, args)
    return from_language_model(name, load, args.train_file, task, trainable=trainable, max_examples=count)


def _evolution(args: argparse.Namespace, inputs: EvolveInputs) -> tuple[Evolution, float]:
    distribution = Distribution.parse(args.distribution)
    features = inputs.features
    if features is not None and not distribution.is_rotation_invariant:
        cost = len(inputs.y) ** 2 * inputs.dim * max(args.steps)
        if cost > DENSE_BUDGET and distribution.kurtosis < 3:
            logger.info(
                "The exact noise of %s directions takes too long here: using its upper bound.", distribution.name
            )
            features = None
    moments = resolve_moments(distribution, args.coupling, features, inputs.dim)
    exact_features = features if moments.diagonal else None
    evolution = Evolution(
        inputs.f0,
        inputs.y,
        inputs.kernel,
        1.0,
        moments=moments,
        num_perturbations=args.num_perturbations,
        features=exact_features,
    )
    if exact_features is not None:
        limit = stability_limit_of_features(
            exact_features, args.num_perturbations, args.coupling, distribution=distribution
        )
    else:
        limit = evolution.stability_limit
    return evolution.at(0.5 * limit if args.learning_rate is None else args.learning_rate), limit


def _budget(args: argparse.Namespace, inputs: EvolveInputs, target: float) -> list[QueryRow]:
    distribution = Distribution.parse(args.distribution)
    if not distribution.is_rotation_invariant:
        if distribution.kurtosis > 3:
            return []
        logger.info("The table of perturbations per query is computed for gaussian directions.")
        distribution = Distribution("gaussian", scale=distribution.scale)
    return query_budget(
        inputs.f0, inputs.y, inputs.kernel, target, distribution=distribution, coupling=args.coupling, dim=inputs.dim
    )


def _simulate(args: argparse.Namespace, inputs: EvolveInputs, evolution: Evolution, steps: list[int]) -> Simulation:
    distribution = Distribution.parse(args.distribution)
    features = inputs.features
    if distribution.is_rotation_invariant:  # any basis of the span will do, and the kernel gives one
        features = evolution.vectors * (evolution.n * evolution.eigenvalues).sqrt()
    elif features is None:
        raise UsageError(f"Simulating {distribution.name} directions needs features that fit in memory: use gaussian.")
    return simulate(
        features,
        inputs.y,
        inputs.f0,
        evolution.lr,
        steps,
        num_perturbations=args.num_perturbations,
        distribution=distribution,
        coupling=args.coupling,
        runs=args.simulate,
        seed=args.seed,
        dim=inputs.dim,
    )


@dataclass(frozen=True)
class Prediction:
    """What is predicted of a training run.

    Attributes:
        evolution: Loss and outputs at every step.
        limit: Largest learning rate at which the expected loss stays bounded.
        steps: The steps that are reported.
        target: Loss to reach.
        target_step: The step that reaches it in expectation; None if none does.
        budget: Loss evaluations that reach it, for several numbers of perturbations.
        runs: Simulated runs, if any were asked for.
    """

    evolution: Evolution
    limit: float
    steps: list[int]
    target: float
    target_step: int | None
    budget: list[QueryRow]
    runs: Simulation | None


def _record(args: argparse.Namespace, inputs: EvolveInputs, prediction: Prediction) -> dict[str, Any]:
    """Return the content of ``evolution.json``."""
    evolution, target_step = prediction.evolution, prediction.target_step
    usable = [row for row in prediction.budget if row.queries is not None]
    best = min(usable, key=lambda row: (row.queries, row.num_perturbations), default=None)
    return {
        "source": inputs.source,
        "examples": len(inputs.y),
        "parameters": inputs.dim,
        "rank": evolution.rank,
        "distribution": args.distribution,
        "coupling": args.coupling,
        "num_perturbations": args.num_perturbations,
        "learning_rate": evolution.lr,
        "stability_limit": prediction.limit,
        "first_order_limit": 2.0 / float(evolution.eigenvalues.max()),
        "stable": evolution.lr < prediction.limit,
        "loss_floor": evolution.floor,
        "target_loss": prediction.target,
        "steps_to_target": target_step,
        "queries_to_target": None if target_step is None else 2 * args.num_perturbations * target_step,
        "best_num_perturbations": None if best is None else best.num_perturbations,
        "per_query": [vars(row) for row in prediction.budget],
        "losses": _loss_table(inputs, prediction),
    }


def _loss_table(inputs: EvolveInputs, prediction: Prediction) -> dict[str, Any]:
    """Return the losses at the reported steps, column by column."""
    evolution, steps, runs = prediction.evolution, prediction.steps, prediction.runs
    low, high = evolution.loss_band(steps)
    table: dict[str, Any] = {
        "step": steps,
        "expected_loss": _plain(evolution.expected_loss(steps)),
        "band_low": _plain(low),
        "band_high": _plain(high),
        "loss_of_mean_path": _plain(evolution.mean_loss(steps)),
    }
    if runs is not None:
        index = [int((runs.steps == step).nonzero()[0, 0]) for step in steps]
        table["simulated_mean"] = _plain(runs.losses.mean(1)[index])
        table["simulated_error"] = _plain(runs.losses.std(1)[index] / math.sqrt(runs.losses.shape[1]))
        table["simulated_median"] = _plain(runs.losses.median(1).values[index])
    if inputs.test is not None:
        table |= _test_losses(evolution, inputs, steps)
    return table


def _test_losses(evolution: Evolution, inputs: EvolveInputs, steps: list[int]) -> dict[str, list[float | None]]:
    assert inputs.test is not None
    assert inputs.features is not None
    features, y, f0 = inputs.test
    if features.ndim != 2 or features.shape[1] != inputs.dim or not len(features) == len(y) == len(f0):
        raise UsageError(
            f"Test features {tuple(features.shape)} do not fit {inputs.dim} parameters and {len(y)} targets."
        )
    cross = features @ inputs.features.T
    mean = evolution.test_mean(steps, f0, cross)
    losses = {"test_loss_of_mean_path": _plain((mean - y).square().mean(1) / 2)}
    if not evolution.moments.diagonal:
        variance = evolution.test_variance(steps, cross, features.square().sum(1))
        losses["expected_test_loss"] = _plain(((mean - y).square() + variance).mean(1) / 2)
    return losses


def _plain(values: Tensor) -> list[float | None]:
    """Return numbers that JSON can hold: None where a loss has overflowed."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _print(record: dict[str, Any]) -> None:
    print(
        f"{record['source']}: {plural(record['examples'], 'example')}, {plural(record['parameters'], 'parameter')}, "
        f"rank {record['rank']}"
    )
    state = "stable" if record["stable"] else "UNSTABLE: the expected loss diverges"
    print(
        f"learning rate {record['learning_rate']:.4g} ({state}); mean-square limit {record['stability_limit']:.4g} "
        f"with {plural(record['num_perturbations'], record['distribution'] + ' perturbation')}, gradient descent "
        f"{record['first_order_limit']:.4g}"
    )
    columns = list(record["losses"])
    print("  ".join(f"{name:>12.22}" for name in columns))
    for row in zip(*record["losses"].values(), strict=True):
        cells = [f"{row[0]:>12,}", *(f"{'inf' if value is None else format(value, '.5g'):>12}" for value in row[1:])]
        print("  ".join(f"{cell:>{max(12, min(22, len(name)))}}" for name, cell in zip(columns, cells, strict=True)))
    if record["steps_to_target"] is None:
        print(f"loss {record['target_loss']:.4g} is not reached in expectation at this learning rate")
    else:
        print(
            f"loss {record['target_loss']:.4g} is reached in expectation after "
            f"{plural(record['steps_to_target'], 'step')}, {plural(record['queries_to_target'], 'loss evaluation')} "
            f"(the floor is {record['loss_floor']:.4g}){'' if record['stable'] else ', before it diverges'}"
        )
    for row in record["per_query"]:
        if row["queries"] is not None:
            mark = "  <- fewest" if row["num_perturbations"] == record["best_num_perturbations"] else ""
            print(f"  P = {row['num_perturbations']:>3}: {row['queries']:>12,} evaluations at {row['lr']:.4g}{mark}")


def _figure(evolution: Evolution, steps: list[int], runs: Simulation | None, record: dict[str, Any]) -> Figure:
    from zokernel.figures import PALETTE, figures

    with figures() as new:
        figure = new(layout="constrained")
        axes = figure.subplots()
        expected, (low, high) = evolution.expected_loss(steps), evolution.loss_band(steps)
        ceiling = 100 * float(expected[0])
        visible = torch.where(expected <= ceiling, expected, torch.nan)
        low, high = low.clamp_max(ceiling), high.clamp_max(ceiling)
        axes.fill_between(steps, low, high, color=PALETTE[0], alpha=0.2, lw=0, label="predicted, about 90% of runs")
        axes.plot(steps, visible, color=PALETTE[0], label="predicted expected loss")
        mean = evolution.mean_loss(steps)
        axes.plot(
            steps, torch.where(mean <= ceiling, mean, torch.nan), ":", color=PALETTE[6], label="loss of the mean path"
        )
        if runs is not None:
            lower, median, upper = runs.loss_band()
            name = f"{runs.losses.shape[1]} runs"
            axes.plot(runs.steps, runs.losses.mean(1), "--", color=PALETTE[1], label=f"mean of {name}")
            for values, label in ((lower, f"5%, 50%, 95% of {name}"), (median, None), (upper, None)):
                axes.plot(runs.steps, values, "-.", lw=1, color=PALETTE[2], label=label)
            if float(runs.losses.max()) > ceiling:
                axes.set_ylim(top=ceiling)
        if evolution.floor > 1e-12 * float(expected[0]):
            axes.axhline(evolution.floor, color="0.5", lw=1, ls="--", label="floor")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=0)
        axes.set_yscale("log")
        axes.set(xlabel="step", ylabel="loss")
        limit = record["stability_limit"]
        axes.set_title(f"learning rate {evolution.lr:.3g}, mean-square limit {limit:.3g}", fontsize=10)
        axes.legend(fontsize=8)
    return figure
