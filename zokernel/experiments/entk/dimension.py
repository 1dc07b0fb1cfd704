r"""Is the error "dimension-free"?  v = 1 + rho^-2 against the number of parameters, same data, same outputs."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zokernel.dynamics.belief import center
from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.criteria import Interval, format_interval, graded, interval, log_slope, worst
from zokernel.experiments.entk.lenet import Digits, accuracy, load_digits, train, updated_image
from zokernel.experiments.entk.nets import mlp
from zokernel.figures import PALETTE, figures
from zokernel.kernels import FunctionalModel, vector_jacobian_product
from zokernel.kernels.jacobians import example_jacobian, inner_products
from zokernel.theory import BeliefMoments, KernelMoments

logger = logging.getLogger(__name__)

MEASURES = ("kernel", "step")
STAGES = ("init", "trained")


@experiment(
    "entk/dimension", "ZO-eNTK's dimension-free claim: v = 1 + rho^-2 from a thousand to millions of parameters"
)
def run(config: Config) -> Result:
    """Measure the exact relative variance of one direction for a family of widths, untrained and trained."""
    digits = load_digits(config)
    widths = config.pick("widths", smoke=(2, 8, 32), cpu=(2, 8, 32, 128, 512, 1280), full=(2, 8, 32, 128, 512, 2560))
    samples = config.pick("train_samples", smoke=300, cpu=10_000, full=60_000)
    seeds = config.pick("seeds", smoke=2, cpu=3)
    rows: list[dict[str, Any]] = []
    for width in widths:
        for seed in range(config.seed, config.seed + seeds):
            net = mlp([784, width, width, 10], seed)
            for stage in STAGES:
                if stage == "trained":
                    train(net, digits.train_x[:samples], digits.train_y[:samples], epochs=2, lr=2e-2, seed=seed)
                by_measure = variances(net, digits)
                rows.append(
                    {
                        "d": sum(p.numel() for p in net.parameters()),
                        "width": width,
                        "seed": seed,
                        "stage": stage,
                        "accuracy": accuracy(net, digits.test_x, digits.test_y),
                        **{name: float(np.median(values)) for name, values in by_measure.items()},
                        **{
                            f"{name}_range": [float(min(values)), float(max(values))]
                            for name, values in by_measure.items()
                        },
                    }
                )
        logger.info("width %d is done", width)
    wide = [row for row in rows if row["width"] >= 32] if len(widths) > 3 else rows
    slopes = {f"{stage} {name}": slopes_by_seed(rows, stage, name) for stage in STAGES for name in MEASURES}
    upper = {f"{stage} {name}": slopes_by_seed(wide, stage, name) for stage in STAGES for name in MEASURES}
    span, width_span = (f"d = {part[0]['d']:,} to {part[-1]['d']:,}" for part in (rows, wide))
    text = "; ".join(f"{name} d^{format_interval(value, 3)}" for name, value in upper.items())
    return Result(
        summary=(
            f"Two-layer tanh networks on {digits.source}, {span}, {seeds} seeds of initialisation and training, the "
            f"same images. The relative variance of one direction scales over {width_span} as: {text}."
        ),
        numbers={"rows": rows, "seeds": seeds, "slopes_from_width_32": upper, "slopes": slopes},
        figures={"dimension": draw_figure(rows)},
        verdicts=[judge(upper, width_span, seeds)],
    )


def judge(slopes: dict[str, Interval], span: str, seeds: int) -> Verdict:
    """Judge the dimension-free claim: every slope below 0.1 (holds), or below the half of a parameter-space view's."""
    sizes = [max(0.0, slope[1], -slope[2]) for slope in slopes.values()], [max(-s[1], s[2]) for s in slopes.values()]
    verdict = worst(
        graded((high, low, high), 0.1, 0.5) for low, high in zip(*sizes, strict=True)
    )  # the interval of the slope's size
    text = "; ".join(f"{name} {format_interval(value, 3)}" for name, value in slopes.items())
    return Verdict(
        "The fidelity of the ZO kernel does not depend on the number of parameters.",
        verdict,
        f"{span}, exponent of v in d (95%, {seeds} seeds): {text}; required: below 0.1 in size, or under conditions "
        "below 0.5. A parameter-space view would give 1.",
        id="entk-dimension-free",
    )


def slopes_by_seed(rows: list[dict[str, Any]], stage: str, name: str) -> Interval:
    """Return the log-log slope of the median variance against d, with its interval over seeds."""
    stage_rows = [row for row in rows if row["stage"] == stage]
    seeds = sorted({row["seed"] for row in stage_rows})
    rows_by_seed = [[row for row in stage_rows if row["seed"] == seed] for seed in seeds]
    return interval([log_slope([r["d"] for r in part], [r[name] for r in part]) for part in rows_by_seed], logs=False)


def variances(net: nn.Module, digits: Digits) -> dict[str, list[float]]:
    """Return v of ten kernels (x_u of class 4) and of ten one-step belief changes (a batch of 32 images)."""
    model = FunctionalModel(net)
    jac_u = example_jacobian(model, updated_image(digits, 4))
    x, y = digits.train_x[:32], digits.train_y[:32]
    residual = model.logits(x).softmax(-1)
    residual[torch.arange(len(y)), y] -= 1
    gradient = vector_jacobian_product(model, x, residual / len(y))
    by_measure: dict[str, list[float]] = {name: [] for name in MEASURES}
    for image in digits.first_of_each().split(1):
        jac_o = example_jacobian(model, image)
        beliefs = model.logits(image).softmax(-1)
        norm_o = norm_u = rows_sq = gradient_sq = 0.0
        kernel: Tensor | float = 0.0
        product: Tensor | float = 0.0
        for name, grad in gradient.items():
            left, right = jac_o[name].flatten(1), jac_u[name].flatten(1)
            centered = center(left.T, beliefs).T
            norm_o += left.square().sum(dtype=torch.float64).item()
            norm_u += right.square().sum(dtype=torch.float64).item()
            kernel = kernel + inner_products(left, right)
            rows_sq += centered.square().sum(dtype=torch.float64).item()
            gradient_sq += grad.square().sum(dtype=torch.float64).item()
            product = product + inner_products(centered, grad.flatten()[None])
        assert isinstance(kernel, Tensor)
        assert isinstance(product, Tensor)
        by_measure["kernel"].append(KernelMoments(norm_o, norm_u, kernel.square().sum().item()).single_draw_variance)
        moments = BeliefMoments(rows_sq, gradient_sq, product.square().sum().item())
        by_measure["step"].append(moments.as_kernel.single_draw_variance)
    return by_measure


def draw_figure(rows: list[dict[str, Any]]):
    """Draw the medians over seeds and images, and the ranges over both, against d."""
    titles = {"kernel": r"kernel: $1+\rho^{-2}$", "step": "one step's beliefs"}
    with figures() as Figure:
        figure = Figure(figsize=(8.5, 3.4), layout="constrained")
        for axis, name in zip(figure.subplots(1, 2, sharey=True), MEASURES, strict=True):
            for stage, color in zip(STAGES, PALETTE, strict=False):
                d = sorted({row["d"] for row in rows})
                rows_by_size = [[row for row in rows if (row["stage"], row["d"]) == (stage, size)] for size in d]
                axis.plot(
                    d, [np.median([r[name] for r in part]) for part in rows_by_size], "o-", color=color, label=stage
                )
                low = [min(row[f"{name}_range"][0] for row in part) for part in rows_by_size]
                high = [max(row[f"{name}_range"][1] for row in part) for part in rows_by_size]
                axis.fill_between(d, low, high, color=color, alpha=0.15, linewidth=0)
            axis.set(xscale="log", yscale="log", xlabel="parameters d", title=titles[name])
            axis.tick_params(axis="x", which="minor", labelbottom=False)
            axis.legend()
        figure.supylabel("relative variance v of one direction")
    return figure
