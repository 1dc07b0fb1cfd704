r"""Smoothing kernels: polynomials :math:`K` that weigh differences taken at random radii.

Mi et al. (2025), arXiv:2505.18886, eq. 17; docs/theory.md, "C. KerZOO".

With :math:`r \sim U[-a, a]` and a direction :math:`u`,
:math:`\hat g = \frac{L(\theta + \epsilon r u) - L(\theta - \epsilon r u)}{2\epsilon} K(r)\, u` has the mean

.. math:: E[\hat g] = \sum_k \frac{(\epsilon^2/2)^k}{k!}\, E[r^{2k+1} K]\; \nabla \Delta^k L, \qquad u \sim N(0, I),

so :math:`E[rK] = C` and :math:`E[r^s K] = 0` for the other :math:`s \le \beta` leave a bias of order
:math:`\epsilon^{\beta+1}`.  Everything here is exact rational arithmetic.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from zokernel.errors import UsageError
from zokernel.theory.checks import check_num_perturbations
from zokernel.values import check_positive, is_number, is_whole

Rational = int | float | Fraction


@dataclass(frozen=True)
class SmoothingKernel:
    r"""A polynomial :math:`K(r) = \sum_k a_k r^k` with exact coefficients.

    Attributes:
        coefficients: :math:`a_0, a_1, ...`
        order: The :math:`\beta` it was built for.

    Example:
        >>> K = smoothing_kernel(3)
        >>> K.moment(1), K.moment(3), K(0.5)
        (Fraction(1, 1), Fraction(0, 1), 6.09375)
    """

    coefficients: tuple[Fraction, ...]
    order: int

    def __call__(self, r: Any) -> Any:
        """Evaluate at ``r`` (a number, array or tensor) in its own arithmetic, by Horner's rule."""
        value = 0.0 * r
        for coefficient in reversed(self.coefficients):
            value = value * r + (coefficient if isinstance(r, Fraction) else float(coefficient))
        return value

    def moment(self, s: int, a: Rational = 1) -> Fraction:
        r"""Return :math:`E[r^s K(r)]` for :math:`r \sim U[-a, a]`.

        Args:
            s: Power of r.
            a: Half-width of the range; a float counts as the binary fraction it is.

        Returns:
            The exact moment.

        Example:
            >>> smoothing_kernel(3).moment(1, Fraction(1, 2))
            Fraction(79, 64)
        """
        return _moment(self.coefficients, s, a)

    def squared_moment(self, s: int, a: Rational = 1) -> Fraction:
        r"""Return :math:`E[r^s K(r)^2]` for :math:`r \sim U[-a, a]`.

        Example:
            >>> smoothing_kernel(3).squared_moment(2)
            Fraction(25, 4)
        """
        return _moment(_product(self.coefficients, self.coefficients), s, a)

    def absolute_moment(self, s: int) -> float:
        r"""Return :math:`\int_{-1}^1 |r|^s |K(r)|\, dr`, the constant :math:`\kappa_s` of the theorem.

        Odd kernels of this family have only real roots, so the integral is a sum over the intervals between them.

        Example:
            >>> smoothing_kernel(1).absolute_moment(1)
            2.0
        """
        import numpy as np

        roots = np.roots([float(c) for c in reversed(self.coefficients)])
        inside = sorted({0.0, 1.0, *(float(z.real) for z in roots if abs(z.imag) < 1e-9 and 0 < z.real < 1)})
        total = 0.0
        for low, high in itertools.pairwise(inside):
            total += abs(
                sum(
                    float(c) * (high ** (s + k + 1) - low ** (s + k + 1)) / (s + k + 1)
                    for k, c in enumerate(self.coefficients)
                )
            )
        return 2 * total

    def facts(self, a: Rational = 1) -> KernelFacts:
        """Return gain, bias, variance and noise of the kernel as it stands with radii in [-a, a]."""
        gain = self.moment(1, a)
        if gain == 0:
            raise UsageError(f"The kernel of order {self.order} has no gain on the range {a}: choose another range.")
        return KernelFacts(
            gain=float(gain),
            bias_ratio=float(self.moment(3, a) / gain),
            second_moment_ratio=float(self.squared_moment(2, a) / gain**2),
            noise_ratio=float(self.squared_moment(0, a) / gain**2),
        )


@dataclass(frozen=True)
class KernelFacts:
    r"""What weighing by a kernel does to a two-point estimate; all ones but the last for MeZO.

    Attributes:
        gain: :math:`E[rK]`, the factor on the mean gradient: a hidden learning rate.
        bias_ratio: :math:`E[r^3K]/E[rK]`, the share of MeZO's :math:`\epsilon^2` bias that is left (MeZO: 1).
        second_moment_ratio: :math:`E[(rK)^2]/E[rK]^2`, the factor on the estimate's second moment (MeZO: 1).
        noise_ratio: :math:`E[K^2]/E[rK]^2`, the factor on round-off noise in the losses (MeZO: 1).
    """

    gain: float
    bias_ratio: float
    second_moment_ratio: float
    noise_ratio: float


def smoothing_kernel(order: int, *, constant: Rational = 1, paper_k5: bool = False) -> SmoothingKernel:
    r"""Return :math:`K_\beta(r) = C \sum_{m=0}^{\beta} (2m+1)\, L_m'(0)\, L_m(r)` with Legendre polynomials.

    Args:
        order: :math:`\beta`; even orders give the kernel of the odd order below.
        constant: :math:`C = E[rK]`.
        paper_k5: Use the factor 195/64 that the paper prints for order 5, whose gain is 13/7 instead of one; the
            formula gives 105/64 (docs/theory.md, "C.2 Errata").

    Returns:
        The kernel.

    Raises:
        UsageError: If the order is no whole number or below one, the constant is zero or not finite, or ``paper_k5`` is
            requested for another order than 5.

    Example:
        >>> [str(c) for c in smoothing_kernel(5).coefficients]
        ['0', '3675/64', '0', '-6615/32', '0', '10395/64']
        >>> smoothing_kernel(5, paper_k5=True).moment(1)
        Fraction(13, 7)
    """
    if not is_whole(order):
        raise UsageError(f"A smoothing kernel has a whole order of 1 or higher, not {order!r}: 3 is the usual choice.")
    if not (is_number(constant) and constant):
        raise UsageError(f"The constant of a smoothing kernel must be finite and not zero, not {constant!r}.")
    if paper_k5 and order not in (5, 6):
        raise UsageError(f"paper_k5 changes the kernel of order 5 only, not of order {order}.")
    return _smoothing_kernel(order, constant, paper_k5)


@lru_cache
def _smoothing_kernel(order: int, constant: Rational, paper_k5: bool) -> SmoothingKernel:
    """Return a kernel whose arguments are checked."""
    scale = Fraction(constant) * (Fraction(195, 105) if paper_k5 else 1)
    total = [Fraction(0)] * (order + 1)
    for m, legendre in enumerate(_legendre(order)):
        slope = legendre[1] if m else Fraction(0)
        for k, coefficient in enumerate(legendre):
            total[k] += scale * (2 * m + 1) * slope * coefficient
    while total[-1] == 0:
        total.pop()
    return SmoothingKernel(tuple(total), order)


@dataclass(frozen=True)
class ConvergenceBounds:
    r"""What the theorem of Mi et al. (2025), arXiv:2505.18886, asks for, up to its unnamed constants (eqs. 31, 39, 40).

    Attributes:
        iterations: :math:`N = \max(L\rho^2/\psi,\; \kappa d \sigma_*^2\rho^2/\psi^2)`.
        eps_paper: The smoothing radius the paper concludes with, :math:`(\psi/(\kappa_\beta L\rho))^{1/(\beta-1)}`.
        eps_terms: The three bounds it is meant to be the smallest of: variance, accumulated bias, bias.
        eps: The smallest of ``eps_terms``.
        kappa: :math:`\int K^2`.
        kappa_beta: :math:`\int |r|^\beta |K|`.
        step: Base step :math:`\gamma` of the accelerated scheme, :math:`\min(1/(12L), n/(24L(N+1)),
            \sqrt{n\rho^2/(\zeta^2 N^3)})` with :math:`\zeta^2 = 4\kappa d\sigma_*^2`; step t uses :math:`\gamma(t+1)`.
    """

    iterations: int
    eps_paper: float
    eps_terms: tuple[float, float, float]
    eps: float
    kappa: float
    kappa_beta: float
    step: float


def convergence_bounds(
    *,
    smoothness: float,
    dim: int,
    noise: float,
    distance: float,
    accuracy: float,
    order: int = 3,
    num_perturbations: int = 1,
) -> ConvergenceBounds:
    r"""Evaluate the theorem's iteration count, smoothing radius and step for given constants.

    These are orders of magnitude: the theorem hides absolute constants, assumes convexity without saying so, and slips
    between :math:`d` and :math:`\sqrt d` in the variance term (docs/theory.md, "C.2 Errata").  That term is taken here
    from the second moment as eq. 34 ends, :math:`4\kappa d^2 L^2 \epsilon^2`, hence
    :math:`\epsilon \le \max(\sqrt{\psi/(\kappa L)}/d,\; \sigma_*/(L\sqrt d))`.  The paper's last equality, that the
    bias term is the smallest of the three, is not assumed: compare ``eps`` to ``eps_paper``.

    Args:
        smoothness: L, Lipschitz constant of the gradient (and of the Hoelder condition).
        dim: d, number of parameters.
        noise: :math:`\sigma_*`, gradient noise at the optimum.
        distance: :math:`\rho \ge \|\theta_* - \theta_0\|`.
        accuracy: :math:`\psi`, the loss gap to reach.
        order: Kernel order :math:`\beta`, at least 3 (order 1 has no bias bound in the theorem).
        num_perturbations: Directions per step.

    Returns:
        The bounds.

    Raises:
        UsageError: If a constant is not positive (``noise`` may be zero), or the order is below 3.

    Example:
        >>> bounds = convergence_bounds(smoothness=1.0, dim=100, noise=0.1, distance=1.0, accuracy=0.1)
        >>> bounds.iterations
        3750
    """
    check_positive(smoothness=smoothness, dim=dim, distance=distance, accuracy=accuracy)
    if not (is_number(noise) and noise >= 0):
        raise UsageError(f"noise must be at least 0 and finite, not {noise!r}.")
    check_num_perturbations(num_perturbations)
    if not is_whole(order, 3):
        raise UsageError(f"The theorem bounds the bias from order 3 on, not for order {order!r}.")
    kernel = smoothing_kernel(order)
    kappa, kappa_beta = 2 * float(kernel.squared_moment(0)), kernel.absolute_moment(order)
    exact = max(smoothness * distance**2 / accuracy, kappa * dim * (noise * distance / accuracy) ** 2)
    iterations = math.ceil(round(exact, 9))
    variance = max(math.sqrt(accuracy / (kappa * smoothness)) / dim, noise / (smoothness * math.sqrt(dim)))
    accumulated = (accuracy / (kappa_beta**2 * smoothness * iterations)) ** (1 / (2 * (order - 1)))
    bias = (accuracy / (kappa_beta * smoothness * distance)) ** (1 / (order - 1))
    steps = [1 / (12 * smoothness), num_perturbations / (24 * smoothness * (iterations + 1))]
    if noise > 0:
        second_moment = 4 * kappa * dim * noise**2
        steps.append(math.sqrt(num_perturbations * distance**2 / (second_moment * iterations**3)))
    terms = (variance, accumulated, bias)
    return ConvergenceBounds(iterations, bias, terms, min(terms), kappa, kappa_beta, min(steps))


def _legendre(order: int) -> list[list[Fraction]]:
    """Coefficients of the Legendre polynomials up to ``order``, by Bonnet's recursion."""
    polynomials = [[Fraction(1)], [Fraction(0), Fraction(1)]]
    for m in range(1, order):
        following = [Fraction(0), *(Fraction(2 * m + 1, m + 1) * c for c in polynomials[m])]
        for k, c in enumerate(polynomials[m - 1]):
            following[k] -= Fraction(m, m + 1) * c
        polynomials.append(following)
    return polynomials[: order + 1]


def _product(left: tuple[Fraction, ...], right: tuple[Fraction, ...]) -> tuple[Fraction, ...]:
    out = [Fraction(0)] * (len(left) + len(right) - 1)
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            out[i + j] += x * y
    return tuple(out)


def _moment(coefficients: tuple[Fraction, ...], s: int, a: Rational) -> Fraction:
    """E[r^s p(r)] for r uniform on [-a, a]: odd powers vanish, even powers k give a^k / (k + 1)."""
    if not (is_number(a) and a > 0):
        raise UsageError(f"The range of r must be positive and finite, not {a!r}.")
    width = Fraction(a)
    if s < 0:
        raise UsageError(f"Moments of power 0 or higher are known, not {s}.")
    return sum(
        (c * width ** (s + k) / (s + k + 1) for k, c in enumerate(coefficients) if (s + k) % 2 == 0), Fraction(0)
    )
