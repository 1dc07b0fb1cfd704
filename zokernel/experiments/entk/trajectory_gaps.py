r"""The gap between the trajectories of ZO-SGD and SGD, and what kernel and curvature at the start predict for it.

Both start from the same weights and take the same batches at the same rate :math:`\eta`.  With f the beliefs over the
whole vocabulary in the observed sentences, the gap after t steps is

.. math:: D_t = \|f_t^{ZO} - f_t^{FO}\| / \|f_t^{FO} - f_0\| .

It is taken twice: of the beliefs, as in the paper, and of their square roots (Hellinger's distance).  A few tokens
decide the first, so that single runs scatter widely; the second weighs all tokens and resolves more with few runs.

ZO-SGD is SGD and a random walk.  To first order the walk spreads f, to second order it shifts it.  With J the Jacobian
of f at the start, :math:`c = \tfrac12 \mathrm{tr} \nabla^2 f`, and :math:`g_s` the gradients of SGD,

.. math:: \|f_t^{FO} - f_0\|^2 \, E D_t^2 \approx
    \frac{\eta^2}{P} \sum_{s \le t} \left( \|J\|_F^2 \|g_s\|^2 + \|J g_s\|^2 \right)
    + \Big( \frac{\eta^2}{P} \sum_{s \le t} \|g_s\|^2 \Big)^2 \|c\|^2 .

The first term alone is the law of a constant kernel: :math:`D_t = \sqrt{v / (P t)}` for one batch, so runs approach.
Its sum grows as t and the second term as :math:`t^2`; they are equal, and the gap stops falling, at

.. math:: t^* = \frac{P \|J\|_F^2}{\eta^2 \|g\|^2 \|c\|^2} .

Beliefs are bounded, so the gap is, too; the loss is not.  Of the decrease A of the mean loss by SGD the walk leaves
:math:`1 - B / (P A)` with :math:`B = \tfrac12 \mathrm{tr} H\, \eta^2 \sum_s \|g_s\|^2`: below P = B / A the loss rises.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from zokernel.experiments.criteria import Interval, interval, student_quantile

MEASURES = {"l2": 1.0, "hellinger": 0.5}  # the power of the beliefs whose distances are taken
Arrays = dict[str, np.ndarray]


def curvature_sq(even: np.ndarray) -> float:
    r"""Return :math:`\|c\|^2` from inner products of independent estimates of c: their mean over pairs has no bias."""
    count = len(even)
    return max(0.0, float(even.sum() - np.trace(even)) / (count * (count - 1)))


def describe_start(start: Arrays) -> dict[str, Any]:
    """Return what a model is and what its start says."""
    return {
        "model": str(start["source"]).split(",")[0],
        "source": str(start["source"]),
        "d": int(start["d"]),
        "V": int(start["V"]),
        "gradient_sq": float(start["gradient_sq"].mean()),
        "jacobian_sq": {measure: interval(start[f"odd_{measure}"]) for measure in MEASURES},
        "curvature_sq": {measure: curvature_sq(start[f"even_{measure}"]) for measure in MEASURES},
        "rise": interval(start["rise"]),
        "loss": float(start["loss"]),
    }


def predicted(
    jacobian_sq: float, curvature: float, gradient_sq: np.ndarray, change_sq: np.ndarray, *, lr: float, count: int
) -> tuple[np.ndarray, np.ndarray]:
    r"""Return spread and squared shift after each step, (T,), from :math:`\|g_s\|^2` and :math:`\|\eta J g_s\|^2`.

    Example:
        >>> spread, shift = predicted(10.0, 4.0, np.ones(3), np.zeros(3), lr=1.0, count=2)
        >>> spread.tolist(), shift.tolist()
        ([5.0, 10.0, 15.0], [1.0, 4.0, 9.0])
    """
    walk_sq = lr**2 * np.cumsum(gradient_sq) / count
    return jacobian_sq * walk_sq + np.cumsum(change_sq) / count, curvature * walk_sq**2


def compare_runs(start: Arrays, reference: Arrays, paths: list[Arrays], *, lr: float, count: int) -> dict[str, Any]:
    """Return the losses of the runs of one rate and P, and their gaps by either measure."""
    drop = float(start["loss"] - reference["loss"])
    walk_sq = lr**2 * float(reference["gradient_sq"].sum()) / count  # mean square of the move of a weight
    shares = [float(start["loss"] - path["loss"]) / drop for path in paths]
    lost_share = walk_sq * start["rise"].mean() / drop
    return {
        "P": count,
        "lr": lr,
        "walk": math.sqrt(walk_sq),
        "sgd_lowers_loss": drop,
        "share_of_sgds_decrease": interval(shares, logs=False),
        "share_predicted": float(1 - lost_share),
        "least_count": float(count * lost_share),
    } | {measure: gaps(measure, start, reference, paths, lr=lr, count=count) for measure in MEASURES}


def gaps(
    measure: str, start: Arrays, reference: Arrays, paths: list[Arrays], *, lr: float, count: int
) -> dict[str, Any]:
    """Return the gaps of the runs of one rate and P after every step, measured and predicted."""
    exact, *beliefs_of_runs = (
        arrays["beliefs"].astype(np.float64) ** MEASURES[measure] for arrays in (reference, *paths)
    )
    changed_sq = np.square(exact[1:] - exact[0]).sum((1, 2))
    moves_sq = np.square(np.diff(exact, axis=0)).sum((1, 2))
    relative = np.sqrt([np.square(path - exact).sum((1, 2))[1:] / changed_sq for path in beliefs_of_runs])  # (seeds, T)
    jacobian_sq, curvature = float(start[f"odd_{measure}"].mean()), curvature_sq(start[f"even_{measure}"])
    gradient_sq = reference["gradient_sq"]
    spread, shift = predicted(jacobian_sq, curvature, gradient_sq, moves_sq, lr=lr, count=count)
    law = np.sqrt(spread / changed_sq)
    per_step = lr**2 * float(gradient_sq.mean()) * curvature
    return {
        "gap": interval(relative[:, -1]),
        "gap_by_seed": relative[:, -1].tolist(),
        "gap_by_step": np.sqrt(np.square(relative).mean(0)).tolist(),
        "law": law.tolist(),
        "with_curvature": np.sqrt((spread + shift) / changed_sq).tolist(),
        "gap_over_law": interval(relative[:, -1] / law[-1]),
        "parting_step": count * jacobian_sq / per_step if per_step else math.inf,
    }


def agreement_with_law(rows: list[dict[str, Any]], measure: str) -> dict[str, Interval]:
    """Return the gap after the last step over the law, rms over the runs of all P, and its log-log slope against P."""
    squares = [np.square(row[measure]["gap_by_seed"]) for row in rows]
    ratios = [square / row[measure]["law"][-1] ** 2 for square, row in zip(squares, rows, strict=True)]
    mean, low, high = interval(np.concatenate(ratios), logs=False)
    over_law = math.sqrt(mean), math.sqrt(max(0.0, low)), math.sqrt(high)
    if len(rows) < 2 or min(map(len, squares)) < 2:
        return {"over_law": over_law, "slope": (math.nan, -math.inf, math.inf)}
    logs = np.log([row["P"] for row in rows])
    weights = (logs - logs.mean()) / np.square(logs - logs.mean()).sum()
    slope = float(weights @ [math.log(square.mean()) / 2 for square in squares])
    errors = [square.std(ddof=1) / square.mean() / len(square) ** 0.5 / 2 for square in squares]
    half = student_quantile(sum(map(len, squares)) - len(rows)) * math.hypot(*(weights * errors))
    return {"over_law": over_law, "slope": (slope, slope - half, slope + half)}
