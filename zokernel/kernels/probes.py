r"""What a few random directions reveal about a training task, without a gradient.

Every probe is one direction u: the loss and the beliefs at :math:`\theta \pm \epsilon u`.  From the slopes
:math:`c_p = g^T u_p` (of the loss, and of each example's loss) and :math:`m_p = M u_p` (of the log-probabilities at
observed examples), unbiased averages over pairs of probes give norms, inner products, the gradient noise scale and the
curvature (docs/theory.md, "How many directions", "Shrinkage and learning rate" and "D. Finite differences"; the noise
scale is that of McCandlish et al. (2018), arXiv:1812.06162).  Each number comes with the spread that leaving one probe
out shows (the jackknife).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from zokernel.theory.kernel_error import BeliefMoments

# Shape suffixes: P probes, B examples of the update batch, Y observed log-probabilities.


@dataclass(frozen=True)
class Measurement:
    """A number with its standard error.

    Attributes:
        value: The estimate.
        error: Its standard error; infinite when it could not be resolved.
    """

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.error:.1g}"

    @property
    def known(self) -> bool:
        """Whether the estimate says anything: its standard error is finite and no larger than itself.

        Where it does not, ``zokernel plan`` prints ``not known`` in its place, and ``plan.json`` holds null.

        Example:
            >>> Measurement(1.17, 0.3).known, Measurement(1.17, 1.3).known, Measurement(1.17, math.inf).known
            (True, False, False)
        """
        return math.isfinite(self.value) and math.isfinite(self.error) and self.error <= abs(self.value)

    def probes_needed(self, used: int) -> int:
        """Return about how many probes would bring the error down to half of the estimate.

        Errors fall with the root of the number of probes.  Where the error is infinite only the least is known: four
        times as many, which halves it.

        Args:
            used: Probes behind the estimate.

        Example:
            >>> Measurement(1.0, 1.5).probes_needed(16), Measurement(1.0, math.inf).probes_needed(16)
            (150, 64)
        """
        finite = math.isfinite(self.value) and math.isfinite(self.error) and self.value != 0
        count = used * max(4.0, (2 * self.error / abs(self.value)) ** 2 if finite else 0.0)
        unit = 10 ** max(0, math.floor(math.log10(count)) - 1)  # two digits say as much as is known
        return math.ceil(count / unit) * unit


@dataclass(frozen=True)
class Slopes:
    r"""Central differences along P directions.

    Attributes:
        losses_PB: Slopes of each example's loss.
        beliefs_PY: Slopes of the observed log-probabilities.
        fisher_PX: Slopes of the update examples' log-probabilities, each times :math:`\sqrt{\pi_{bc}/B}`: their squares
            add up to :math:`u^T F u` with the Fisher (Gauss-Newton) matrix F of the loss.
    """

    losses_PB: Tensor
    beliefs_PY: Tensor
    fisher_PX: Tensor

    @property
    def count(self) -> int:
        """Number of probes P."""
        return len(self.losses_PB)

    def keep(self, index: Tensor) -> Slopes:
        """Return some of the probes."""
        return Slopes(self.losses_PB[index], self.beliefs_PY[index], self.fisher_PX[index])


def belief_moments(slopes: Slopes) -> BeliefMoments:
    r"""Estimate :math:`\|M\|_F^2, \|g\|^2, \|Mg\|^2` from slopes.

    :math:`\|Mg\|^2` is the average of :math:`(m_p\cdot m_q)\,c_p c_q` over pairs of different probes, which is
    unbiased; keeping the other two from the same probes makes their ratio far steadier than its parts.

    Args:
        slopes: At least two probes.

    Returns:
        The moments (``product_sq`` can be negative when too few probes see no common direction).

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> u = torch.randn(4000, 3, generator=generator)
        >>> moments = belief_moments(Slopes(u[:, :1], u[:, :2], u[:, :2]))  # g = e_1, M = [e_1; e_2]
        >>> abs(moments.rho - 0.5**0.5) < 0.03
        True
    """
    return _moments(slopes.losses_PB, slopes.beliefs_PY)


def fisher_moments(slopes: Slopes) -> BeliefMoments:
    r"""Estimate :math:`tr F, \|g\|^2, g^T F g` of the Fisher (Gauss-Newton) matrix F, in the same way.

    F is the part of the Hessian that the scores' slopes make: never negative, and free of second differences.

    Args:
        slopes: At least two probes.

    Returns:
        The moments: ``rows_sq`` is the trace and ``product_sq`` the curvature along g.
    """
    return _moments(slopes.losses_PB, slopes.fisher_PX)


def fisher_ratio(slopes: Slopes) -> float:
    r"""Return the estimate of :math:`r = tr F \|g\|^2 / g^T F g`; infinite when it is not resolved."""
    moments = fisher_moments(slopes)
    return moments.rows_sq * moments.gradient_sq / moments.product_sq if moments.product_sq > 0 else math.inf


def _moments(losses_PB: Tensor, rows_PY: Tensor) -> BeliefMoments:
    gradient, rows = losses_PB.double().mean(1), rows_PY.double()
    count = len(rows)
    weighted = rows * gradient[:, None]
    pairs = weighted.sum(0).square().sum() - weighted.square().sum()
    return BeliefMoments(
        rows_sq=rows.square().sum(1).mean().item(),
        gradient_sq=gradient.square().mean().item(),
        product_sq=(pairs / (count * (count - 1))).item(),
    )


def single_draw_variance(slopes: Slopes) -> float:
    r"""Return the estimate of :math:`v = 1 + \rho^{-2}`; infinite when the probes resolve no common direction."""
    moments = belief_moments(slopes)
    if moments.product_sq <= 0:
        return math.inf
    return 1.0 + moments.rows_sq * moments.gradient_sq / moments.product_sq


def gradient_noise(slopes: Slopes) -> tuple[float, float]:
    r"""Return :math:`(tr\Sigma, \|\bar g\|^2)`: the spread of per-example gradients and the squared norm of their mean.

    :math:`tr\Sigma` is the average over probes of the variance of per-example slopes; subtracting :math:`tr\Sigma/B`
    makes the norm that of the population gradient.

    Args:
        slopes: Probes of at least two examples.

    Returns:
        Both, unbiased; their ratio is the batch size at which noise and signal are equal.
    """
    losses = slopes.losses_PB.double()
    spread = losses.var(1).mean().item()
    return spread, losses.mean(1).square().mean().item() - spread / losses.shape[1]


class Sample(Protocol):
    """Independent draws of which some can be left out."""

    @property
    def count(self) -> int:
        """Number of draws."""

    def keep(self: Drawn, index: Tensor) -> Drawn:
        """Return some of the draws."""


Drawn = TypeVar("Drawn", bound=Sample)


def jackknife(slopes: Drawn, statistic: Callable[[Drawn], float]) -> Measurement:
    """Return a statistic of the probes with its jackknife standard error.

    Args:
        slopes: The probes.
        statistic: From probes to a number.

    Returns:
        The estimate; its error is infinite when leaving out a probe makes the statistic infinite.
    """
    value = statistic(slopes)
    count = slopes.count
    indices = torch.arange(count)
    partial = torch.tensor([statistic(slopes.keep(indices[indices != p])) for p in range(count)], dtype=torch.float64)
    if not (math.isfinite(value) and bool(torch.isfinite(partial).all())):
        return Measurement(value, math.inf)
    return Measurement(value, math.sqrt((count - 1) * partial.var(unbiased=False).item()))


def mean_estimate(values: Tensor) -> Measurement:
    """Return the mean of independent values with its standard error."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Measurement(values.mean().item(), error)


def subset_error(deviations_PY: Tensor, size: int) -> float:
    r"""Return the rms over all subsets of ``size`` draws of the norm of their mean.

    The complete average over subsets: :math:`\frac1n\overline{|e|^2} + \frac{n-1}{n}\overline{e_p\cdot e_q}`, far
    steadier than cutting the draws into a few groups.

    Args:
        deviations_PY: Deviation of each draw from its known mean.
        size: n, at most the number of draws.

    Returns:
        The rms.

    Example:
        >>> subset_error(torch.tensor([[3.0], [-3.0]]), 2)
        0.0
    """
    e = deviations_PY.double()
    count = len(e)
    own = e.square().sum().item() / count
    cross = (e.sum(0).square().sum().item() - own * count) / (count * (count - 1)) if count > 1 else 0.0
    return math.sqrt(max(own / size + (size - 1) / size * cross, 0.0))


def least_noise_scale(slopes: Slopes) -> float:
    r"""Return the gradient noise scale if the norm of the mean gradient is as large as the probes allow.

    Of :func:`gradient_noise`, the squared norm is taken two standard errors above its estimate, or above zero.

    Args:
        slopes: Probes of at least two examples.

    Returns:
        A noise scale that the true one exceeds but for about one plan in forty; 0 if the probes allow any norm.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> u = torch.randn(64, 8, generator=generator)
        >>> opposite = torch.cat([u, -u], 1)  # gradients of sixteen examples that add up to zero
        >>> least_noise_scale(Slopes(opposite, u, u)) > 16
        True
    """
    spread, _ = gradient_noise(slopes)
    signal = jackknife(slopes, lambda part: gradient_noise(part)[1])
    largest = max(0.0, signal.value) + 2 * signal.error
    return spread / largest if largest > 0 else 0.0
