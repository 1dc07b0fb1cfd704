"""Ways of perturbing by the words that Python and the command line share."""

from __future__ import annotations

from zokernel.errors import UsageError
from zokernel.perturb.base import Perturb
from zokernel.perturb.in_forward import InForward
from zokernel.perturb.in_place import InPlace
from zokernel.perturb.per_example import PerExampleRows
from zokernel.perturb.recorded import Replayed

NAMES = ("in_place", "in_place:grid", "in_place:copy", "in_forward", "stacked", "per_example")


def make_perturb(perturb: str | Perturb) -> Perturb:
    """Return a way of perturbing, given an object or its name.

    Args:
        perturb: ``in_place``, ``in_place:grid``, ``in_place:copy``, ``in_forward``, ``per_example``, or an object.

    Returns:
        The object.

    Raises:
        UsageError: If there is no such way, or it needs more than its name.

    Example:
        >>> make_perturb("in_place:copy").walks_points
        Traceback (most recent call last):
        ...
        zokernel.errors.UsageError: This InPlace serves no optimizer yet: pass it as perturb=... to one.
        >>> make_perturb("in_forward").name
        'in_forward'
    """
    if isinstance(perturb, Perturb):
        return perturb
    if not isinstance(perturb, str):
        raise UsageError(f"{perturb!r} is no way of perturbing: pass 'in_place', or an object such as InForward().")
    if perturb == "in_forward":
        return InForward()
    if perturb == "in_place" or perturb.startswith("in_place:"):
        return InPlace(perturb.partition(":")[2] or "fold")
    if perturb == "per_example":
        return PerExampleRows()
    if perturb == "stacked":
        raise UsageError("'stacked' needs a function that takes several losses at once: perturb=Stacked(losses).")
    raise UsageError(f"There is no perturb {perturb!r}: choose one of {', '.join(NAMES)}.")


def perturb_for_replay(name: str) -> Perturb:
    """Return what restores and updates the weights as the way called ``name`` does, to replay a journal."""
    return make_perturb(name) if name.startswith("in_place") else Replayed(name)
