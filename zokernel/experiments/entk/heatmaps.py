"""ZO-eNTK, Figures 1, 6, 8 and 10: kernels of LeNet pairs as heatmaps, first-order against P = 1, 5, 25, 125."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.criteria import NOT_RUN, Interval, below, combined, format_interval, interval
from zokernel.experiments.entk.lenet import CHECKPOINTS, Checkpoints, Digits, checkpoints, updated_image
from zokernel.figures import figures
from zokernel.kernels import ZOKernel, entk, kernel_moments, zo_entk_factors

COUNTS = (1, 5, 25, 125)
PAIRS = ((4, 9), (1, 0))  # the paper's pairs of high and of low similarity


@experiment("entk/heatmaps", "ZO-eNTK Fig. 1, 6, 8, 10: kernel heatmaps of LeNet on MNIST")
def run(config: Config) -> Result:
    """Draw K and K_hat for the paper's pairs and for every class against x_u in {1, 2, 4}."""
    stages = checkpoints(config)
    digits = stages.digits
    updated = config.pick("x_u", smoke=(4,), cpu=(1, 2, 4))
    streams = config.pick("streams", smoke=2, cpu=10)
    seeds = range(config.seed, config.seed + streams)
    errors, rho, arrays = {}, {}, {}
    for stage, (u, o) in itertools.product(CHECKPOINTS, PAIRS):
        net, x_o, x_u = stages.nets[stage], observed_image(digits, o), updated_image(digits, u)
        exact = entk(net, x_o, x_u)
        errors[stage, (u, o)] = np.array([relative_errors(net, x_o, x_u, exact, seed) for seed in seeds])
        rho[f"{stage} {u}-{o}"] = kernel_moments(net, x_o, x_u).rho
        arrays[f"K_{stage}_{u}_{o}"] = exact.numpy()
    means = {
        f"{stage} {u}-{o}": dict(zip(map(str, COUNTS), map(interval, by_stream.T), strict=True))
        for (stage, (u, o)), by_stream in errors.items()
    }
    high, low = (means[f"trained {u}-{o}"] for u, o in PAIRS)
    rho_high, rho_low = (rho[f"trained {u}-{o}"] for u, o in PAIRS)
    summary = (
        f"LeNet with 29,624 parameters on {digits.source}, {streams} streams of directions. Trained (test accuracy "
        f"{stages.accuracies['trained']:.1%}), the relative error falls from {high['1'][0]:.1f} at P = 1 to "
        f"{high['125'][0]:.2f} at P = 125 for the pair (4, 9) with rho = {rho_high:.3f}, and from {low['1'][0]:.1f} to "
        f"{low['125'][0]:.2f} for (1, 0) with rho = {rho_low:.3f}."
    )
    falls = {
        f"({u}, {o})": interval(errors["trained", (u, o)][:, -1] / errors["trained", (u, o)][:, 0]) for u, o in PAIRS
    }
    similar = {
        stage: interval(np.exp(np.log(errors[stage, PAIRS[0]] / errors[stage, PAIRS[1]]).mean(1)), logs=True)
        for stage in CHECKPOINTS
    }
    numbers = {
        "accuracies": stages.accuracies,
        "recipe": stages.recipe,
        "errors": means,
        "rho": rho,
        "streams": streams,
        "error_at_125_over_1": falls,
        "similar_over_dissimilar": similar,
    }
    verdicts = [judge_denoising(falls, streams), judge_similar(similar, streams, small=config.scale == "smoke")]
    return Result(summary, numbers, arrays, draw_all(stages, updated, config.seed), verdicts)


def observed_image(digits: Digits, label: int) -> Tensor:
    """Return the first test image of a class, (1, 1, 28, 28)."""
    return digits.first_of_each()[label : label + 1]


def draw_all(stages: Checkpoints, updated: Sequence[int], seed: int) -> dict[str, Any]:
    """Draw the paper's pairs at every checkpoint, then every class against each updated digit."""
    digits, drawn = stages.digits, {}
    for stage in CHECKPOINTS:
        pairs = [(f"$x_u$={u}, $x_o$={o}", observed_image(digits, o), updated_image(digits, u)) for u, o in PAIRS]
        drawn[f"fig1_{stage}"] = grid(stages.nets[stage], pairs, seed, f"LeNet, {stage}")
    for number, u in zip((6, 8, 10), (1, 2, 4), strict=True):
        if u in updated:
            rows = [(f"$x_o$={o}", observed_image(digits, o), updated_image(digits, u)) for o in range(10)]
            drawn[f"fig{number}_xu{u}"] = grid(stages.nets["trained"], rows, seed, f"LeNet, trained, $x_u$={u}")
    return drawn


def judge_denoising(falls: dict[str, Interval], streams: int) -> Verdict:
    """Judge Fig. 1: the error at P = 125 is below that at P = 1."""
    return Verdict(
        "More perturbations denoise the kernel (Fig. 1).",
        combined(below(fall, 1.0) for fall in falls.values()),
        f"Error at P = 125 over that at P = 1 (95%, {streams} streams, trained net): "
        + ", ".join(f"{format_interval(fall, 3)} for {pair}" for pair, fall in falls.items())
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
        + ", ".join(f"{format_interval(ratio)} ({stage})" for stage, ratio in similar.items())
        + "; required: below 1.",
        id="entk-similar-pairs",
    )


def relative_errors(net: nn.Module, x_o: Tensor, x_u: Tensor, exact: Tensor, seed: int) -> list[float]:
    """Return the relative errors at ``COUNTS`` of one nested Gaussian stream."""
    return _factors(net, x_o, x_u, seed).relative_errors(exact, COUNTS).tolist()


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
