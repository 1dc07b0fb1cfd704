r"""Check that a model's loss is the same whether its weights are perturbed in place or while it runs.

Perturbing with ``in_forward`` sees the weights only through torch operations.  A model that reads them in another way
(a view made beforehand, a custom kernel) would be trained on losses of weights it does not have.  One loss taken both
ways tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from zokernel.directions import Directions
from zokernel.errors import RunError, UsageError
from zokernel.estimators.base import Offsets
from zokernel.perturb.base import Closure
from zokernel.perturb.in_forward import InForward
from zokernel.perturb.in_place import loss_value

# How far both losses may differ, as a share of what the perturbation does to the loss.
TOLERANCE = 1e-2
# Elements compared at a time, which bounds the memory that a comparison takes.
PIECE = 1 << 20


def matches_in_place(
    parameters: Mapping[str, Tensor], directions: Directions, closure: Closure, offsets: Offsets, *, seed: int = 0
) -> tuple[bool, str]:
    """Take one perturbed loss in place and one with ``in_forward``, and compare them.

    Three forwards are run.  The weights are restored to the same bits, at the memory of the few that rounding would
    change.

    Args:
        parameters: Trained parameters by name, float32 or float64.
        directions: The family of random directions.
        closure: Returns the loss of a fixed batch.
        offsets: The point to compare at, in units of the weights.
        seed: Seed of the directions.

    Returns:
        Whether both are the same, and what was found, as the rest of a sentence.

    Example:
        >>> from zokernel.directions import Dense
        >>> layer, inputs = torch.nn.Linear(3, 1), torch.ones(4, 3)
        >>> params = dict(layer.named_parameters())
        >>> matches_in_place(params, Dense(), lambda: layer(inputs).square().mean(), {0: 1e-3})[0]
        True
        >>> hidden = layer.weight.detach()  # another name for the same memory
        >>> matches_in_place(params, Dense(), lambda: (inputs @ hidden.T + layer.bias).square().mean(), {0: 1e-3})[0]
        False
    """
    with torch.no_grad():
        try:
            inside = InForward()
            inside.attach(parameters, directions, seed=seed)
            (loss_in_forward,) = inside.losses(closure, [offsets], step=0)
        except (UsageError, RunError) as error:
            return False, f"in_forward does not suit this model ({error})"
        base = loss_value(closure())
        with moved_in_place(parameters, directions, offsets, seed=seed):
            loss_in_place = loss_value(closure())
    comparison = (
        f"the same perturbed loss is {loss_in_place:.6g} in place and {loss_in_forward:.6g} with in_forward "
        f"({base:.6g} unperturbed)"
    )
    return abs(loss_in_place - loss_in_forward) <= TOLERANCE * abs(loss_in_place - base), comparison


@contextmanager
def moved_in_place(
    parameters: Mapping[str, Tensor], directions: Directions, offsets: Offsets, *, seed: int
) -> Iterator[None]:
    """Move weights along directions of step 0 for the length of a ``with`` block, and restore the same bits.

    Adding and subtracting restores most float32 numbers exactly.  The others are found beforehand, tensor by tensor,
    and kept; while a tensor is searched, a copy of it is held.
    """
    changed_pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(name: str, sign: float) -> None:
        scales = [sign * offset for offset in offsets.values()]
        directions.add_({name: parameters[name]}, scales, seed=seed, step=0, index=list(offsets))

    def find_changed(name: str) -> list[tuple[Tensor, Tensor]]:
        weights = parameters[name].detach()
        before = weights.clone()
        try:
            add(name, 1.0)
            add(name, -1.0)
            pairs = zip(before.view(-1).split(PIECE), weights.view(-1).split(PIECE))
            return [changed(old, new) for old, new in pairs]
        finally:
            weights.copy_(before)

    try:
        for name in parameters:
            pieces = find_changed(name)
            add(name, 1.0)
            changed_pieces[name] = pieces
        yield
    finally:
        for name, pieces in changed_pieces.items():
            add(name, -1.0)
            weights = parameters[name].detach().view(-1)
            for piece, (places, values) in zip(weights.split(PIECE), pieces):
                piece[places] = values


def changed(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the bits of two vectors differ, int32, and what was there in the old one.

    Example:
        >>> changed(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([-0.0, 1.0, 2.5]))
        (tensor([0, 2], dtype=torch.int32), tensor([0., 2.]))
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[old.element_size()]
    places = (old.view(bits) != new.view(bits)).nonzero().squeeze(1)
    return places.int(), old[places]
