r"""Check that a model's loss is the same whether its weights are perturbed in place or while it runs.

Perturbing with ``in_forward`` sees the weights only through torch operations.  A model that reads them in another way
(a view made beforehand, a custom kernel) would be trained on losses of weights it does not have.  One loss taken both
ways tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from zokernel.directions import Directions
from zokernel.directions.weights.restore import LOW_PRECISION
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
    change; of weights in bfloat16 or float16, of which it would change most, copies are held.

    Args:
        parameters: Trained parameters by name, or some of them.
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
            assert inside.schedule is not None
            # In pieces, a product would be rounded in another way than in place.
            inside.schedule.stretch = max(inside.schedule.stretch, *(p.numel() for p in parameters.values()))
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


def one_of_each_kind(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the first of the parameters of one shape that blocks of a model have under the same name.

    Blocks read theirs alike.  A number that names a layer itself, as in ``net.0.weight``, tells layers apart.

    Example:
        >>> names = ("net.0.weight", "net.2.weight", "layers.0.up.weight", "layers.0.down.weight", "layers.1.up.weight")
        >>> list(one_of_each_kind(dict.fromkeys(names, torch.ones(2))))
        ['net.0.weight', 'net.2.weight', 'layers.0.up.weight', 'layers.0.down.weight']
    """
    kinds: dict[tuple[tuple[str, ...], torch.Size], str] = {}
    for name, tensor in parameters.items():
        *path, layer, own = ("", *name.split("."))
        kind = (*("#" if part.isdigit() else part for part in path), layer, own)
        kinds.setdefault((kind, tensor.shape), name)
    return {name: parameters[name] for name in kinds.values()}


@contextmanager
def moved_in_place(
    parameters: Mapping[str, Tensor], directions: Directions, offsets: Offsets, *, seed: int
) -> Iterator[None]:
    """Move weights along directions of step 0 for the length of a ``with`` block, and restore the same bits.

    Adding and subtracting restores most float32 numbers exactly.  The others are found beforehand, tensor by tensor,
    and kept; while a tensor is searched, a copy of it is held.  Tensors of 16 bits are kept whole.
    """
    restores: list[Callable[[], object]] = []

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

    def subtract(name: str, pieces: list[tuple[Tensor, Tensor]]) -> None:
        add(name, -1.0)
        weights = parameters[name].detach().view(-1)
        for piece, (places, values) in zip(weights.split(PIECE), pieces):
            piece[places] = values

    try:
        for name, tensor in parameters.items():
            restore: Callable[[], object]
            if tensor.dtype in LOW_PRECISION:
                restore = partial(tensor.detach().copy_, tensor.detach().clone())
            else:
                restore = partial(subtract, name, find_changed(name))
            add(name, 1.0)
            restores.append(restore)
        yield
    finally:
        for restore in restores:
            restore()


def changed(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the bits of two vectors differ, int32, and what was there in the old one.

    Example:
        >>> changed(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([-0.0, 1.0, 2.5]))
        (tensor([0, 2], dtype=torch.int32), tensor([0., 2.]))
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[old.element_size()]
    places = (old.view(bits) != new.view(bits)).nonzero().squeeze(1)
    return places.int(), old[places]
