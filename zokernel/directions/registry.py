"""The families of directions by name, for command lines and configuration files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from zokernel.calls import make_part, parse_call
from zokernel.directions.base import Directions
from zokernel.directions.families.blockwise import Blockwise
from zokernel.directions.families.dense import Dense
from zokernel.directions.families.flipout import Flipout
from zokernel.directions.families.low_rank import LowRank
from zokernel.directions.families.orthogonal import Orthogonal
from zokernel.directions.families.sparse import Sparse
from zokernel.directions.families.subspace import Subspace
from zokernel.distributions import DIRECTION_DISTRIBUTIONS
from zokernel.errors import UsageError


def _blockwise(inner: str | Directions = "rademacher", **options: Any) -> Blockwise:
    return Blockwise(get_directions(inner), **options)


FAMILIES: dict[str, Callable[..., Directions]] = {
    "dense": Dense,
    "sparse": Sparse,
    "subspace": Subspace,
    "low_rank": LowRank,
    "blockwise": _blockwise,
    "orthogonal": Orthogonal,
    "flipout": Flipout,
}
OLD_NAMES = {"lowrank": "low_rank", "frames": "orthogonal"}
_DENSE: dict[str, Callable[..., Directions]] = {name: partial(Dense, name) for name in DIRECTION_DISTRIBUTIONS}


def get_directions(spec: str | Directions, **options: Any) -> Directions:
    """Return a family of directions.

    Args:
        spec: A family (``dense``, ``sparse``, ``subspace``, ``low_rank``, ``blockwise``, ``orthogonal``,
            ``flipout``), with its arguments in parentheses if it has some, as in ``low_rank(2, refresh=5)`` or
            ``blockwise(low_rank(2))``; a distribution (``rademacher``, ...), for dense directions drawn from it; or a
            family object, returned as it is.
        options: Passed to the family.

    Returns:
        The family.

    Raises:
        UsageError: If there is no such family or it does not take those options.

    Example:
        >>> get_directions("gaussian"), get_directions("sparse", density=0.1)
        (Dense('gaussian'), Sparse(density=0.1, distribution='rademacher'))
        >>> get_directions("blockwise(orthogonal(4), every=3)")
        Blockwise(Orthogonal(size=4), every=3)
    """
    if isinstance(spec, Directions):
        if options:
            raise UsageError(f"Options {', '.join(options)} cannot be set on {spec!r}, which is already made.")
        return spec
    if not isinstance(spec, str):
        raise UsageError(f"{spec!r} is no family of directions: pass one such as Dense(), or its text.")
    name, arguments, keywords = parse_call(spec)
    name, constructors = OLD_NAMES.get(name, name), FAMILIES | _DENSE
    return make_part(name, arguments, keywords | options, constructors, "family of directions")
