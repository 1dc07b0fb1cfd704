r"""The kernel of zeroth-order training, :math:`\hat K = \frac1P \sum_p (J_o u_p)(J_u u_p)^T`.

Defined by Li et al. (2026), arXiv:2605.03373, eq. 4.  It is the eNTK projected on P random directions: unbiased, of
rank at most P, and its mean-square error is known exactly (see :mod:`zokernel.theory.kernel_error`).  It is kept as its
two factors, so a vocabulary-sized kernel costs V x P numbers and its norms and errors come from P x P Gram matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zokernel.distributions import Distribution
from zokernel.errors import UsageError
from zokernel.kernels import checks
from zokernel.kernels.batches import Batch
from zokernel.kernels.blocks import shape_block
from zokernel.kernels.lm_head import HeadKernel
from zokernel.kernels.model import Model, Outputs, wrap
from zokernel.kernels.projections import project


@dataclass(frozen=True)
class ZOKernel:
    """A zeroth-order kernel by its factors.

    Attributes:
        left_RVP: Projections of the observed input, (R_o, V, P).
        right_RVP: Projections of the updated input, (R_u, V, P).
    """

    left_RVP: Tensor
    right_RVP: Tensor

    @property
    def num_perturbations(self) -> int:
        """Number of directions P."""
        return self.left_RVP.shape[-1]

    @property
    def left(self) -> Tensor:
        """Factor A, (R_o V, P)."""
        return self.left_RVP.flatten(0, 1)

    @property
    def right(self) -> Tensor:
        """Factor B, (R_u V, P)."""
        return self.right_RVP.flatten(0, 1)

    def dense(self, num_perturbations: int | None = None) -> Tensor:
        """Return the kernel of the first P directions as a tensor, shaped like :func:`zokernel.kernels.entk`'s.

        Args:
            num_perturbations: P; all directions when ``None``.

        Returns:
            (V, V) for single rows, else (R_o, V, R_u, V).

        Raises:
            RunError: If it does not fit in memory.
        """
        count = num_perturbations or self.num_perturbations
        left, right = self.left[:, :count], self.right[:, :count]
        checks.announce(
            f"ZO-eNTK block {len(left):,} x {len(right):,}",
            len(left) * len(right) * left.element_size(),
            "keep the factors (zo_entk_factors): norms, products and errors need no V x V matrix",
        )
        return shape_block(left @ right.T / count, self.left_RVP.shape[:2], self.right_RVP.shape[:2])

    def matvec(self, values: Tensor) -> Tensor:
        """Return the kernel times a vector (R_u V,), from the factors."""
        return self.left @ (self.right.T @ values) / self.num_perturbations

    def squared_norms(self, counts: Sequence[int]) -> Tensor:
        r"""Return :math:`\|\hat K_P\|_F^2 = \langle A^TA, B^TB\rangle / P^2` of the first P directions, for each P."""
        left, right = self.left.double(), self.right.double()
        cumulative = ((left.T @ left) * (right.T @ right)).cumsum(0).cumsum(1).diagonal()
        steps = torch.tensor(counts, device=self.left_RVP.device)
        return cumulative[steps - 1] / steps.double().square()

    def relative_errors(self, exact: Tensor | HeadKernel, counts: Sequence[int]) -> Tensor:
        r"""Return :math:`\|\hat K_P - K\|_F / \|K\|_F` of nested prefixes of the directions.

        Args:
            exact: K as a tensor, or in factored form for a vocabulary-sized one (then nothing V x V is formed).
            counts: Values of P, at most the number of directions.

        Returns:
            Relative errors in float64, one for each P.

        Raises:
            UsageError: If a P exceeds the number of directions.
        """
        if max(counts) > self.num_perturbations or min(counts) < 1:
            raise UsageError(f"Values of P must lie between 1 and the {self.num_perturbations} directions drawn.")
        if isinstance(exact, HeadKernel):
            inner, kernel_sq = exact.bilinear(self.left, self.right), exact.squared_norm()
        else:
            matrix = exact.reshape(len(self.left), len(self.right)).double()
            inner = torch.sum(self.left.double() * (matrix @ self.right.double()), dim=0)
            kernel_sq = matrix.square().sum().item()
        steps = torch.tensor(counts, device=self.left_RVP.device)
        squared = self.squared_norms(counts) - 2 * inner.cumsum(0)[steps - 1] / steps + kernel_sq
        return (squared.clamp_min(0) / kernel_sq).sqrt()


def zo_entk_factors(
    model: Model,
    x_o: Batch,
    x_u: Batch,
    *,
    num_perturbations: int,
    distribution: str | Distribution = "rademacher",
    seed: int = 0,
    method: str = "jvp",
    eps: float = 1e-3,
    outputs: Outputs | None = None,
    params: Mapping[str, Tensor] | None = None,
    first: int = 0,
    check: bool = True,
) -> ZOKernel:
    """Return the zeroth-order kernel as factors; both inputs see the same perturbed weights.

    Args:
        model: A module, ``f(params, x)`` with ``params``, or a :class:`~zokernel.kernels.FunctionalModel`.
        x_o: Observed input.
        x_u: Updated input (the same object for a symmetric kernel: it is then evaluated once).
        num_perturbations: P.
        distribution: Distribution of the directions.
        seed: Seed of the directions.
        method: ``jvp``, ``finite_difference`` or ``jacobian``, see :func:`zokernel.kernels.project`.
        eps: Perturbation size of ``finite_difference``.
        outputs: Candidate outputs to keep.
        params: Parameters of a bare function.
        first: Index of the first direction (for further, independent directions of the same stream).
        check: Probe the model for pitfalls first.

    Returns:
        The factors.

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> zo_entk_factors(model, torch.ones(1, 2), torch.ones(2, 2), num_perturbations=4).right_RVP.shape
        torch.Size([2, 3, 4])
    """
    model = wrap(model, params=params, outputs=outputs)
    batches = [x_o] if x_o is x_u else [x_o, x_u]
    parts = project(
        model,
        batches,
        num_perturbations=num_perturbations,
        distribution=distribution,
        seed=seed,
        method=method,
        eps=eps,
        first=first,
        check=check,
    )
    return ZOKernel(parts[0], parts[-1])


def zo_entk(
    model: Model,
    x_o: Batch,
    x_u: Batch,
    *,
    num_perturbations: int,
    distribution: str | Distribution = "rademacher",
    seed: int = 0,
    method: str = "jvp",
    eps: float = 1e-3,
    outputs: Outputs | None = None,
    params: Mapping[str, Tensor] | None = None,
    check: bool = True,
) -> Tensor:
    r"""Return the tangent kernel that zeroth-order training has, :math:`\hat K = J_o U U^T J_u^T`.

    Args:
        model: A module, ``f(params, x) -> (N, V)`` with ``params``, or a :class:`~zokernel.kernels.FunctionalModel`.
        x_o: Observed input: a tensor, or tensors by name for Hugging Face models.
        x_u: Updated input.
        num_perturbations: P.
        distribution: ``gaussian``, ``rademacher``, ``uniform`` or ``sphere``.
        seed: Seed of the directions; direction p is the one training with this seed draws at step 0.
        method: ``jvp`` (exact), ``finite_difference`` (what training sees) or ``jacobian`` (J formed once).
        eps: Perturbation size of ``finite_difference``.
        outputs: Candidate outputs to keep.
        params: Parameters of a bare function.
        check: Probe the model for pitfalls first.

    Returns:
        The kernel: (V, V) for one example on each side, else (N_o, V, N_u, V).

    Raises:
        UsageError: If the model or the request does not allow it; the message says what to change.
        RunError: If the kernel does not fit in memory (use :func:`zo_entk_factors`).

    Example:
        >>> model, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
        >>> close = zo_entk(model, x, x, num_perturbations=4000, distribution="rademacher")
        >>> bool((close - 4 * torch.eye(2)).abs().max() < 0.5)
        True
    """
    return zo_entk_factors(
        model,
        x_o,
        x_u,
        num_perturbations=num_perturbations,
        distribution=distribution,
        seed=seed,
        method=method,
        eps=eps,
        outputs=outputs,
        params=params,
        check=check,
    ).dense()
