r"""Error curves: :math:`\|\hat K_P - K\|_F / \|K\|_F` for every P = 1, 2, ... and many observed examples at once.

All curves of one seed share the same directions (common random numbers), and each is one nested stream, so a curve
costs one projection per direction and a running sum of V x V outer products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zokernel.directions import Dense
from zokernel.distributions import Distribution
from zokernel.errors import UsageError
from zokernel.kernels import checks
from zokernel.kernels.batches import Batch, examples, num_examples
from zokernel.kernels.jacobians import example_jacobian, flatten
from zokernel.kernels.model import Model, Outputs, wrap
from zokernel.kernels.projections import SeededDirections, project
from zokernel.theory.checks import check_num_perturbations
from zokernel.theory.kernel_error import KernelMoments, relative_error

# Shape suffixes: S seeds, N observed examples, P directions, V outputs, D parameters.


@dataclass(frozen=True)
class ErrorCurves:
    """Relative errors of one updated example against several observed ones.

    Attributes:
        errors_SNP: Measured relative errors for P = 1, 2, ...
        moments: Moments of each pair.
        kernels_NVV: Exact kernels.
        distribution: Distribution of the directions.
    """

    errors_SNP: Tensor
    moments: list[KernelMoments]
    kernels_NVV: Tensor
    distribution: str | Distribution

    def predicted(self, counts: Sequence[int]) -> Tensor:
        """Return the exact rms relative error of every pair at ``counts``, (N, len(counts))."""
        rows = [[relative_error(pair, count, self.distribution) for count in counts] for pair in self.moments]
        return torch.tensor(rows, dtype=torch.float64)

    def rms(self) -> Tensor:
        """Return the measured rms over seeds, (N, P)."""
        return self.errors_SNP.square().mean(0).sqrt()

    def band(self, low: float = 0.05, high: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return two quantiles over seeds, each (N, P)."""
        quantiles = torch.quantile(self.errors_SNP, self.errors_SNP.new_tensor([low, high]), dim=0)
        return quantiles[0], quantiles[1]


def error_curves(
    model: Model,
    x_o: Batch,
    x_u: Batch,
    *,
    max_perturbations: int = 1000,
    distribution: str | Distribution = "rademacher",
    seeds: Sequence[int] = (0,),
    method: str = "jacobian",
    eps: float = 1e-3,
    outputs: Outputs | None = None,
    params: Mapping[str, Tensor] | None = None,
) -> ErrorCurves:
    r"""Measure error curves of all examples of ``x_o`` against the single example ``x_u``.

    Args:
        model: A module, ``f(params, x)`` with ``params``, or a :class:`zokernel.kernels.FunctionalModel`.
        x_o: Observed examples.
        x_u: One updated example.
        max_perturbations: Largest P.
        distribution: Distribution of the directions.
        seeds: One nested stream of directions for each.
        method: How to project: ``jacobian``, ``jvp`` or ``finite_difference``.
        eps: Perturbation size of ``finite_difference``.
        outputs: Candidate outputs to keep.
        params: Parameters of a bare function.

    Returns:
        The curves with their exact predictions.

    Raises:
        UsageError: If ``x_u`` has several examples, there is no direction or no seed, or a kernel is zero.

    Example:
        >>> curves = error_curves(torch.nn.Linear(3, 2), torch.ones(4, 3), torch.ones(1, 3), max_perturbations=50)
        >>> curves.errors_SNP.shape, curves.predicted([50]).shape
        (torch.Size([1, 4, 50]), torch.Size([4, 1]))
    """
    max_perturbations = check_num_perturbations(max_perturbations)
    if num_examples(x_u) != 1 or not len(seeds):
        raise UsageError(
            f"Error curves are of one updated example and at least one seed, not {num_examples(x_u)} and {len(seeds)}: "
            "call error_curves for each example."
        )
    model = wrap(model, params=params, outputs=outputs)
    checks.validate(model, x_u, x_o, forward=method == "jvp", reverse=True)
    jac_u = flatten(example_jacobian(model, x_u))
    jacs_o = [flatten(example_jacobian(model, example)) for example in examples(x_o)]
    moments = [KernelMoments.from_jacobians(jac_o, jac_u) for jac_o in jacs_o]
    for pair in moments:
        pair.check_relative()
    kernels = torch.stack([jac_o.double() @ jac_u.double().T for jac_o in jacs_o])
    stacked = torch.cat([*jacs_o, jac_u])
    num_outputs = len(jac_u)
    errors = []
    for seed in seeds:
        if method == "jacobian":
            draw = SeededDirections(Dense(distribution), model.params, seed)
            chunks = torch.arange(max_perturbations).split(256)
            projections = torch.cat([draw.matrix(part.tolist()) @ stacked.T for part in chunks])
        else:
            parts = project(
                model,
                [x_o, x_u],
                num_perturbations=max_perturbations,
                distribution=distribution,
                seed=seed,
                method=method,
                eps=eps,
                check=False,
            )
            projections = torch.cat([part.flatten(0, 1) for part in parts]).T
        errors.append(curves_from_projections(projections, kernels, num_outputs))
    return ErrorCurves(torch.stack(errors), moments, kernels, distribution)


def curves_from_projections(projections_PX: Tensor, kernels_NVV: Tensor, num_outputs: int) -> Tensor:
    """Return nested error curves (N, P) from projections of N observed examples followed by the updated one.

    Args:
        projections_PX: One row per direction: the N V logits of the observed examples, then V of the updated one.
        kernels_NVV: Exact kernels.
        num_outputs: V.

    Returns:
        Relative errors in float64.
    """
    count = len(projections_PX)
    right_PV = projections_PX[:, -num_outputs:].double()
    steps = torch.arange(1, count + 1, dtype=torch.float64, device=right_PV.device)[:, None, None]
    curves = []
    for n, kernel in enumerate(kernels_NVV):
        left_PV = projections_PX[:, n * num_outputs : (n + 1) * num_outputs].double()
        running = (left_PV[:, :, None] * right_PV[:, None, :]).cumsum(0) / steps
        curves.append((running - kernel).flatten(1).norm(dim=1) / kernel.norm())
    return torch.stack(curves)
