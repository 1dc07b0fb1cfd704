r"""Blockwise directions: the layers take turns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from zokernel.directions.base import Directions
from zokernel.directions.placement import Placement
from zokernel.directions.terms import Term
from zokernel.errors import UsageError
from zokernel.values import is_whole, plain_number


def layer_of(name: str) -> str:
    """Return the block a parameter belongs to: its name up to the first number.

    Args:
        name: Name of a parameter.

    Returns:
        The prefix that its layer shares, or "" for parameters outside any numbered layer.

    Example:
        >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("model.norm.weight")
        ('model.layers.3', '')
    """
    match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return match.group() if match else ""


class Blockwise(Directions):
    r"""Directions that are zero outside one block of tensors; blocks take turns from step to step.

    Block ``(step // every) mod B`` moves, B being the number of blocks among the tensors of the call (in order of first
    appearance by sorted name).  :math:`E|z|^2` is the number of elements in that block.  A ``sphere`` inside has the
    radius of the block.

    Args:
        inner: Directions on the active block.
        block_of: Maps a tensor's name to its block; by default tensors of one numbered layer form a block, and those
            outside any layer form one more.
        every: Steps before the next block moves.

    Raises:
        UsageError: If ``inner`` is no family, or ``every`` no positive whole number.

    Example:
        >>> import torch
        >>> from zokernel.directions import Dense
        >>> weights = {"layers.0.w": torch.zeros(2), "layers.1.w": torch.zeros(2)}
        >>> z = Blockwise(Dense("rademacher"))(weights, seed=0, step=1, index=0)
        >>> {name: int(value.abs().sum()) for name, value in z.items()}
        {'layers.0.w': 0, 'layers.1.w': 2}
    """

    def __init__(self, inner: Directions, *, block_of: Callable[[str], str] = layer_of, every: int = 1):
        if not isinstance(inner, Directions):
            raise UsageError(f"{inner!r} is no family of directions for the blocks: pass one such as Dense().")
        super().__init__(inner.backend)
        every = plain_number("every", every)
        if not is_whole(every):
            raise UsageError(f"Each block must stay at least 1 step, and whole steps, not {every!r}.")
        self.inner, self.block_of, self.every = inner, block_of, every

    def __repr__(self) -> str:
        blocks = "" if self.block_of is layer_of else f", block_of={getattr(self.block_of, '__name__', self.block_of)}"
        return f"Blockwise({self.inner!r}{blocks}, every={self.every})"

    @property
    def couples_tensors(self) -> bool:
        """Always: whose turn it is depends on which blocks there are."""
        return True

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        """Whether the inner directions can be generated again."""
        return self.inner.seeded

    def gain(self) -> float:
        """Return the gain of the inner directions."""
        return self.inner.gain()

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Prepare the inner directions; see :meth:`Directions.prepare`."""
        self.inner.prepare(tensors)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the inner directions."""
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the inner directions of a checkpoint."""
        self.inner.load_state_dict(state)

    def active(self, names: Sequence[str], step: int) -> str:
        """Return the block whose turn it is.

        Args:
            names: Names of all tensors.
            step: Step of the run.

        Returns:
            The block.
        """
        blocks = list(dict.fromkeys(self.block_of(name) for name in sorted(names, key=natural_order)))
        return blocks[step // self.every % len(blocks)]

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return the inner family's terms on the active block, None elsewhere; see :meth:`Directions.terms`."""
        if not places:
            return []
        block = self.active([place.name for place in places], step)
        active = [place for place in places if self.block_of(place.name) == block]
        inner_terms = iter(self.inner.terms(active, seed=seed, step=step, index=index))
        return [next(inner_terms) if self.block_of(place.name) == block else None for place in places]


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
