"""What ``result.json`` keeps of a study."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from zokernel.dynamics.evolution import Evolution
from zokernel.experiments.criteria import median_interval, share_interval
from zokernel.experiments.nzk.study import Study
from zokernel.theory.nzk_moments import ProcessMoments

RECORDED = (0, 100, 1000, 2000, 4000, 7999, 8000, 14_000, 15_999, 29_999)


def loss_table(result: Study, steps: tuple[int, ...], *, lr: float, offset: bool = False) -> dict[str, list[float]]:
    """Return the paper's losses at its recorded steps: gradient descent, then every variant.

    Args:
        result: The study.
        steps: Steps to read.
        lr: Learning rate.
        offset: Start the linearised network from its own outputs instead of from the Jacobian times the weights.

    Returns:
        Losses by curve, and the steps themselves.
    """
    problem = result.problem
    recorded = [step for step in steps if step <= problem.steps]
    table: dict[str, list[float]] = {"step": [float(step) for step in recorded]}
    start = problem.linearization.outputs if offset and problem.linearization is not None else problem.f0
    first = Evolution(start, problem.y, problem.kernel, lr)
    for curve in result.curves:
        run = first.at(lr, moments=ProcessMoments.deterministic(curve.factor))
        table[curve.label] = run.mean_loss(recorded).tolist()
    return table


def attainment(result: Study) -> dict[str, dict[str, Any]]:
    """Return how real runs of the shared-vector process end beside the mean path, at each learning rate.

    Args:
        result: The study.

    Returns:
        For the paper's learning rate, and for that of its public code: steps, the median loss over that of the mean
        path, and the share of runs whose loss is above its start, both with intervals.
    """
    problem = result.problem
    assert result.process is not None
    assert result.process_curves is not None
    runs = {"public code": (problem.notebook_lr or problem.lr, result.process, result.process_curves[0])}
    if result.stated is not None:
        runs = {"paper": (problem.lr, *result.stated)} | runs
    by_rate = {}
    for name, (lr, process, path) in runs.items():
        last, mean_path = process.losses[-1], float(path[-1])
        num_risen = int((~(last <= process.losses[0])).sum())
        by_rate[name] = {
            "lr": lr,
            "runs": len(last),
            "steps": int(process.steps[-1]),
            "loss_of_mean_path": mean_path,
            "median_loss_over_mean_path": median_interval(last.nan_to_num(math.inf).numpy() / mean_path),
            "share_of_runs_above_their_start": share_interval(num_risen, len(last)),
        }
    return by_rate


def numbers(result: Study) -> dict[str, object]:
    """Return what ``result.json`` keeps of a study."""
    assert result.process is not None
    assert result.baseline is not None
    problem = result.problem
    record = {
        "examples": len(problem.y),
        "parameters": problem.dim,
        "rank": Evolution(problem.f0, problem.y, problem.kernel, problem.lr).rank,
        "loss_floor": result.floor,
        "losses": loss_table(result, RECORDED, lr=problem.lr),
        "factors": {curve.label: curve.factor for curve in result.curves},
        "kernel_z_rms": {curve.label: curve.z_rms for curve in result.curves[1:]},
        "kernel_z_max": {curve.label: curve.z_max for curve in result.curves[1:]},
        "collapse": {curve.label: curve.collapse for curve in result.curves[1:]},
        "comparison": [asdict(row) for row in result.rows],
        "process_check": result.check,
        "seconds_kernels_and_curves": result.seconds,
        "public_baseline_cannot_go_below": result.line_minimum,
        "baseline_final_losses": result.baseline.losses[-1].tolist(),
        "baseline_steps": int(result.baseline.steps[-1]),
        "shared_process": {
            "lr": problem.notebook_lr or problem.lr,
            "loss_of_mean_path": float(result.process_curves[0][-1]) if result.process_curves else None,
            "steps": int(result.process.steps[-1]),
            "median_loss": float(result.process.losses[-1].median()),
            "mean_loss": float(result.process.losses[-1].mean()),
        },
    }
    record["sampled_factors"] = result.fourth_moment
    record["stability_limit_of_shared_vector"] = result.row("equal_lr", "shared").limit
    if result.stated is not None:
        record["attained"] = attainment(result)
    if problem.notebook_lr is not None:
        record["losses_at_notebook_lr"] = loss_table(result, (0, 2000, 8000, 14_000), lr=problem.notebook_lr)
    if problem.linearization is not None:
        record["losses_with_offset"] = loss_table(result, RECORDED, lr=problem.lr, offset=True)
    if result.best_of is not None:
        record["best_of_final_loss"] = float(result.best_of.losses[-1, 0])
    return record
