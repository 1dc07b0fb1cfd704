r"""Exact mean-square error of a zeroth-order kernel and of the learning dynamics it drives.

Functions take Gaussian directions unless told otherwise, as the papers do: their error needs neither D nor d below.

With Jacobians :math:`J_o, J_u` of the logits and P directions, :math:`\hat K = \frac1P \sum_p (J_o z_p)(J_u z_p)^T` is
unbiased for :math:`K = J_o J_u^T`, and its error needs only four numbers:

.. math:: S = \|J_o\|_F^2 \|J_u\|_F^2,\quad \|K\|_F^2,\quad D = \sum_k \|J_o[:,k]\|^2 \|J_u[:,k]\|^2,\quad d .

Everything else (the similarity of the two examples, the number of outputs, the number of parameters) acts through them,
in particular through :math:`\rho = \|K\|_F / (\|J_o\|_F \|J_u\|_F)`.  No logarithm, no inequality.
(docs/theory.md, "The error of the kernel" and "The error of the learning dynamics".)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from zokernel.distributions import Distribution, direction_distribution
from zokernel.errors import UsageError
from zokernel.theory.checks import check_num_perturbations
from zokernel.values import is_number

if TYPE_CHECKING:
    from torch import Tensor

ORTHOGONAL = "orthogonal"
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class KernelMoments:
    r"""The numbers that decide how well P random directions reproduce a kernel.

    Attributes:
        norm_o_sq: :math:`\|J_o\|_F^2`.
        norm_u_sq: :math:`\|J_u\|_F^2`.
        kernel_sq: :math:`\|K\|_F^2`.
        diagonal: :math:`D`; ``None`` when it was not computed (only needed for distributions whose kurtosis is not 3).
        dim: Number of parameters :math:`d`; ``None`` when unknown (only needed for the sphere and orthogonal frames).
    """

    norm_o_sq: float
    norm_u_sq: float
    kernel_sq: float
    diagonal: float | None = None
    dim: int | None = None

    @property
    def product(self) -> float:
        r""":math:`S = \|J_o\|_F^2 \|J_u\|_F^2`."""
        return self.norm_o_sq * self.norm_u_sq

    @property
    def rho(self) -> float:
        r"""Similarity :math:`\rho = \|K\|_F / (\|J_o\|_F \|J_u\|_F)`, in [0, 1]; zero if the kernel is.

        Raises:
            UsageError: If one of the Jacobians is zero.
        """
        if not self.product > 0:
            raise UsageError("A Jacobian is zero, and has no similarity to another: choose other examples.")
        return math.sqrt(max(self.kernel_sq, 0.0) / self.product)

    @property
    def single_draw_variance(self) -> float:
        r"""Gaussian relative variance of one direction, :math:`v = 1 + \rho^{-2}` (in the bound: :math:`V \log V`).

        Raises:
            UsageError: If the kernel is zero.
        """
        self.check_relative()
        return 1.0 + self.product / self.kernel_sq

    def check_relative(self) -> None:
        """Refuse a kernel that is zero, to which no error is relative.

        Raises:
            UsageError: If it is.
        """
        if not self.kernel_sq > 0:
            raise UsageError(
                "The exact kernel is zero, so no error is relative to it: choose other examples, or use the absolute "
                "error (expected_squared_error, or expected_belief_error with lr=)."
            )

    @classmethod
    def from_jacobians(cls, jac_o_VD: Tensor, jac_u_VD: Tensor) -> KernelMoments:
        """Compute every moment exactly from two dense Jacobians.

        Args:
            jac_o_VD: Jacobian of the observed example, one row per output.
            jac_u_VD: Jacobian of the updated example.

        Returns:
            The moments, accumulated in float64.

        Example:
            >>> import torch
            >>> KernelMoments.from_jacobians(torch.eye(2), torch.eye(2)).rho
            0.7071067811865476
        """
        jac_o_VD, jac_u_VD = jac_o_VD.double(), jac_u_VD.double()
        columns_o, columns_u = jac_o_VD.square().sum(0), jac_u_VD.square().sum(0)
        return cls(
            norm_o_sq=columns_o.sum().item(),
            norm_u_sq=columns_u.sum().item(),
            kernel_sq=(jac_o_VD @ jac_u_VD.T).square().sum().item(),
            diagonal=(columns_o @ columns_u).item(),
            dim=jac_o_VD.shape[1],
        )


def second_moment(moments: KernelMoments, distribution: str | Distribution = "gaussian") -> float:
    r"""Return :math:`E \|J_o z z^T J_u^T\|_F^2` of one direction.

    :math:`S + 2\|K\|^2 + (\kappa - 3) D` for independent coordinates, :math:`\frac{d}{d+2}(S + 2\|K\|^2)` on the sphere
    of radius :math:`\sqrt d`.

    Args:
        moments: Moments of the pair of examples.
        distribution: Distribution of one coordinate.

    Returns:
        The second moment.

    Raises:
        UsageError: If the distribution needs ``diagonal`` or ``dim`` and the moments lack it.

    Example:
        >>> second_moment(KernelMoments(2.0, 3.0, 1.0))
        8.0
    """
    distribution = direction_distribution(distribution)
    gaussian = moments.product + 2 * moments.kernel_sq
    if distribution.name == "sphere":
        dim = _need(moments.dim, "dim", distribution.name)
        return dim / (dim + 2) * gaussian
    if distribution.kurtosis == 3.0:
        return gaussian
    return gaussian + (distribution.kurtosis - 3.0) * _need(moments.diagonal, "diagonal", distribution.name)


def expected_squared_error(
    moments: KernelMoments,
    num_perturbations: int,
    distribution: str | Distribution = "gaussian",
    *,
    weight_second_moment: float = 1.0,
) -> float:
    r"""Return the exact :math:`E \|\hat K - K\|_F^2`.

    Independent directions: :math:`(w_2 m - \|K\|^2) / P` with :math:`m` from :func:`second_moment`.  Orthogonal frames
    of :math:`\sqrt d`-scaled Haar vectors: :math:`\frac{d-P}{P}\left[\frac{(d-2)\|K\|^2 + d S}{(d-1)(d+2)}\right]`,
    zero at :math:`P = d`.

    Args:
        moments: Moments of the pair of examples.
        num_perturbations: P, directions averaged.
        distribution: ``gaussian``, ``rademacher``, ``uniform``, ``sphere``, ``orthogonal``, or a
            :class:`~zokernel.distributions.Distribution`.
        weight_second_moment: :math:`w_2 = E[(rK(r))^2] / E[rK(r)]^2` of a kernel-smoothed estimator (KerZOO order 3:
            6.25 for r uniform on [-1, 1]); 1 for the plain two-point estimator.

    Returns:
        The expected squared Frobenius error of the kernel (of the estimator divided by its mean gain).

    Raises:
        UsageError: If P is not positive, or exceeds the dimension for orthogonal frames, or a moment is missing.

    Example:
        >>> moments = KernelMoments(norm_o_sq=2.0, norm_u_sq=3.0, kernel_sq=1.0, diagonal=0.5, dim=10)
        >>> expected_squared_error(moments, 7), expected_squared_error(moments, 7, "rademacher")
        (1.0, 0.8571428571428571)
        >>> expected_squared_error(moments, 10, "orthogonal")
        0.0
    """
    check_num_perturbations(num_perturbations)
    if distribution == ORTHOGONAL:
        dim = _need(moments.dim, "dim", ORTHOGONAL)
        if num_perturbations > dim:
            raise UsageError(f"An orthogonal frame in dimension {dim} has at most {dim} directions.")
        if weight_second_moment != 1.0:
            raise UsageError("Kernel-smoothed weights on orthogonal frames have no closed form here: use 'gaussian'.")
        bracket = ((dim - 2) * moments.kernel_sq + dim * moments.product) / ((dim - 1) * (dim + 2))
        return (dim - num_perturbations) / num_perturbations * bracket
    one = weight_second_moment * second_moment(moments, distribution) - moments.kernel_sq
    return one / num_perturbations


def relative_error(
    moments: KernelMoments,
    num_perturbations: int,
    distribution: str | Distribution = "gaussian",
    *,
    weight_second_moment: float = 1.0,
) -> float:
    r"""Return the rms relative error :math:`\sqrt{E\|\hat K - K\|_F^2} / \|K\|_F` of a pair whose moments are known.

    Args:
        moments: Moments of the pair of examples.
        num_perturbations: P.
        distribution: As in :func:`expected_squared_error`.
        weight_second_moment: As in :func:`expected_squared_error`.

    Returns:
        The relative error.

    Raises:
        UsageError: If the kernel is zero, or as for :func:`expected_squared_error`.

    Example:
        >>> relative_error(KernelMoments(1.0, 1.0, 0.25), 5)
        1.0
    """
    moments.check_relative()
    squared = expected_squared_error(
        moments, num_perturbations, distribution, weight_second_moment=weight_second_moment
    )
    return math.sqrt(max(squared, 0.0) / moments.kernel_sq)


def expected_relative_error(
    rho: float,
    num_perturbations: int,
    distribution: str | Distribution = "gaussian",
    *,
    overlap: float | None = None,
    dim: int | None = None,
    weight_second_moment: float = 1.0,
) -> float:
    r"""Return the rms relative error of a ZO kernel, :math:`\sqrt{(1 + \rho^{-2}) / P}` for Gaussian directions.

    Args:
        rho: :math:`\|K\|_F / (\|J_o\|_F \|J_u\|_F)`, in (0, 1].
        num_perturbations: P.
        distribution: As in :func:`expected_squared_error`.
        overlap: :math:`D / S`, the share of the norms on common coordinates (Rademacher and uniform need it; it lies
            between 0 and 1, is at least :math:`1/d` times a number of order one, and 0.006 on a LeNet).
        dim: Number of parameters (sphere and orthogonal frames need it).
        weight_second_moment: As in :func:`expected_squared_error`.

    Returns:
        The relative error.

    Raises:
        UsageError: If rho is not in (0, 1].

    Example:
        >>> round(expected_relative_error(rho=0.5, num_perturbations=100), 4)
        0.2236
        >>> expected_relative_error(0.5, 100, "rademacher", overlap=0.0) == expected_relative_error(0.5, 100)
        True
    """
    check_similarity(rho)
    moments = KernelMoments(1.0, 1.0, rho * rho, diagonal=overlap, dim=dim)
    return relative_error(moments, num_perturbations, distribution, weight_second_moment=weight_second_moment)


@dataclass(frozen=True)
class BeliefMoments:
    r"""The numbers that decide the error of one zeroth-order step in log-probabilities.

    Attributes:
        rows_sq: :math:`\|M\|_F^2`, :math:`M = A(x_o) J_o` (rows are gradients of log-probabilities).
        gradient_sq: :math:`\|g\|^2` of the loss gradient, of any batch.
        product_sq: :math:`\|M g\|^2`.
        diagonal: :math:`\sum_k \|M[:,k]\|^2 g_k^2`; ``None`` when not computed.
        dim: Number of parameters; ``None`` when unknown.
    """

    rows_sq: float
    gradient_sq: float
    product_sq: float
    diagonal: float | None = None
    dim: int | None = None

    @property
    def as_kernel(self) -> KernelMoments:
        """The same numbers as a kernel's: :math:`M g` is a V x 1 kernel between M and g."""
        return KernelMoments(self.rows_sq, self.gradient_sq, self.product_sq, self.diagonal, self.dim)

    @property
    def rho(self) -> float:
        r""":math:`\|Mg\| / (\|M\|_F \|g\|)`; for one label, the cosine between its gradient and the loss gradient."""
        return self.as_kernel.rho


def expected_belief_error(
    moments: BeliefMoments,
    num_perturbations: int,
    distribution: str | Distribution = "gaussian",
    *,
    lr: float | None = None,
) -> float:
    r"""Return the rms of :math:`\Delta\log\pi_{zo} - \Delta\log\pi_{fo}` after one step, to first order in its size.

    Gaussian: :math:`\frac{\eta^2}{P}(\|M\|_F^2\|g\|^2 + \|Mg\|^2)`; other distributions as in
    :func:`expected_squared_error`.  No operator norm enters, hence no factor :math:`\|A\|_2 \in [1, \sqrt V]`.

    Args:
        moments: Moments of M and g.
        num_perturbations: P.
        distribution: Distribution of the directions.
        lr: Step size; ``None`` returns the error relative to :math:`\|\Delta\log\pi_{fo}\| = \eta\|Mg\|`.

    Returns:
        The rms error, absolute (nats) or relative.

    Example:
        >>> moments = BeliefMoments(rows_sq=4.0, gradient_sq=1.0, product_sq=1.0)
        >>> round(expected_belief_error(moments, 5), 6), round(expected_belief_error(moments, 5, lr=0.1), 6)
        (1.0, 0.1)
    """
    if lr is None:
        return relative_error(moments.as_kernel, num_perturbations, distribution)
    squared = expected_squared_error(moments.as_kernel, num_perturbations, distribution)
    return abs(lr) * math.sqrt(max(squared, 0.0))


def check_similarity(rho: float) -> None:
    """Refuse a number that is no similarity of two Jacobians whose kernel is not zero.

    Raises:
        UsageError: If it is not in (0, 1].
    """
    if not (is_number(rho) and 0.0 < rho <= 1.0 + 1e-9):
        raise UsageError(f"rho is {rho!r}: the similarity of two Jacobians lies in (0, 1].")


def _need(value: _Number | None, name: str, distribution: str) -> _Number:
    if value is None:
        raise UsageError(f"The exact error of {distribution!r} directions needs {name}=: give it, or use 'gaussian'.")
    return value
