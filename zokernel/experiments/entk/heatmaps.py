"""ZO-eNTK, Figures 1, 6, 8 and 10: kernels of LeNet pairs as heatmaps, first-order against P = 1, 5, 25, 125."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.entk.lenet import CHECKPOINTS, checkpoints, updated_image
from zokernel.figures import figures
from zokernel.kernels import entk, kernel_moments, zo_entk_factors

COUNTS = (1, 5, 25, 125)
PAIRS = ((4, 9), (1, 0))  # the paper's pairs of high and of low similarity


@experiment("entk/heatmaps", "ZO-eNTK Fig. 1, 6, 8, 10: kernel heatmaps of LeNet on MNIST")
def run(config: Config) -> Result:
    """Draw K and K_hat for the paper's pairs and for every class against x_u in {1, 2, 4}."""
    stages = checkpoints(config)
    digits = stages.digits
    observed = digits.first_of_each()
    updated = config.pick("x_u", smoke=(4,), cpu=(1, 2, 4))
    numbers: dict[str, Any] = {"accuracies": stages.accuracies, "recipe": stages.recipe, "errors": {}, "rho": {}}
    result = Result(summary="", numbers=numbers)
    for stage in CHECKPOINTS:
        net = stages.nets[stage]
        pairs = [(f"$x_u$={u}, $x_o$={o}", observed[o : o + 1], updated_image(digits, u)) for u, o in PAIRS]
        result.figures[f"fig1_{stage}"] = grid(net, pairs, config.seed, f"LeNet, {stage}")
        for u, o in PAIRS:
            x_u, x_o = updated_image(digits, u), observed[o : o + 1]
            errors, exact = measure(net, x_o, x_u, config.seed)
            numbers["errors"][f"{stage} {u}-{o}"] = dict(zip(map(str, COUNTS), errors, strict=True))
            numbers["rho"][f"{stage} {u}-{o}"] = kernel_moments(net, x_o, x_u).rho
            result.arrays[f"K_{stage}_{u}_{o}"] = exact.numpy()
    stage = "trained"
    for figure_number, u in zip((6, 8, 10), (1, 2, 4), strict=True):
        if u in updated:
            rows = [(f"$x_o$={o}", observed[o : o + 1], updated_image(digits, u)) for o in range(10)]
            result.figures[f"fig{figure_number}_xu{u}"] = grid(
                stages.nets[stage], rows, config.seed, f"LeNet, {stage}, $x_u$={u}"
            )
    high, low = (numbers["errors"][f"trained {u}-{o}"] for u, o in PAIRS)
    rho_high, rho_low = (numbers["rho"][f"trained {u}-{o}"] for u, o in PAIRS)
    monotone = all(pair[str(COUNTS[0])] > pair[str(COUNTS[-1])] for pair in (high, low))
    result.summary = (
        f"LeNet with 29,624 parameters on {digits.source}. Trained (test accuracy "
        f"{stages.accuracies['trained']:.1%}), the relative error falls from {high['1']:.1f} at P = 1 to "
        f"{high['125']:.2f} at P = 125 for the pair (4, 9) with rho = {rho_high:.3f}, and from {low['1']:.1f} to "
        f"{low['125']:.2f} for (1, 0) with rho = {rho_low:.3f}."
    )
    similar = "holds under conditions" if rho_high > rho_low else "does not hold"
    if config.scale == "smoke":
        similar = "not run here"  # the stand-in patterns have no similar digits
    init = [numbers["rho"][f"init {u}-{o}"] for u, o in PAIRS]
    result.verdicts = [
        Verdict(
            "More perturbations denoise the kernel (Fig. 1).",
            "holds" if monotone else "does not hold",
            f"One stream, trained net: {high['1']:.2f} to {high['125']:.2f} and {low['1']:.2f} to {low['125']:.2f}.",
            id="entk-denoising",
        ),
        Verdict(
            "Similar pairs converge faster (Fig. 1).",
            similar,
            f"It is a matter of rho, and only after training: rho of (4, 9) and (1, 0) is {init[0]:.3f} and "
            f"{init[1]:.3f} at initialisation, {rho_high:.3f} and {rho_low:.3f} when trained.",
            id="entk-similar-pairs",
        ),
    ]
    return result


def measure(net: nn.Module, x_o: Tensor, x_u: Tensor, seed: int) -> tuple[list[float], Tensor]:
    """Return the relative errors at ``COUNTS`` (one nested Gaussian stream) and the exact kernel."""
    exact = entk(net, x_o, x_u)
    factors = zo_entk_factors(
        net,
        x_o,
        x_u,
        num_perturbations=max(COUNTS),
        distribution="gaussian",
        seed=seed,
        method="jacobian",
        check=False,
    )
    return factors.relative_errors(exact, COUNTS).tolist(), exact


def grid(net: nn.Module, rows: list[tuple[str, Tensor, Tensor]], seed: int, title: str):
    """Draw one row of heatmaps for each pair: K, then K_hat at ``COUNTS``, each with its own symmetric colour scale."""
    with figures() as Figure:
        figure = Figure(figsize=(9.2, 1.75 * len(rows) + 0.5), layout="constrained")
        axes = np.atleast_2d(figure.subplots(len(rows), 1 + len(COUNTS), squeeze=False))
        for line, (label, x_o, x_u) in zip(axes, rows, strict=True):
            exact = entk(net, x_o, x_u, check=False)
            factors = zo_entk_factors(
                net,
                x_o,
                x_u,
                num_perturbations=max(COUNTS),
                distribution="gaussian",
                seed=seed,
                method="jacobian",
                check=False,
            )
            errors = factors.relative_errors(exact, COUNTS).tolist()
            panels = [("first-order", exact)] + [
                (f"P={count}, error {error:.2f}", factors.dense(count))
                for count, error in zip(COUNTS, errors, strict=True)
            ]
            for axis, (name, kernel) in zip(line, panels, strict=True):
                limit = float(kernel.abs().max())
                axis.imshow(kernel.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
                axis.set_title(name, fontsize=8)
                axis.set_xticks([])
                axis.set_yticks([])
                axis.grid(False)
            line[0].set_ylabel(label)
        figure.suptitle(title)
    return figure
