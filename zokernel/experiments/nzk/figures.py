"""The figures of every NZK experiment: losses, comparisons, kernels side by side, function evolution, the process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zokernel.experiments.nzk.study import Study
from zokernel.figures import PALETTE, figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = ("-", "--", "-.", ":")
STEMS = ("losses", "comparison", "kernels", "evolution", "fit", "process")
OF_THE_PROBLEM = ("comparison", "process")  # the same for all kernels on one problem


def draw(study: Study, *, stems: tuple[str, ...] = STEMS) -> dict[str, Figure]:
    """Return the figures of a study by file stem.

    Args:
        study: What was computed.
        stems: Which figures to draw.
    """
    with figures() as new:
        return {
            stem: painter(study, new(figsize=size, layout="constrained"))
            for stem, (painter, size) in _PAINTERS.items()
            if stem in stems
        }


def _log_steps(axes: Axes, label: str = "step") -> None:
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("loss")


def _below(values: Tensor, ceiling: float) -> Tensor:
    """Cut a diverging curve off where it leaves the picture."""
    return torch.where(values <= ceiling, values, torch.nan)


def _losses(study: Study, figure: Figure) -> Figure:
    """Left: the paper's curves and the corrected baseline. Right: the same curves over step times mean factor."""
    left, right = figure.subplots(1, 2, sharey=True)
    steps = np.array(study.steps)
    for curve, color, style in zip(study.curves, itertools.cycle(PALETTE), itertools.cycle(STYLES)):
        label = curve.label if curve.factor == 1 else f"{curve.label} (factor {curve.factor:.4g})"
        left.plot(steps, curve.losses, style, color=color, label=label)
        right.plot(steps * curve.factor, curve.losses, style, color=color)
    baseline = study.baseline
    assert baseline is not None
    low, high = baseline.losses.min(1).values, baseline.losses.max(1).values
    left.fill_between(baseline.steps, low, high, color="0.6", alpha=0.6, label="ZO-SGD, 5 runs")
    if study.best_of is not None:
        left.plot(
            study.best_of.steps, study.best_of.losses[:, 0], color="0.3", lw=1, label="ZO, steepest of 10 (biased)"
        )
    left.axhline(study.line_minimum, color="0.5", ls=":", lw=1, label="all-ones line (public baseline)")
    for axes, label in ((left, "step"), (right, "step x mean factor")):
        _log_steps(axes, label)
    right.set_ylabel("")
    left.set_title("at one learning rate")
    right.set_title("the same curves, time rescaled")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _comparison(study: Study, figure: Figure) -> Figure:
    """Expected loss of gradient descent and three zeroth-order processes, under four rules."""
    grid = figure.subplots(2, 2)
    titles = {
        "equal_lr": f"equal learning rate ({study.problem.lr:g})",
        "equal_effective_lr": "equal effective learning rate",
        "equal_distance": "half of each stability limit",
    }
    steps = np.array(study.steps)
    ceiling = 30 * float(study.expected["equal_lr", "first_order"][0])
    for axes, (rule, title) in zip(grid.flat, titles.items()):
        for method, color, style in zip(study.methods, PALETTE, STYLES):
            losses = _below(study.expected[rule, method.name], ceiling)
            axes.plot(steps, losses, style, color=color, label=method.label)
        axes.set_title(title)
        _log_steps(axes)
    last = grid[1, 1]
    for method, color, style in zip(study.methods, PALETTE, STYLES):
        last.plot(steps * method.passes, study.expected["equal_distance", method.name], style, color=color)
    last.set_title("the same, in forward passes")
    _log_steps(last, "forward passes (a gradient counts 3)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _kernels(study: Study, figure: Figure) -> Figure:
    """The NTK, then every sampled NZK, each with its own colour bar; examples sorted by the leading eigenvector."""
    problem, curves = study.problem, study.curves[1:4]
    figure.set_size_inches(3.3 * (len(curves) + 1), 3.0)
    order = torch.linalg.eigh(problem.kernel).eigenvectors[:, -1].argsort() if problem.network is None else None
    rows = order if order is not None else torch.arange(len(problem.y))
    panels = [("NTK", problem.kernel)]
    for curve in curves:
        assert curve.sampled is not None
        panels.append(
            (f"{curve.label}, sampled\n= {curve.factor:.4g} NTK (z rms {curve.z_rms:.2f})", curve.sampled.mean)
        )
    for axes, (title, kernel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        image = axes.imshow(kernel[rows][:, rows].numpy(), cmap="viridis", interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _evolution(study: Study, figure: Figure) -> Figure:
    """Predictions at the paper's snapshots, gradient descent and the first NZK, later ones darker."""
    problem = study.problem
    order = problem.coordinate.argsort()
    horizontal = problem.coordinate[order]
    for axes, curve in zip(figure.subplots(1, 2, sharey=True), study.curves[:2]):
        axes.plot(horizontal, problem.y[order], ".", ms=3, color="0.6", label="targets")
        shades = np.linspace(0.15, 1.0, len(study.snapshots))
        for step, shade, prediction in zip(study.snapshots, shades, curve.predictions):
            marks = "." if problem.dim > 2 else "-"
            axes.plot(
                horizontal, prediction[order], marks, ms=2.5, lw=1.3, color=PALETTE[0], alpha=shade, label=f"{step}"
            )
        axes.set_title(curve.label, fontsize=10)
        axes.set_xlabel(_coordinate_name(study))
    handles, labels = axes.get_legend_handles_labels()
    figure.axes[0].set_ylabel("prediction")
    figure.legend(handles, labels, loc="outside right center", title="step", fontsize=8)
    return figure


def _fit(study: Study, figure: Figure) -> Figure:
    """The final fit: over two inputs in space for d = 2, else predictions against targets."""
    problem, finals = study.problem, [(curve.label, curve.predictions[-1]) for curve in study.curves]
    if problem.dim == 2:
        figure.set_size_inches(9.6, 4.2)
        flat, space = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2, projection="3d")
        first, second = problem.inputs[:, 0], problem.inputs[:, 1]
        order = first.argsort()
        flat.plot(first, problem.y, ".", ms=4, color="0.6", label="targets")
        for (label, values), color, style in zip(finals, itertools.cycle(PALETTE), itertools.cycle(STYLES)):
            flat.plot(first[order], values[order], style, color=color, label=label)
            space.plot(first[order], second[order], values[order], style, color=color)
        space.plot(first, second, problem.y, ".", ms=4, color="0.6")
        flat.set(xlabel="$x_1$", ylabel="prediction")
        space.set(xlabel="$x_1$", ylabel="$x_2$")
        flat.legend(fontsize=8)
    elif problem.network is None and problem.inputs.shape[1] == 30:
        figure.set_size_inches(9.6, 5.2)
        for axes, dim in zip(figure.subplots(2, 2, sharey=True).flat, (3, 5, 7, 9)):
            axes.plot(problem.inputs[:, dim], problem.y, "o", ms=4, mfc="none", color="0.6", label="targets")
            for (label, values), color in zip(finals, PALETTE):
                axes.plot(problem.inputs[:, dim], values, ".", ms=3, color=color, label=label)
            axes.set_xlabel(f"$x_{{{dim}}}$")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    else:
        axes = figure.subplots()
        for number, (label, values) in enumerate(finals):
            jitter = 0.04 * number * float(problem.y.max() - problem.y.min()) / 2
            axes.plot(problem.y + jitter, values, ".", ms=4, alpha=0.6, color=PALETTE[number], label=label)
        line = [float(problem.y.min()), float(problem.y.max())]
        axes.plot(line, line, color="0.6", lw=1, label="perfect fit")
        axes.set(xlabel="target", ylabel=f"prediction after {study.snapshots[-1] + 1} steps")
        axes.legend(fontsize=8)
    return figure


def _process(study: Study, figure: Figure) -> Figure:
    """The shared-vector algorithm really run at the notebook's learning rate, beside the curve the paper plots."""
    process, curves = study.process, study.process_curves
    assert process is not None
    assert curves is not None
    axes = figure.subplots()
    low, median, high = process.loss_band()
    ceiling = 1e3 * float(process.losses[0, 0])
    low, high = low.clamp_max(ceiling), high.clamp_max(ceiling)
    axes.fill_between(process.steps, low, high, color=PALETTE[2], alpha=0.25, lw=0, label="5-95% of runs")
    axes.plot(process.steps, _below(median, ceiling), color=PALETTE[2], label="median run")
    axes.plot(process.steps, _below(curves[1], ceiling), "--", color=PALETTE[1], label="expected loss (closed form)")
    axes.plot(process.steps, curves[0], color=PALETTE[0], label="loss of the mean path (published curve)")
    rate, limit = study.problem.notebook_lr or study.problem.lr, study.row("equal_lr", "shared").limit
    axes.set_title(f"shared vector really run at {rate:g}; mean-square limit {limit:.3g}", fontsize=10)
    _log_steps(axes)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _coordinate_name(study: Study) -> str:
    if study.problem.dim == 2 or study.problem.inputs.shape[1] == 30:
        return "$x_1$"
    return "angle" if study.problem.inputs.shape[1] == 2 else "example (first half: class 0)"


_PAINTERS: dict[str, tuple[Callable[[Study, Figure], Figure], tuple[float, float]]] = {
    "losses": (_losses, (9.6, 3.8)),
    "comparison": (_comparison, (9.6, 6.8)),
    "kernels": (_kernels, (6.4, 3.0)),
    "evolution": (_evolution, (9.6, 3.8)),
    "fit": (_fit, (6.4, 4.0)),
    "process": (_process, (6.4, 4.0)),
}
