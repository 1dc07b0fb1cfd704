"""ZO-eNTK, Figures 1, 6, 8 and 10: kernels of LeNet pairs as heatmaps, first-order against P = 1, 5, 25, 125."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.criteria import NOT_RUN, Interval, below, combined, interval, shown
from zokernel.experiments.entk.lenet import CHECKPOINTS, checkpoints, updated_image
from zokernel.figures import figures
from zokernel.kernels import ZOKernel, entk, kernel_moments, zo_entk_factors

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
    streams = config.pick("streams", smoke=2, cpu=10)
    found: dict[tuple[str, tuple[int, int]], np.ndarray] = {}
    for stage in CHECKPOINTS:
        net = stages.nets[stage]
        pairs = [(f"$x_u$={u}, $x_o$={o}", observed[o : o + 1], updated_image(digits, u)) for u, o in PAIRS]
        result.figures[f"fig1_{stage}"] = grid(net, pairs, config.seed, f"LeNet, {stage}")
        for u, o in PAIRS:
            x_u, x_o = updated_image(digits, u), observed[o : o + 1]
            runs = [measure(net, x_o, x_u, config.seed + stream) for stream in range(streams)]
            found[stage, (u, o)] = np.array([errors for errors, _ in runs])
            means = [interval(column) for column in found[stage, (u, o)].T]
            exact = runs[0][1]
            numbers["errors"][f"{stage} {u}-{o}"] = dict(zip(map(str, COUNTS), means, strict=True))
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
    result.summary = (
        f"LeNet with 29,624 parameters on {digits.source}, {streams} streams of directions. Trained (test accuracy "
        f"{stages.accuracies['trained']:.1%}), the relative error falls from {high['1'][0]:.1f} at P = 1 to "
        f"{high['125'][0]:.2f} at P = 125 for the pair (4, 9) with rho = {rho_high:.3f}, and from {low['1'][0]:.1f} to "
        f"{low['125'][0]:.2f} for (1, 0) with rho = {rho_low:.3f}."
    )
    falls = {
        f"({u}, {o})": interval(found["trained", (u, o)][:, -1] / found["trained", (u, o)][:, 0]) for u, o in PAIRS
    }
    similar = {
        stage: interval(np.exp(np.log(found[stage, PAIRS[0]] / found[stage, PAIRS[1]]).mean(1)), logs=True)
        for stage in CHECKPOINTS
    }
    numbers |= {"streams": streams, "error_at_125_over_1": falls, "similar_over_dissimilar": similar}
    result.verdicts = [judge_denoising(falls, streams), judge_similar(similar, streams, small=config.scale == "smoke")]
    return result


def judge_denoising(falls: dict[str, Interval], streams: int) -> Verdict:
    """Judge Fig. 1: the error at P = 125 is below that at P = 1."""
    return Verdict(
        "More perturbations denoise the kernel (Fig. 1).",
        combined(below(fall, 1.0) for fall in falls.values()),
        f"Error at P = 125 over that at P = 1 (95%, {streams} streams, trained net): "
        + ", ".join(f"{shown(fall, 3)} for {pair}" for pair, fall in falls.items())
        + "; the exact rms errors have 0.089.",
        id="entk-denoising",
    )


def judge_similar(similar: dict[str, Interval], streams: int, *, small: bool = False) -> Verdict:
    """Judge the two pairs of Fig. 1: the error of the similar one is lower at every checkpoint, or at some."""
    verdict = combined(below(ratio, 1.0) for ratio in similar.values())
    return Verdict(
        "Similar pairs converge faster (Fig. 1).",
        NOT_RUN if small else verdict,  # the stand-in patterns have no similar digits
        f"Error of (4, 9) over that of (1, 0) at equal P (95%, {streams} streams): "
        + ", ".join(f"{shown(ratio)} ({stage})" for stage, ratio in similar.items())
        + "; required: below 1.",
        id="entk-similar-pairs",
    )


def measure(net: nn.Module, x_o: Tensor, x_u: Tensor, seed: int) -> tuple[list[float], Tensor]:
    """Return the relative errors at ``COUNTS`` (one nested Gaussian stream) and the exact kernel."""
    exact = entk(net, x_o, x_u)
    return _factors(net, x_o, x_u, seed).relative_errors(exact, COUNTS).tolist(), exact


def _factors(net: nn.Module, x_o: Tensor, x_u: Tensor, seed: int) -> ZOKernel:
    """Return the zeroth-order kernel of as many Gaussian directions as any of ``COUNTS`` takes."""
    count = max(COUNTS)
    return zo_entk_factors(
        net, x_o, x_u, num_perturbations=count, distribution="gaussian", seed=seed, method="jacobian", check=False
    )


def grid(net: nn.Module, rows: list[tuple[str, Tensor, Tensor]], seed: int, title: str):
    """Draw one row of heatmaps for each pair: K, then K_hat at ``COUNTS``, each with its own symmetric colour scale."""
    with figures() as Figure:
        figure = Figure(figsize=(9.2, 1.75 * len(rows) + 0.5), layout="constrained")
        axes = np.atleast_2d(figure.subplots(len(rows), 1 + len(COUNTS), squeeze=False))
        for line, (label, x_o, x_u) in zip(axes, rows, strict=True):
            exact = entk(net, x_o, x_u, check=False)
            factors = _factors(net, x_o, x_u, seed)
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
