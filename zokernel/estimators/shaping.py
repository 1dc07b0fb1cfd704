r"""Losses of a population as weights of its members: centred, whitened, ranked.

===================  ==========================================================  =======================
shaping              weight of member n of N                                     invariant under
===================  ==========================================================  =======================
``z_score``          :math:`(l_n - \bar l) / \mathrm{std}(l)`                    shift and scale
``centred_ranks``    rank of :math:`l_n` from -1/2 to 1/2; ties share their mean  any increasing function
``leave_one_out``    :math:`l_n` minus the mean of the others                    shift
===================  ==========================================================  =======================
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence


def z_score(losses: Sequence[float]) -> list[float]:
    """Return how many standard deviations each loss is above their mean; zeros if all are equal.

    Example:
        >>> z_score([1.0, 3.0])
        [-1.0, 1.0]
    """
    mean, spread = sum(losses) / len(losses), statistics.pstdev(losses)
    return [(loss - mean) / spread if spread > 0 else 0.0 for loss in losses]


def centred_ranks(losses: Sequence[float]) -> list[float]:
    """Return the rank of each loss, from -1/2 for the least to 1/2; equal losses have the mean of their ranks.

    Example:
        >>> centred_ranks([5.0, 1.0, 9.0]), centred_ranks([1.0, 1.0, 7.0])
        ([0.0, -0.5, 0.5], [-0.25, -0.25, 0.5])
    """
    order = sorted(losses)
    first = {loss: place for place, loss in reversed(list(enumerate(order)))}
    last = {loss: place for place, loss in enumerate(order)}
    return [(first[loss] + last[loss]) / 2 / (len(losses) - 1) - 0.5 for loss in losses]


def leave_one_out(losses: Sequence[float]) -> list[float]:
    """Return each loss minus the mean of the others.

    Example:
        >>> leave_one_out([1.0, 2.0, 6.0])
        [-3.0, -1.5, 4.5]
    """
    # That is N / (N - 1) times the loss minus the mean of all.
    mean, count = sum(losses) / len(losses), len(losses)
    return [(loss - mean) * count / (count - 1) for loss in losses]


SHAPINGS: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "z_score": z_score,
    "centred_ranks": centred_ranks,
    "leave_one_out": leave_one_out,
}
