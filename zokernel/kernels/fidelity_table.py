r"""How faithful zeroth-order kernels are: measured against predicted, for several numbers of directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zokernel.distributions import Distribution
from zokernel.errors import UsageError
from zokernel.kernels import checks
from zokernel.kernels.batches import Batch
from zokernel.kernels.lm_head import HeadKernel, head_moments
from zokernel.kernels.model import FunctionalModel, Model, Outputs, wrap
from zokernel.kernels.projected_kernel import ZOKernel, zo_entk_factors
from zokernel.kernels.tangent_kernel import choose_method, entk, kernel_moments
from zokernel.theory.bounds import kernel_bound
from zokernel.theory.kernel_error import KernelMoments, relative_error

COLUMNS = ("P", "measured", "low", "high", "predicted", "jl_bound")


@dataclass(frozen=True)
class Fidelity:
    r"""Relative errors :math:`\|\hat K - K\|_F / \|K\|_F` against P; iterate for rows, index by column name.

    Attributes:
        rows: One dict for each P: ``P``; ``measured``, the rms over replicates; ``low`` and ``high``, their 5% and 95%
            quantiles; ``predicted``, the exact rms (of a vocabulary-sized kernel kept in factors, the Gaussian's, which
            Rademacher and uniform directions never exceed); ``jl_bound``, the bound of Li et al. (2026),
            arXiv:2605.03373, with its exponent corrected.
        moments: The pair's moments, from which ``predicted`` follows.
        errors: Every measured error, (replicates, len(P)).
    """

    rows: list[dict[str, float]]
    moments: KernelMoments
    errors: Tensor

    def __getitem__(self, key: str | int) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]

    def __iter__(self):
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def slope(self) -> float:
        """Slope of log measured error against log P, by least squares (-1/2 in theory)."""
        x = torch.tensor(self["P"], dtype=torch.float64).log()
        y = torch.tensor(self["measured"], dtype=torch.float64).log()
        x = x - x.mean()
        return (torch.sum(x * y) / torch.sum(x * x)).item()

    def __str__(self) -> str:
        lines = ["".join(f"{name:>12}" for name in COLUMNS)]
        lines += ["".join(f"{row[name]:>12.4g}" for name in COLUMNS) for row in self.rows]
        return "\n".join(lines)


def fidelity(
    model: Model,
    x_o: Batch,
    x_u: Batch,
    *,
    num_perturbations: Sequence[int],
    distribution: str | Distribution = "rademacher",
    seed: int = 0,
    method: str = "auto",
    eps: float = 1e-3,
    outputs: Outputs | None = None,
    params: Mapping[str, Tensor] | None = None,
    replicates: int = 8,
    streams: str = "nested",
    check: bool = True,
) -> Fidelity:
    r"""Measure the relative error of :math:`\hat K` for several P, next to its exact rms and the published bound.

    Args:
        model: A module, ``f(params, x)`` with ``params``, or a :class:`FunctionalModel`.
        x_o: Observed input.
        x_u: Updated input.
        num_perturbations: Values of P.
        distribution: Distribution of the directions.
        seed: Seed of the first replicate; replicate r uses ``seed + r``.
        method: How to project: ``jvp``, ``finite_difference``, ``jacobian``, or ``auto`` (``jacobian`` when it fits).
        eps: Perturbation size of ``finite_difference``.
        outputs: Candidate outputs to keep.
        params: Parameters of a bare function.
        replicates: Independent repetitions.
        streams: ``nested``: the directions for a smaller P are the first of those for a larger one (smooth curves);
            ``independent``: every P has its own.
        check: Probe the model for pitfalls first.

    Returns:
        The table.

    Raises:
        UsageError: If an argument is out of range, or the exact kernel is zero.

    Example:
        >>> table = fidelity(torch.nn.Linear(4, 3), torch.ones(1, 4), torch.ones(1, 4), num_perturbations=[10, 1000])
        >>> table["P"], [round(error, 3) for error in table["predicted"]]
        ([10, 1000], [0.6, 0.06])
    """
    counts = [int(count) for count in num_perturbations]
    if not counts or min(counts) < 1 or replicates < 1:
        raise UsageError("fidelity needs at least one positive P and one replicate.")
    if streams not in ("nested", "independent"):
        raise UsageError(f"There are no {streams!r} streams: choose 'nested' or 'independent'.")
    model = wrap(model, params=params, outputs=outputs)
    exact, moments, forms_jacobian = _exact(model, x_o, x_u, check)
    moments.check_relative()
    if method == "auto":
        method = "jacobian" if forms_jacobian else "jvp"

    def draw(repeat: int, count: int, first: int) -> ZOKernel:
        return zo_entk_factors(
            model,
            x_o,
            x_u,
            num_perturbations=count,
            distribution=distribution,
            seed=seed + repeat,
            method=method,
            eps=eps,
            first=first,
            check=check and repeat == 0,
        )

    def errors_of(repeat: int) -> Tensor:
        if streams == "nested":
            return draw(repeat, max(counts), 0).relative_errors(exact, counts)
        starts = [sum(counts[:i]) for i in range(len(counts))]
        return torch.cat(
            [draw(repeat, p, start).relative_errors(exact, [p]) for p, start in zip(counts, starts, strict=True)]
        )

    errors = torch.stack([errors_of(repeat) for repeat in range(replicates)])
    return tabulate(errors, counts, moments, model.output_shape(x_u)[1], distribution)


def tabulate(
    errors: Tensor, counts: Sequence[int], moments: KernelMoments, num_outputs: int, distribution: str | Distribution
) -> Fidelity:
    """Return measured errors (replicates, len(P)) as a table with their predictions."""
    bands = torch.quantile(errors, errors.new_tensor([0.05, 0.95]), dim=0)
    rows = []
    for i, count in enumerate(counts):
        bound = kernel_bound(moments.norm_o_sq**0.5, moments.norm_u_sq**0.5, num_outputs, count)
        rows.append(
            {
                "P": count,
                "measured": errors[:, i].square().mean().sqrt().item(),
                "low": bands[0, i].item(),
                "high": bands[1, i].item(),
                "predicted": _predict(moments, count, distribution),
                "jl_bound": bound / math.sqrt(moments.kernel_sq),
            }
        )
    return Fidelity(rows, moments, errors)


def _predict(moments: KernelMoments, count: int, distribution: str | Distribution) -> float:
    if moments.diagonal is None and str(getattr(distribution, "name", distribution)) != "sphere":
        # Without D (a factored vocabulary kernel), the kurtosis cannot enter; D / S is below 0.01 on real models.
        return relative_error(moments, count, "gaussian")
    return relative_error(moments, count, distribution)


def _exact(
    model: FunctionalModel, x_o: Batch, x_u: Batch, check: bool
) -> tuple[Tensor | HeadKernel, KernelMoments, bool]:
    """Return the exact kernel, its moments, and whether its Jacobian was formed."""
    if check:
        checks.validate(model, x_u, x_o)
    method = choose_method(model, x_o, x_u)
    if check:
        checks.check_derivatives(model, x_u, forward=method != "contraction", reverse=True)
    if method == "lm_head":
        return *head_moments(model, x_o, x_u), False
    if method == "ntk_vp":
        cross = entk(model, x_o, x_u, method=method, check=False)
        norm_o, norm_u = (_square(entk(model, x, x, method=method, check=False)).trace().item() for x in (x_o, x_u))
        return cross, KernelMoments(norm_o, norm_u, cross.double().square().sum().item(), dim=model.dim), False
    return (
        entk(model, x_o, x_u, method=method, check=False),
        kernel_moments(model, x_o, x_u, check=False),
        True,
    )


def _square(kernel: Tensor) -> Tensor:
    return kernel if kernel.ndim == 2 else kernel.flatten(2, 3).flatten(0, 1)
