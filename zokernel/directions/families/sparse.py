r"""Sparse directions: only the small weights of each tensor move (Sparse-MeZO)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from zokernel.directions.base import Directions
from zokernel.directions.families.masks import count_bits, mask_of_small, unpack_bits
from zokernel.directions.philox import stream_key
from zokernel.directions.placement import Placement, place_all
from zokernel.directions.terms import Noise, Term
from zokernel.distributions import Distribution, direction_distribution
from zokernel.errors import UsageError
from zokernel.values import is_number, plain_number

logger = logging.getLogger(__name__)


class Sparse(Directions):
    r"""Directions :math:`z = m \odot \tilde z` with :math:`m_k = 1[|\theta_k| \le h]`, h a quantile of each tensor.

    The mask is taken once, from unperturbed weights, and kept as one bit per element: a mask recomputed from weights
    that a perturbation has moved would differ between :math:`+\epsilon` and :math:`-\epsilon`.  The covariance is the
    identity on the active coordinates: :math:`E|z|^2` is their number and :math:`E[(g \cdot z) z] = m \odot g`.

    Args:
        density: Fraction of each tensor's elements that move, in (0, 1].
        distribution: Distribution of the active coordinates: ``rademacher``, ``gaussian`` or ``uniform``.
        backend: ``auto``, ``numba``, ``triton`` or ``torch``.

    Raises:
        UsageError: If the density is out of range or the coordinates depend on each other.

    Example:
        >>> weights = {"w": torch.tensor([0.1, -3.0, 0.2, 5.0])}
        >>> z = Sparse(0.5)(weights, seed=0, step=0, index=0)["w"]
        >>> z.abs()
        tensor([1., 0., 1., 0.])

    References:
        Liu et al. (2024), Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning,
        arXiv:2402.15751.
    """

    def __init__(
        self, density: float = 0.25, *, distribution: str | Distribution = "rademacher", backend: str = "auto"
    ):
        super().__init__(backend)
        self.distribution = direction_distribution(distribution)
        if not self.distribution.independent:
            raise UsageError(
                f"Sparse directions need independent coordinates, unlike {self.distribution.name!r}: use gaussian."
            )
        density = plain_number("density", density)
        if not (is_number(density) and 0.0 < density <= 1.0):
            raise UsageError(f"The density {density!r} of sparse directions must be above 0 and at most 1.")
        self.density = density
        self._masks: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"Sparse(density={self.density}, distribution={self.distribution.name!r})"

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the masks of tensors that have none yet, from unperturbed weights.

        Without this call the first use takes them, which is right if the weights are unperturbed then.

        Args:
            tensors: Unperturbed weights by name.
        """
        for place in place_all(tensors):
            if place.name not in self._masks:
                self._masks[place.name] = self._mask(place)

    def freeze(self, tensors: Mapping[str, Tensor]) -> Sparse:
        """Take the masks as :meth:`prepare` does, and return the family.

        Args:
            tensors: Unperturbed weights by name.
        """
        self.prepare(tensors)
        return self

    def dimension(self, tensors: Mapping[str, Tensor]) -> int:
        """Return :math:`E|z|^2`, the number of coordinates that move.

        Args:
            tensors: Weights by name.

        Returns:
            Their number among the elements held here.
        """
        self.prepare(tensors)
        return sum(count_bits(self._masks[place.name]) for place in place_all(tensors))

    def mask(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return one tensor's mask.

        Args:
            name: Its name.
            shape: Shape of the elements held here.

        Returns:
            Booleans of that shape.
        """
        numel = torch.Size(shape).numel()
        return unpack_bits(self._masks[name])[:numel].view(*shape)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks, which cannot be found again from the weights of a later step."""
        return {"masks": dict(self._masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the masks of a checkpoint.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self._masks = dict(state["masks"])

    def terms(self, places: Sequence[Placement], *, seed: int, step: int, index: int) -> list[Term | None]:
        """Return each tensor's masked noise; see :meth:`Directions.terms`."""
        return [
            Noise(self.distribution.name, stream_key(seed, place.name), step, index, mask=self._mask_beside(place))
            for place in places
        ]

    def _mask_beside(self, place: Placement) -> Tensor:
        """Return a tensor's mask, on the device of the tensor: that of a checkpoint may have been loaded elsewhere."""
        if place.name not in self._masks:
            self.prepare({place.name: place.tensor})
        mask = self._masks[place.name] = self._masks[place.name].to(place.local.device)
        return mask

    def _mask(self, place: Placement) -> Tensor:
        # A shard's threshold is that of the whole tensor.
        whole = cast(Any, place.tensor).full_tensor() if hasattr(place.tensor, "full_tensor") else None
        packed = mask_of_small(place.local, self.density, whole=whole)
        logger.info("%s: %d of %d elements move", place.name, count_bits(packed), place.local.numel())
        return packed
