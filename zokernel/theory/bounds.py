r"""The bounds of Li et al. (2026), arXiv:2605.03373, as printed and corrected, and the classical rate.

They are here to be compared with the exact error of :mod:`zokernel.theory.kernel_error`, which replaces them: at
V = 50,272 and P = 50 the factor :math:`\sqrt{V \log V / P}` alone is 104.
"""

from __future__ import annotations

import math

from zokernel.errors import UsageError
from zokernel.theory.checks import check_count, check_num_perturbations
from zokernel.values import check_positive


def jl_distortion(num_outputs: int, num_perturbations: int) -> float:
    r"""Return :math:`\epsilon = \sqrt{\log V / P}` (Li et al. (2026), arXiv:2605.03373, above eq. 15).

    Args:
        num_outputs: V.
        num_perturbations: P.

    Returns:
        The distortion without constants; above one it promises nothing.

    Example:
        >>> round(jl_distortion(10, 1), 3)
        1.517
    """
    check_count(num_outputs, "number of outputs")
    return math.sqrt(math.log(num_outputs) / check_num_perturbations(num_perturbations))


def jl_distortion_explicit(num_outputs: int, num_perturbations: int, *, failure: float = 0.05) -> float:
    r"""Return the distortion with constants, the root of :math:`P(\epsilon^2/4-\epsilon^3/6) = \ln(4V^2/\delta)`.

    Args:
        num_outputs: V; the 2V Jacobian rows have :math:`V^2` cross inner products.
        num_perturbations: P.
        failure: Probability :math:`\delta` that some inner product is distorted more.

    Returns:
        :math:`\epsilon` in (0, 1), or infinity when P is too small to promise any :math:`\epsilon < 1`.

    Example:
        >>> jl_distortion_explicit(50_272, 50), 0 < jl_distortion_explicit(10, 1000) < 1
        (inf, True)
    """
    check_count(num_outputs, "number of outputs")
    check_positive(failure=failure)
    target = math.log(4 * num_outputs**2 / failure) / check_num_perturbations(num_perturbations)

    def gain(eps: float) -> float:
        return eps**2 / 4 - eps**3 / 6

    if gain(1.0) < target:
        return math.inf
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) < target else (low, middle)
    return high


def kernel_bound(
    norm_o: float, norm_u: float, num_outputs: int, num_perturbations: int, *, form: str = "corrected"
) -> float:
    r"""Return the bound on :math:`\|\hat K - K\|_F` of Li et al. (2026), arXiv:2605.03373, eq. 14.

    ``printed``: :math:`\epsilon\,\Xi\sqrt V` (the sentence after eq. 14; scales with the logits where the error scales
    with their square, so it is violated for large logits).  ``corrected``: :math:`\epsilon\,\Xi^2\sqrt V`, what eq. 14
    gives.  ``normalised``: :math:`\epsilon\,\|J_o\|_F\|J_u\|_F`, rows normalised before the lemma is used: no
    :math:`\sqrt V`.

    Args:
        norm_o: :math:`\|J_o\|_F`.
        norm_u: :math:`\|J_u\|_F`.
        num_outputs: V.
        num_perturbations: P.
        form: ``printed``, ``corrected`` or ``normalised``.

    Returns:
        The bound, with the :math:`\epsilon` of :func:`jl_distortion`.

    Raises:
        UsageError: If the form is unknown.

    Example:
        >>> kernel_bound(2.0, 2.0, 10, 1) / kernel_bound(2.0, 2.0, 10, 1, form="printed")
        2.0
    """
    eps, largest = jl_distortion(num_outputs, num_perturbations), max(norm_o, norm_u)
    if form == "printed":
        return eps * largest * math.sqrt(num_outputs)
    if form == "corrected":
        return eps * largest**2 * math.sqrt(num_outputs)
    if form == "normalised":
        return eps * norm_o * norm_u
    raise UsageError(f"There is no bound {form!r}: choose 'printed', 'corrected' or 'normalised'.")


def belief_bound(
    lr: float,
    largest_norm: float,
    gradient_norm: float,
    projector_norm: float,
    num_outputs: int,
    num_perturbations: int,
    *,
    form: str = "corrected",
) -> float:
    r"""Return the bound on :math:`\|\Delta\log\pi_{fo} - \Delta\log\pi_{zo}\|_2`.

    Li et al. (2026), arXiv:2605.03373, eq. 15.

    Args:
        lr: :math:`\eta`.
        largest_norm: :math:`\Xi = \max(\|J_o\|_F, \|J_u\|_F)`.
        gradient_norm: :math:`\|G\|_2`.
        projector_norm: :math:`\|A\|_2`, see :func:`projector_norm`.
        num_outputs: V.
        num_perturbations: P.
        form: ``printed`` (:math:`\Xi`) or ``corrected`` (:math:`\Xi^2`).

    Returns:
        The bound.

    Raises:
        UsageError: If the form is unknown.

    Example:
        >>> round(belief_bound(1.0, 1.0, 1.0, 1.0, 50_272, 50))
        104
    """
    if form not in ("printed", "corrected"):
        raise UsageError(f"There is no bound {form!r}: choose 'printed' or 'corrected'.")
    power = 1 if form == "printed" else 2
    scaling = jl_distortion(num_outputs, num_perturbations) * math.sqrt(num_outputs)
    return scaling * lr * largest_norm**power * gradient_norm * projector_norm


def projector_norm(probability_norm: float, num_outputs: int) -> float:
    r"""Return :math:`\|A\|_2 = \sqrt V \|\pi\|_2` of :math:`A = I - 1\pi^T`, in :math:`[1, \sqrt V]`.

    A is an oblique projector, so the paper's ":math:`\|A\|_2 \le 1`" holds only for the uniform belief: a confident
    model has :math:`\sqrt V` (224 for OPT).

    Args:
        probability_norm: :math:`\|\pi\|_2`.
        num_outputs: V.

    Returns:
        The operator norm.

    Example:
        >>> round(projector_norm(1.0, 50_272))
        224
    """
    return math.sqrt(check_count(num_outputs, "number of outputs")) * probability_norm


def classical_rate(dim: int, smoothness: float, num_perturbations: int, num_steps: int) -> float:
    r"""Return the classical rate :math:`\sqrt{dL / (PT)}` of ZO-SGD, up to constants.

    As stated in Li et al. (2026), arXiv:2605.03373, eq. 12.

    Args:
        dim: Number of parameters d.
        smoothness: Lipschitz constant L of the gradient.
        num_perturbations: P.
        num_steps: T.

    Returns:
        The rate of the mean squared gradient norm.

    Example:
        >>> classical_rate(100, 1.0, 1, 100)
        1.0
    """
    check_positive(dim=dim, smoothness=smoothness, num_steps=num_steps)
    return math.sqrt(dim * smoothness / (check_num_perturbations(num_perturbations) * num_steps))


def classical_learning_rate(dim: int, smoothness: float, num_perturbations: int) -> float:
    r"""Return the largest step size the classical analysis allows, :math:`P / (Ld)`.

    As stated in Li et al. (2026), arXiv:2605.03373, above eq. 12.

    Args:
        dim: Number of parameters d.
        smoothness: Lipschitz constant L of the gradient.
        num_perturbations: P.

    Returns:
        The step size.

    Example:
        >>> classical_learning_rate(1000, 2.0, 10)
        0.005
    """
    check_positive(dim=dim, smoothness=smoothness)
    return check_num_perturbations(num_perturbations) / (smoothness * dim)
