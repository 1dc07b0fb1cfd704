r"""Many steps: the gap between ZO-SGD and SGD against P x T, at the same total movement."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.criteria import HOLDS, Interval, above, below, combined, format_interval, jackknife
from zokernel.experiments.entk.lenet import checkpoints
from zokernel.figures import PALETTE, figures
from zokernel.kernels import FunctionalModel, jacobian_vector_product, vector_jacobian_product
from zokernel.kernels.batches import examples
from zokernel.kernels.jacobians import example_jacobian, squared_norm
from zokernel.optim import MeZO


@experiment("entk/horizon", "ZO-eNTK beyond one step: the gap to gradient descent over T steps against P x T")
def run(config: Config) -> Result:
    """Train the partly trained LeNet with both methods for the same total step and compare logits on other images."""
    stages = checkpoints(config)
    net, digits = stages.nets["partial"], stages.digits
    count = config.pick("train_samples", smoke=20, cpu=50)
    x, y, probe = digits.train_x[:count], digits.train_y[:count], digits.test_x[:10]
    total = config.pick("total_lr", smoke=2e-3, cpu=2e-3)
    horizons = config.pick("steps", smoke=(1, 4), cpu=(1, 4, 16), full=(1, 4, 16, 64, 256))
    counts = config.pick("num_perturbations", smoke=(1, 4), cpu=(1, 4, 16))
    seeds = range(config.pick("num_seeds", smoke=2, cpu=24))
    variance = lazy_variance(net, x, y, probe)
    start = net(probe).detach()
    rows: list[dict[str, Any]] = []
    for steps in horizons:
        reference = gradient_descent(net, x, y, total / steps, steps)(probe).detach() - start
        for perturbations in counts:
            gaps = []
            for seed in seeds:
                trained = zeroth_order(
                    net, x, y, lr=total / steps, steps=steps, count=perturbations, seed=config.seed + seed
                )
                change = trained(probe).detach() - start
                gaps.append(((change - reference).norm() / reference.norm()).item())
            rms = math.sqrt(np.mean(np.square(gaps)))
            by_root = rms * math.sqrt(perturbations * steps)
            rows.append({"P": perturbations, "T": steps, "gap": rms, "scaled": by_root, "gap_by_seed": gaps})
    predicted = math.sqrt(variance)
    scaled = np.array([row["scaled"] for row in rows])
    powers = exponents(rows)
    return Result(
        summary=(
            f"LeNet on {digits.source}, the same total step {total:g} cut into T = {min(horizons)}..{max(horizons)} "
            f"steps with P = {min(counts)}..{max(counts)}, {len(seeds)} seeds of directions: the gap falls as "
            f"P^{format_interval(powers['P'])} T^{format_interval(powers['T'])}, and gap x sqrt(P T) is "
            f"{scaled.min():.1f} to {scaled.max():.1f}; one step predicts {predicted:.1f}."
        ),
        numbers={"rows": rows, "exponents": powers, "seeds": len(seeds), "predicted_scaled_gap": predicted},
        figures={"horizon": draw_figure(rows, predicted)},
        verdicts=[judge(powers, len(seeds))],
    )


def exponents(rows: list[dict[str, Any]]) -> dict[str, Interval]:
    """Return the powers of P and of T with which the rms gap goes, fitted together; intervals by the jackknife.

    The law is one of mean squares: logarithms of single gaps give flatter powers, as they scatter more at small P.
    """
    design = np.array([[1.0, math.log(row["P"]), math.log(row["T"])] for row in rows])
    squares = np.square([row["gap_by_seed"] for row in rows])

    def fit(squares_of_seeds: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(design, 0.5 * np.log(squares_of_seeds.mean(1)), rcond=None)[0]

    whole, without_each = fit(squares), [fit(np.delete(squares, n, axis=1)) for n in range(squares.shape[1])]
    return {name: jackknife(whole[k], [powers[k] for powers in without_each]) for name, k in (("P", 1), ("T", 2))}


def judge(powers: dict[str, Interval], seeds: int) -> Verdict:
    """Judge the need for a large P: it helps (below -0.35), and more steps do not help as well (above -0.1)."""
    parts = [below(powers["P"], -0.35), above(powers["T"], -0.1)]
    return Verdict(
        "A large P is needed for ZO training to follow FO training (Fig. 4, one-step analysis).",
        combined(parts) if parts[0] == HOLDS else parts[0],
        f"At a given total step the gap to gradient descent goes as P^{format_interval(powers['P'])} "
        f"T^{format_interval(powers['T'])} (95%, {seeds} seeds). P is needed if the power of P is below -0.35 and that "
        "of T above -0.1. Where steps help as much as directions, P x T counts, and P = 1 works over a run.",
        id="entk-large-p",
    )


def lazy_variance(net: nn.Module, x: Tensor, y: Tensor, probe: Tensor) -> float:
    """Return v of the logits' change at all probe images for the gradient of the batch."""
    model = FunctionalModel(net)
    residual = model.logits(x).softmax(-1)
    residual[torch.arange(len(y)), y] -= 1
    gradient = vector_jacobian_product(model, x, residual / len(y))
    change = jacobian_vector_product(model, probe, gradient)
    rows_sq = sum(squared_norm(example_jacobian(model, image)) for image in examples(probe))
    return 1 + rows_sq * squared_norm(gradient) / change.double().square().sum().item()


def gradient_descent(net: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int) -> nn.Module:
    """Return a copy of the network after plain gradient descent."""
    trained = copy.deepcopy(net)
    optimizer = torch.optim.SGD(trained.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(x), y).backward()
        optimizer.step()
    return trained


def zeroth_order(net: nn.Module, x: Tensor, y: Tensor, *, lr: float, steps: int, count: int, seed: int) -> nn.Module:
    """Return a copy of the network after as many zeroth-order steps."""
    trained = copy.deepcopy(net)
    optimizer = MeZO(trained, lr=lr, num_perturbations=count, distribution="rademacher", seed=seed)
    for _ in range(steps):
        optimizer.step(lambda: nn.functional.cross_entropy(trained(x), y))
    return trained


def draw_figure(rows: list[dict[str, Any]], predicted: float):
    """Draw the gap against P x T, with the prediction from the first step."""
    with figures() as Figure:
        figure = Figure(layout="constrained")
        axis = figure.subplots()
        for color, count in zip(PALETTE, sorted({row["P"] for row in rows}), strict=False):
            points = [row for row in rows if row["P"] == count]
            axis.plot(
                [row["P"] * row["T"] for row in points],
                [row["gap"] for row in points],
                "o",
                color=color,
                label=f"P = {count}",
            )
        products = np.unique([row["P"] * row["T"] for row in rows])
        axis.plot(products, predicted / np.sqrt(products), "k--", label=r"$\sqrt{v/(PT)}$")
        axis.set(xscale="log", yscale="log", xlabel="P x T", ylabel="relative gap of the logits' change")
        axis.legend()
    return figure
