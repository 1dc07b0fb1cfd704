r"""Projected Jacobians :math:`Z = J U`: what P random directions show of a model, by forward passes only.

Column p of Z is the derivative of every logit along direction p, the direction that training with the same seed uses at
step 0.  All inputs are evaluated under the same perturbed weights (common random numbers), together when their shapes
allow it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zokernel.directions import Dense
from zokernel.directions.backends import dispatch
from zokernel.directions.placement import place_all
from zokernel.directions.terms import Job
from zokernel.distributions import Distribution
from zokernel.errors import UsageError
from zokernel.kernels import checks
from zokernel.kernels.batches import Batch, concatenate, examples
from zokernel.kernels.blocks import pusher
from zokernel.kernels.jacobians import CHUNK_BYTES, example_jacobian, flatten, inner_products
from zokernel.kernels.model import FunctionalModel, Model, Outputs, Params, wrap

# Shape suffixes: R rows of logits (N, or N L for sequences), V outputs, P directions, C at once, D parameters.

METHODS = ("jvp", "finite_difference", "jacobian")


def project(
    model: Model,
    batches: Sequence[Batch],
    *,
    num_perturbations: int,
    distribution: str | Distribution = "rademacher",
    seed: int = 0,
    method: str = "jvp",
    eps: float = 1e-3,
    first: int = 0,
    outputs: Outputs | None = None,
    params: Mapping[str, Tensor] | None = None,
    chunk_size: int | None = None,
    check: bool = True,
) -> list[Tensor]:
    r"""Return :math:`J U` of several inputs along the same directions.

    ``jvp`` is exact (about 3 forwards per direction).  ``finite_difference`` is what training sees: two forwards at
    :math:`\theta \pm \epsilon u` in the model's own dtype, each from the same stored weights.  ``jacobian`` forms J
    once and multiplies; the fastest when it fits and directions are many.

    Args:
        model: A module, a function, or a :class:`FunctionalModel`.
        batches: Inputs to project.
        num_perturbations: P.
        distribution: Distribution of the directions.
        seed: Seed of the directions; direction p is ``Dense(distribution)(..., seed=seed, step=0, index=first + p)``.
        method: ``jvp``, ``finite_difference`` or ``jacobian``.
        eps: Perturbation size of ``finite_difference``.
        first: Index of the first direction.
        outputs: Candidate outputs to keep.
        params: Parameters of a bare function.
        chunk_size: Directions in flight at once (``jvp`` and ``jacobian``).
        check: Probe the model for pitfalls first.

    Returns:
        One tensor (R, V, P) for each input.

    Raises:
        UsageError: If the method is unknown, P is not positive, or the model does not allow the method.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> exact, = project(model, [torch.eye(2)], num_perturbations=3)
        >>> moved, = project(model, [torch.eye(2)], num_perturbations=3, method="finite_difference")
        >>> exact.shape, torch.allclose(exact, moved, atol=1e-3)
        (torch.Size([2, 1, 3]), True)
    """
    if method not in METHODS:
        raise UsageError(f"There is no method {method!r}: choose one of {', '.join(METHODS)}.")
    if num_perturbations < 1:
        raise UsageError(f"num_perturbations is {num_perturbations}: at least one direction is needed.")
    if not eps > 0:
        raise UsageError(f"eps is {eps}: a perturbation must be positive; 1e-3 suits most models.")
    model = wrap(model, params=params, outputs=outputs)
    if check:
        checks.validate(model, *batches, forward=method == "jvp", reverse=method == "jacobian")
    concatenated = concatenate(batches)
    inputs = list(batches) if concatenated is None else [concatenated]
    shapes = [model.output_shape(batch) for batch in batches]
    size = sum(shape.numel() for shape in shapes)
    checks.announce(
        f"projections of {size:,} logits on {num_perturbations:,} directions by {method}",
        size * num_perturbations * model.itemsize + 3 * model.dim * model.itemsize,
        "use fewer directions at a time, or restrict outputs= to the candidates of interest",
    )
    draw = SeededDirections(Dense(distribution), model.params, seed)
    indices = range(first, first + num_perturbations)
    if method == "finite_difference":
        columns = _by_differences(model, inputs, draw, indices, eps)
    else:
        chunk_size = chunk_size or max(1, CHUNK_BYTES // (8 * model.dim * model.itemsize))
        columns = (_by_jvp if method == "jvp" else _by_jacobian)(model, inputs, draw, indices, chunk_size)
    flat_PX = torch.cat(columns)
    parts = flat_PX.split([shape.numel() for shape in shapes], dim=1)
    return [part.T.reshape(*shape, num_perturbations) for part, shape in zip(parts, shapes, strict=True)]


class SeededDirections:
    """The directions of one seed over one set of parameters.

    Args:
        directions: Distribution and backend of the directions.
        params: Parameters by name.
        seed: Seed.
    """

    def __init__(self, directions: Dense, params: Params, seed: int):
        self.directions, self.params, self.seed = directions, params, seed

    def add_(self, weights: Params, scale, index) -> None:
        """Add ``scale`` times direction ``index`` (or lists of both) to ``weights`` in place."""
        self.directions.add_(weights, scale, seed=self.seed, step=0, index=index)

    def rows(self, indices: Sequence[int]) -> Params:
        """Return directions stacked by name, each ``(C, *shape)``."""
        stacked = {name: tensor.new_zeros(len(indices), *tensor.shape) for name, tensor in self.params.items()}
        self._fill_([{name: tensor[row] for name, tensor in stacked.items()} for row in range(len(indices))], indices)
        return stacked

    def matrix(self, indices: Sequence[int]) -> Tensor:
        """Return directions as rows of one matrix (C, D), parameters in order."""
        sizes = [tensor.numel() for tensor in self.params.values()]
        matrix = next(iter(self.params.values())).new_zeros(len(indices), sum(sizes))
        views = [
            {name: part.view(self.params[name].shape) for name, part in zip(self.params, row.split(sizes), strict=True)}
            for row in matrix
        ]
        self._fill_(views, indices)
        return matrix

    def _fill_(self, zeros: list[Params], indices: Sequence[int]) -> None:
        """Write one direction into each set of zeros, all in one sweep (one call per direction would cost more)."""
        jobs = []
        for views, index in zip(zeros, indices, strict=True):
            places = place_all(views)
            terms = self.directions.terms(places, seed=self.seed, step=0, index=index)
            jobs += [Job(place, (term,), (1.0,)) for place, term in zip(places, terms, strict=True) if term is not None]
        dispatch.sweep(jobs, self.directions.backend)


def _chunks(indices: range, size: int) -> list[range]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _by_jvp(
    model: FunctionalModel, inputs: list[Batch], draw: SeededDirections, indices: range, chunk: int
) -> list[Tensor]:
    pushers = [pusher(model, batch) for batch in inputs]
    columns = []
    for part in _chunks(indices, chunk):
        rows = draw.rows(part)
        columns.append(torch.cat([push(rows) for push in pushers], dim=1))
    return columns


def _by_jacobian(
    model: FunctionalModel, inputs: list[Batch], draw: SeededDirections, indices: range, chunk: int
) -> list[Tensor]:
    jac_XD = torch.cat([flatten(example_jacobian(model, example)) for batch in inputs for example in examples(batch)])
    return [inner_products(draw.matrix(part), jac_XD).to(jac_XD.dtype) for part in _chunks(indices, chunk)]


def _by_differences(
    model: FunctionalModel, inputs: list[Batch], draw: SeededDirections, indices: range, eps: float
) -> list[Tensor]:
    """Evaluate both ends of every direction on a copy of the weights; the model's own are never touched."""
    weights = {name: tensor.clone() for name, tensor in model.params.items()}

    def logits_at(index: int, scale: float) -> Tensor:
        for name, tensor in weights.items():
            tensor.copy_(model.params[name])
        draw.add_(weights, scale, index)
        return torch.cat([model.logits_at(weights, batch).flatten() for batch in inputs])

    return [((logits_at(index, eps) - logits_at(index, -eps)) / (2 * eps))[None] for index in indices]
