"""What a study says about the paper's two headline claims, with the numbers that decide."""

from __future__ import annotations

from zokernel.dynamics.drift import DriftRow
from zokernel.experiments.base import Verdict
from zokernel.experiments.nzk.study import Row, Study
from zokernel.theory.nzk_moments import expected_nzk_factor

CONSTANT = (
    "For linear models the expected NZK stays constant through training and depends on the first and second moments of "
    "the perturbation (NZK, abstract)."
)
CONSTANT_ID, FASTER_ID = "nzk-constant", "nzk-acceleration"
FASTER = "A single shared random vector accelerates convergence (NZK, abstract)."


def constancy(study: Study, drift: list[DriftRow] | None) -> Verdict:
    """Judge the constancy of the expected kernel.

    Args:
        study: What was computed.
        drift: How the real network's kernel moved, if there is one.

    Returns:
        The verdict: it holds for the (linearised) model, but the shared vector needs the fourth moment.
    """
    check = study.check
    dim = study.problem.dim
    reason = (
        f"Mean and second moment of {check['runs']:.0f} simulated runs lie on the constant-kernel closed form "
        f"(z rms {check['mean_z_rms']:.2f} and {check['second_moment_z_rms']:.2f}). The shared factor needs the fourth "
        f"moment: {expected_nzk_factor('rademacher', dim):.4g}, {expected_nzk_factor('gaussian', dim):.4g} and "
        f"{expected_nzk_factor('laplace', dim):.4g} for Rademacher, Gaussian and Laplace of equal mean and variance."
    )
    if drift:
        last = drift[-1]
        reason += (
            f" The network that was linearised is not constant: its kernel has changed by "
            f"{100 * last.relative_change:.1f}% after {last.step:,} gradient steps (cosine {last.alignment:.3f}; "
            f"loss {last.loss:.4g} where the linear model says {last.predicted_loss:.4g})."
        )
    return Verdict(CONSTANT, "holds under conditions", reason, id=CONSTANT_ID)


def acceleration(study: Study) -> Verdict:
    """Judge the acceleration by a single shared vector.

    Args:
        study: What was computed.

    Returns:
        The verdict: what remains once the learning rate is matched.
    """
    equal, matched, distance, best = (
        (study.row(rule, "zo_sgd"), study.row(rule, "shared"))
        for rule in ("equal_lr", "equal_effective_lr", "equal_distance", "best_lr")
    )
    factor = matched[0].effective_lr / matched[1].lr
    reason = (
        f"At one learning rate its mean kernel is {factor:.4g} times the NTK: {_ratio(equal)}. "
        f"At equal effective learning rate {_ratio(matched)}; at half of each stability limit {_ratio(distance)}; "
        f"at each one's best learning rate {_ratio(best)}."
    )
    two = study.row("best_lr", "independent")
    if two.steps is not None and best[1].steps is not None:
        reason += (
            f" Two independent vectors, the paper's other kernel, need {two.steps:,} steps at their best learning rate "
            f"({two.steps / best[1].steps:.3g} times the shared vector's)."
        )
    rate = study.problem.notebook_lr or study.problem.lr
    if rate >= equal[1].limit and study.process is not None and study.process_curves is not None:
        process = study.process
        reason += (
            f" The published learning rate {rate:g} is above the shared vector's mean-square limit "
            f"{equal[1].limit:.3g}: after {int(process.steps[-1])} steps the mean path has loss "
            f"{float(study.process_curves[0][-1]):.3g}, the median of {process.losses.shape[1]} real runs "
            f"{float(process.losses[-1].median()):.3g}."
        )
    pairs = (matched, distance, best)
    faster = any(zo.steps is not None and shared.steps is not None and shared.steps < zo.steps for zo, shared in pairs)
    return Verdict(FASTER, "holds under conditions" if faster else "does not hold", reason, id=FASTER_ID)


def _ratio(pair: tuple[Row, Row]) -> str:
    zo, shared = pair
    if shared.steps is None or zo.steps is None:
        return "the expected loss does not reach the target" + (" (unstable)" if shared.lr >= shared.limit else "")
    return f"{shared.steps:,} steps where ZO-SGD takes {zo.steps:,} ({shared.steps / zo.steps:.3g} times)"
