r"""Is the error "dimension-free"?  v = 1 + rho^-2 against the number of parameters, same data, same outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zokernel.dynamics.belief import center
from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.entk.lenet import Digits, accuracy, load_digits, train, updated_image
from zokernel.experiments.entk.nets import mlp
from zokernel.figures import PALETTE, figures
from zokernel.kernels import FunctionalModel, vector_jacobian_product
from zokernel.kernels.jacobians import example_jacobian, inner_products
from zokernel.theory import BeliefMoments, KernelMoments

MEASURES = ("kernel", "step")


@experiment("entk/dimension", "ZO-eNTK's dimension-free claim: v = 1 + rho^-2 for networks of 1e3 to 1e7 parameters")
def run(config: Config) -> Result:
    """Measure the exact relative variance of one direction for a family of widths, untrained and trained."""
    digits = load_digits(config)
    widths = config.pick("widths", smoke=(2, 8, 32), cpu=(2, 8, 32, 128, 512, 2560), full=(2, 8, 32, 128, 512, 2560))
    samples = config.pick("train_samples", smoke=300, cpu=10_000, full=60_000)
    rows: list[dict[str, Any]] = []
    for width in widths:
        net = mlp([784, width, width, 10], config.seed)
        for stage in ("init", "trained"):
            if stage == "trained":
                train(net, digits.train_x[:samples], digits.train_y[:samples], epochs=2, lr=2e-2, seed=config.seed)
            found = variances(net, digits)
            rows.append(
                {
                    "d": sum(p.numel() for p in net.parameters()),
                    "width": width,
                    "stage": stage,
                    "accuracy": accuracy(net, digits.test_x, digits.test_y),
                    **{name: float(np.median(values)) for name, values in found.items()},
                    **{f"{name}_range": [float(min(values)), float(max(values))] for name, values in found.items()},
                }
            )
    slopes = {
        (stage, name): slope([row for row in rows if row["stage"] == stage], name)
        for stage in ("init", "trained")
        for name in MEASURES
    }
    wide = [row for row in rows if row["width"] >= 32] or rows
    upper = (
        {s: slope([row for row in wide if row["stage"] == s], "kernel") for s in ("init", "trained")}
        if len(widths) > 3
        else {s: slopes[s, "kernel"] for s in ("init", "trained")}
    )
    largest = max(abs(value) for value in upper.values())
    span = f"d = {rows[0]['d']:,} to {rows[-1]['d']:,}"
    reason = "; ".join(f"{stage}, {name}: d^{value:+.3f}" for (stage, name), value in slopes.items())
    return Result(
        summary=(
            f"Two-layer tanh networks on {digits.source}, {span}. The relative variance of one direction scales as "
            f"({reason}): it depends on rho, not on d as such."
        ),
        numbers={
            "rows": rows,
            "slopes_from_width_32": upper,
            "slopes": {f"{stage} {name}": value for (stage, name), value in slopes.items()},
        },
        figures={"dimension": draw_figure(rows)},
        verdicts=[
            Verdict(
                "The fidelity of the ZO kernel does not depend on the number of parameters.",
                "holds" if largest < 0.1 else "holds under conditions" if largest < 0.5 else "does not hold",
                f"{span}, log-log slopes of v: {reason}; from width 32 on, kernel: d^{upper['init']:+.3f} and "
                f"d^{upper['trained']:+.3f}. A parameter-space view would give slope 1.",
                id="entk-dimension-free",
            )
        ],
    )


def variances(net: nn.Module, digits: Digits) -> dict[str, list[float]]:
    """Return v of ten kernels (x_u of class 4) and of ten one-step belief changes (a batch of 32 images)."""
    model = FunctionalModel(net)
    jac_u = example_jacobian(model, updated_image(digits, 4))
    x, y = digits.train_x[:32], digits.train_y[:32]
    residual = model.logits(x).softmax(-1)
    residual[torch.arange(len(y)), y] -= 1
    gradient = vector_jacobian_product(model, x, residual / len(y))
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for image in digits.first_of_each().split(1):
        jac_o = example_jacobian(model, image)
        beliefs = model.logits(image).softmax(-1)
        norm_o = norm_u = rows_sq = gradient_sq = 0.0
        kernel: Tensor | float = 0.0
        product: Tensor | float = 0.0
        for name, grad in gradient.items():
            left, right = jac_o[name].flatten(1), jac_u[name].flatten(1)
            moved = center(left.T, beliefs).T
            norm_o += left.square().sum(dtype=torch.float64).item()
            norm_u += right.square().sum(dtype=torch.float64).item()
            kernel = kernel + inner_products(left, right)
            rows_sq += moved.square().sum(dtype=torch.float64).item()
            gradient_sq += grad.square().sum(dtype=torch.float64).item()
            product = product + inner_products(moved, grad.flatten()[None])
        assert isinstance(kernel, Tensor)
        assert isinstance(product, Tensor)
        found["kernel"].append(KernelMoments(norm_o, norm_u, kernel.square().sum().item()).single_draw_variance)
        moments = BeliefMoments(rows_sq, gradient_sq, product.square().sum().item())
        found["step"].append(moments.as_kernel.single_draw_variance)
    return found


def slope(rows: list[dict[str, Any]], name: str) -> float:
    """Return the log-log slope of the median variance against d."""
    return float(np.polyfit(np.log([row["d"] for row in rows]), np.log([row[name] for row in rows]), 1)[0])


def draw_figure(rows: list[dict[str, Any]]):
    """Draw the medians and ranges against d."""
    titles = {"kernel": r"kernel: $1+\rho^{-2}$", "step": "one step's beliefs"}
    with figures() as Figure:
        figure = Figure(figsize=(8.5, 3.4), layout="constrained")
        for axis, name in zip(figure.subplots(1, 2, sharey=True), MEASURES, strict=True):
            for stage, color in zip(("init", "trained"), PALETTE, strict=False):
                chosen = [row for row in rows if row["stage"] == stage]
                d = [row["d"] for row in chosen]
                axis.plot(d, [row[name] for row in chosen], "o-", color=color, label=stage)
                low, high = zip(*(row[f"{name}_range"] for row in chosen), strict=True)
                axis.fill_between(d, low, high, color=color, alpha=0.15, linewidth=0)
            axis.set(xscale="log", yscale="log", xlabel="parameters d", title=titles[name])
            axis.tick_params(axis="x", which="minor", labelbottom=False)
            axis.legend()
        figure.supylabel("relative variance v of one direction")
    return figure
