r"""The distributions of random vectors: their exact moments, and how to draw from them.

One class serves the optimizers' directions (variance one, no mean) and the vectors of the NZK experiments (any scale,
mean and covariance).  For independent coordinates of variance one, kernel errors need only the kurtosis
:math:`\kappa = E z_k^4`: for symmetric :math:`A, B`,

.. math:: E[(z^T A z)(z^T B z)] = tr A\, tr B + 2\, tr(AB) + (\kappa - 3) \sum_k A_{kk} B_{kk}

The sphere of radius :math:`\sqrt d` has dependent coordinates and closed forms of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.private_apis import standard_gamma
from zokernel.values import is_number, plain_fields

NAMES = ("gaussian", "rademacher", "laplace", "student_t", "uniform", "sphere")
_ALIASES = {"normal": "gaussian", "t": "student_t", "studentt": "student_t"}
_SPELLING = re.compile(r"^\s*([a-z_\- ]+?)\s*(?:\(\s*([^()]+?)\s*\))?\s*$")


@dataclass(frozen=True)
class Distribution:
    r"""Random vectors :math:`z = \mu + A w` with :math:`w` iid (or on the sphere), of mean zero and variance one.

    Attributes:
        name: ``gaussian``, ``rademacher``, ``laplace``, ``student_t``, ``uniform`` or ``sphere`` (of radius
            :math:`\sqrt d` times the scale).
        scale: Standard deviation of one coordinate.
        df: Degrees of freedom :math:`\nu` of ``student_t``; infinity is the Gaussian.
        mean: Mean :math:`\mu`: nothing (zero), or d numbers.
        covariance: Covariance of :math:`z` as (d, d) rows; replaces ``scale``.  Coordinates are mixed by its Cholesky
            factor :math:`A`, which matters for every distribution but the Gaussian and the sphere.
    """

    name: str
    scale: float = 1.0
    df: float | None = None
    mean: tuple[float, ...] | None = None
    covariance: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self):
        if self.name not in NAMES:
            raise UsageError(f"There is no distribution {self.name!r}: choose one of {', '.join(NAMES)}.")
        plain_fields(self)
        if not (is_number(self.scale) and self.scale > 0):
            raise UsageError(f"The scale of a distribution must be positive and finite, not {self.scale!r}.")
        if (self.df is None) == (self.name == "student_t"):
            raise UsageError(
                "Student-t needs its degrees of freedom, as in 'student_t(10)'; no other distribution has them."
            )
        if self.df is not None and not ((is_number(self.df) or self.df == math.inf) and self.df > 2):
            raise UsageError(f"Student-t with {self.df} degrees of freedom has no variance: it needs more than 2.")
        for label, value in (("mean", self.mean), ("covariance", self.covariance)):
            if value is not None and not torch.as_tensor(value, dtype=torch.float64).isfinite().all():
                raise UsageError(f"The {label} of a distribution must be finite.")

    @classmethod
    def parse(cls, distribution: str | Distribution) -> Distribution:
        """Read a distribution from what users write.

        A bare name has variance one.  A number in parentheses is the usual parameter: the standard deviation for
        ``gaussian(s)``, ``rademacher(s)``, ``uniform(s)`` and ``sphere(s)``, the scale b of ``laplace(b)`` (variance
        2 b^2), the degrees of freedom of ``student_t(nu)`` (variance nu / (nu - 2)).

        Args:
            distribution: A name, a name with a number, or a distribution (returned as it is).

        Returns:
            The distribution.

        Raises:
            UsageError: If the name or the number makes no sense.

        Example:
            >>> round(Distribution.parse("student_t(10)").moment(2), 6)
            1.25
        """
        if isinstance(distribution, Distribution):
            return distribution
        match = _SPELLING.match(str(distribution).lower())
        name = match.group(1).replace("-", "_").replace(" ", "_") if match else str(distribution)
        name = _ALIASES.get(name, name)
        if name not in NAMES:
            raise UsageError(
                f"There is no distribution {distribution!r}: choose one of {', '.join(NAMES)}, "
                "with a parameter in parentheses if its variance is not one, as in laplace(0.5)."
            )
        if match is None or match.group(2) is None:
            return cls(name)
        try:
            value = float(match.group(2))
        except ValueError as error:
            raise UsageError(f"The parameter in {distribution!r} is not a number.") from error
        if name == "student_t":
            if not value > 2:
                raise UsageError(f"Student-t with {value:g} degrees of freedom has no variance: it needs more than 2.")
            return cls(name, scale=1.0 if math.isinf(value) else math.sqrt(value / (value - 2)), df=value)
        if name == "laplace":
            return cls(name, scale=math.sqrt(2.0) * value)
        return cls(name, scale=value)

    @property
    def independent(self) -> bool:
        """Whether the coordinates are independent, before ``covariance`` mixes them."""
        return not self.is_sphere

    def fourth_moment(self, dim: int) -> float:
        """Return :math:`E w_k^4` of one standardised coordinate in dimension ``dim``, exact for the sphere too."""
        return 3.0 * dim / (dim + 2) if self.is_sphere else self.kurtosis

    @property
    def is_sphere(self) -> bool:
        """Whether coordinates depend on each other through a fixed norm."""
        return self.name == "sphere"

    @property
    def is_isotropic(self) -> bool:
        """Whether the distribution has mean zero and equal variances, so that every kernel is a multiple of the NTK."""
        return self.mean is None and self.covariance is None

    @property
    def is_rotation_invariant(self) -> bool:
        """Whether rotating a draw changes nothing: the process then only sees the span of the features."""
        return self.is_isotropic and self.name in ("gaussian", "sphere")

    @property
    def kurtosis(self) -> float:
        """Fourth moment of one coordinate of :math:`w`, which has variance one (the sphere's large-d limit is 3)."""
        return 3.0 if self.is_sphere else self._standard_moment(4)

    def moment(self, order: int) -> float:
        r"""Return the even moment :math:`E z_k^{order}` of one coordinate.

        Args:
            order: 2, 4, 6 or 8.

        Returns:
            The moment.

        Raises:
            UsageError: If it does not exist (Student-t has moments below its degrees of freedom only), depends on the
                dimension (the sphere's fourth and higher moments), or on the coordinate (a mean or a covariance).

        Example:
            >>> round(Distribution.parse("laplace(0.5)").moment(4), 6)
            1.5
        """
        if not self.is_isotropic:
            raise UsageError(
                "Coordinates with a mean or a covariance of their own have different moments: use second_moment_matrix."
            )
        if self.is_sphere and order > 2:
            raise UsageError("Moments of the sphere above the second depend on the dimension.")
        return self._standard_moment(order) * self.scale**order

    def _standard_moment(self, order: int) -> float:
        if order not in (2, 4, 6, 8):
            raise UsageError(f"Moments of order 2, 4, 6 and 8 are known, not {order}.")
        half = order // 2
        if order == 2 or self.name == "rademacher":
            return 1.0
        if self.name == "laplace":
            return math.factorial(order) / 2.0**half
        if self.name == "uniform":
            return 3.0**half / (order + 1)
        if self.name == "gaussian" or self.df == math.inf:
            return float(math.prod(range(1, order, 2)))
        df = self.df
        assert df is not None
        if df <= order:
            raise UsageError(
                f"Student-t with {df:g} degrees of freedom has no moment of order {order}, which is needed here: "
                f"use more than {order} degrees of freedom."
            )
        return math.prod((2 * k - 1) * (df - 2) / (df - 2 * k) for k in range(1, half + 1))

    def mean_vector(self, dim: int) -> Tensor:
        r"""Return the mean :math:`\mu`, shape (d,), float64.

        Raises:
            UsageError: If the distribution has a mean of another dimension.
        """
        if self.mean is None:
            return torch.zeros(dim, dtype=torch.float64)
        mean = torch.as_tensor(self.mean, dtype=torch.float64)
        if mean.shape != (dim,):
            raise UsageError(f"The mean has shape {tuple(mean.shape)} where ({dim},) is needed.")
        return mean

    def factor_matrix(self, dim: int) -> Tensor:
        r"""Return :math:`A` with covariance :math:`A A^T`, shape (d, d), float64.

        Raises:
            UsageError: If the covariance has another dimension or is not positive definite.
        """
        if self.covariance is None:
            return self.scale * torch.eye(dim, dtype=torch.float64)
        cov = torch.as_tensor(self.covariance, dtype=torch.float64)
        if cov.shape != (dim, dim):
            raise UsageError(f"The covariance has shape {tuple(cov.shape)} where ({dim}, {dim}) is needed.")
        factor, failed = torch.linalg.cholesky_ex(cov)
        if failed or not torch.allclose(cov, cov.T, rtol=1e-10, atol=0.0):
            raise UsageError("The covariance must be symmetric and positive definite.")
        return factor

    def second_moment_matrix(self, dim: int) -> Tensor:
        r"""Return :math:`E z z^T = A A^T + \mu\mu^T`, shape (d, d), float64."""
        factor = self.factor_matrix(dim)
        mean = self.mean_vector(dim)
        return factor @ factor.T + torch.outer(mean, mean)

    def sample(
        self,
        shape: int | Sequence[int],
        dim: int,
        generator: torch.Generator,
        *,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Draw vectors.

        Args:
            shape: How many: a number or a shape.
            dim: Number of coordinates d.
            generator: Source of randomness; its device is where the draws live.
            dtype: Floating point type of the draws.

        Returns:
            Draws of shape (*shape, d).

        Example:
            >>> generator = torch.Generator().manual_seed(0)
            >>> [round(norm, 6) for norm in Distribution("sphere").sample(3, 4, generator).norm(dim=1).tolist()]
            [2.0, 2.0, 2.0]
        """
        size = (*((shape,) if isinstance(shape, int) else tuple(shape)), dim)
        draws = self._standard_sample(size, generator, dtype)
        if self.covariance is None:
            draws = draws.mul_(self.scale) if self.scale != 1.0 else draws
        else:
            draws = draws @ self.factor_matrix(dim).to(draws).T
        return draws if self.mean is None else draws + self.mean_vector(dim).to(draws)

    def _standard_sample(self, size: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        empty = torch.empty(size, dtype=dtype, device=generator.device)
        if self.name == "rademacher":
            return empty.bernoulli_(generator=generator) * 2 - 1
        if self.name == "uniform":
            return empty.uniform_(-math.sqrt(3.0), math.sqrt(3.0), generator=generator)
        if self.name == "laplace":
            magnitude = empty.exponential_(generator=generator).mul_(math.sqrt(0.5))
            return magnitude * (torch.empty_like(empty).bernoulli_(generator=generator) * 2 - 1)
        normal = empty.normal_(generator=generator)
        if self.name == "sphere":
            return normal * (math.sqrt(size[-1]) / normal.norm(dim=-1, keepdim=True))
        if self.name == "student_t" and self.df != math.inf:
            assert self.df is not None
            half = torch.full(size, self.df / 2, dtype=dtype, device=generator.device)
            chi_square = 2 * standard_gamma(half, generator)
            return normal * (chi_square / (self.df - 2)).rsqrt()
        return normal


DIRECTION_DISTRIBUTIONS = ("rademacher", "gaussian", "uniform", "sphere")
"""What directions can be drawn from, with variance one."""


def direction_distribution(distribution: str | Distribution) -> Distribution:
    """Look up a distribution that directions can be drawn from.

    Args:
        distribution: ``rademacher``, ``gaussian``, ``uniform``, ``sphere``, or one of these as an object.

    Returns:
        The distribution.

    Raises:
        UsageError: If directions cannot be drawn from it.

    Example:
        >>> direction_distribution("rademacher").kurtosis
        1.0
    """
    name = distribution.name if isinstance(distribution, Distribution) else distribution
    if name not in DIRECTION_DISTRIBUTIONS:
        names = ", ".join(DIRECTION_DISTRIBUTIONS)
        raise UsageError(f"There is no distribution {name!r} of directions: choose one of {names}.")
    if isinstance(distribution, Distribution) and distribution != Distribution(name):
        raise UsageError("Directions have mean zero and variance one: scale eps and the learning rate instead.")
    return Distribution(name)
