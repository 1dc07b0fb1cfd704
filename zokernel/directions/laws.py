r"""The laws a random direction can follow, each with its exact moments.

For a direction :math:`z \in R^d` with independent coordinates of variance one, everything that theory needs is the
kurtosis :math:`\kappa = E z_k^4`: for symmetric :math:`A, B`,

.. math:: E[(z^T A z)(z^T B z)] = tr A\, tr B + 2\, tr(AB) + (\kappa - 3) \sum_k A_{kk} B_{kk}

(theory A.4.1).  The sphere of radius :math:`\sqrt d` has dependent coordinates and its own closed forms.
"""

from __future__ import annotations

from dataclasses import dataclass

from zokernel.errors import UsageError


@dataclass(frozen=True)
class Law:
    """A law of one coordinate of a direction, scaled to variance one.

    Attributes:
        name: What users write: ``distribution="rademacher"``.
        kurtosis: Fourth moment :math:`E z_k^4` of one coordinate (variance is one), in the limit of large dimension
            for the sphere.
        independent: Whether the coordinates are independent.
        variance: Second moment :math:`E z_k^2` of one coordinate; one for every law here.
    """

    name: str
    kurtosis: float
    independent: bool = True
    variance: float = 1.0

    def fourth_moment(self, dim: int) -> float:
        """Return the exact :math:`E z_k^4` of one coordinate of a direction in dimension ``dim``."""
        return 3.0 * dim / (dim + 2) if self.name == "sphere" else self.kurtosis


RADEMACHER = Law("rademacher", kurtosis=1.0)
GAUSSIAN = Law("gaussian", kurtosis=3.0)
UNIFORM = Law("uniform", kurtosis=1.8)
SPHERE = Law("sphere", kurtosis=3.0, independent=False)

LAWS: dict[str, Law] = {law.name: law for law in (RADEMACHER, GAUSSIAN, UNIFORM, SPHERE)}


def get_law(distribution: str | Law) -> Law:
    """Look a law up by name.

    Args:
        distribution: One of ``rademacher``, ``gaussian``, ``uniform``, ``sphere``, or a :class:`Law`.

    Returns:
        The law.

    Raises:
        UsageError: If there is no law of that name.

    Example:
        >>> get_law("rademacher").kurtosis
        1.0
    """
    if isinstance(distribution, Law):
        return distribution
    if distribution not in LAWS:
        raise UsageError(f"There is no direction law {distribution!r}: choose one of {', '.join(LAWS)}.")
    return LAWS[distribution]
