r"""The average of a run's iterates as an affine function of one of them and of the updates between them.

An iterate's weight grows as the fifth power of its age, so the average sits at 6/7 of the run: it lags the iterate by a
seventh of the steps taken (erratum 5 in section C.2 of docs/theory.md).

Reference: Mi et al. (2025), KerZOO, arXiv:2505.18886, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from zokernel.errors import RunError
from zokernel.optim.affine_move import AffineMove

LARGEST_FACTOR = 1e3


def average_weight(step: int) -> float:
    r"""Return :math:`1/\beta_t = 6/(6 + t)`, the weight that the average gives to the iterate after ``step``.

    Example:
        >>> average_weight(0), average_weight(6)
        (1.0, 0.5)
    """
    return 6.0 / (6.0 + step)


def iterate_weights(steps: Sequence[int]) -> list[float]:
    r"""Return the weight :math:`w_{t+1}` of the iterate after each step in the average after the last.

    Example:
        >>> [round(w, 4) for w in iterate_weights(range(3))]
        [0.0357, 0.2143, 0.75]
    """
    weights, remaining = [average_weight(step) for step in steps], 1.0
    for t in reversed(range(len(weights))):
        weights[t], remaining = weights[t] * remaining, remaining * (1.0 - weights[t])
    return weights


def coefficients_from_last(moves: Sequence[AffineMove]) -> tuple[float, list[float]]:
    r"""Express the averaged iterate by the last one and the run's updates, going backwards.

    With :math:`\theta_{s+1} = d_s\theta_s + u_s` and weights :math:`w_t` of the average,

    .. math:: \theta^{ag} = A\,\theta_T - \sum_s c_s u_s, \quad c_s = (c_{s-1} + w_s)/d_s,\; c_0 = 0,\;
        A = c_{T-1} + w_T.

    Args:
        moves: The run's moves of one parameter group, from its first step on.

    Returns:
        The factor on the last iterate, and one on each move's update.

    Raises:
        RunError: If decay has shrunk the weights so much that going back would magnify their rounding errors.

    Example:
        >>> last, updates = coefficients_from_last([AffineMove(t, {0: 1.0}, 1.0) for t in range(3)])
        >>> round(last, 12), [round(c, 4) for c in updates]
        (1.0, [-0.0, -0.0357, -0.25])
    """
    weights = iterate_weights([move.step for move in moves])
    factors, carried = [], 0.0
    for s, move in enumerate(moves):
        # weights[s - 1] is the weight of the iterate before step s; the initial one has none, because beta_0 is one.
        carried = (carried + (weights[s - 1] if s else 0.0)) / move.decay
        factors.append(-carried)
    last = carried + weights[-1] if moves else 1.0
    if abs(last) > LARGEST_FACTOR:
        raise RunError(
            f"Decay or projection shrank the weights so much that rebuilding their average from the journal would "
            f"magnify rounding errors {last:.3g} times: use averaging='fp32' or 'int8'."
        )
    return last, factors


def coefficients_from_first(moves: Sequence[AffineMove]) -> tuple[float, list[float]]:
    r"""Express the averaged iterate by the initial weights and the run's updates, going forwards.

    With :math:`\theta_{s+1} = d_s\theta_s + u_s + k_s\theta_0`,

    .. math:: \theta^{ag} = \Big(d_0\lambda_1 + \sum_s k_s \lambda_{s+1}\Big)\theta_0 + \sum_s \lambda_{s+1} u_s, \qquad
        \lambda_t = w_t + d_t \lambda_{t+1}.

    Args:
        moves: The run's moves of one parameter group, from its first step on.

    Returns:
        The factor on the initial weights, and one on each move's update.

    Example:
        >>> first, updates = coefficients_from_first([AffineMove(t, {0: 1.0}, 1.0) for t in range(3)])
        >>> round(first, 12), [round(c, 4) for c in updates]
        (1.0, [1.0, 0.9643, 0.75])
    """
    weights = iterate_weights([move.step for move in moves])
    factors, carried, first = [0.0] * len(moves), 0.0, 0.0
    for s in reversed(range(len(moves))):
        carried = weights[s] + (moves[s + 1].decay * carried if s + 1 < len(moves) else 0.0)
        factors[s] = carried
        first += moves[s].anchor * carried
    return (first + moves[0].decay * carried if moves else 1.0), factors
