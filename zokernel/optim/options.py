"""The options that every zeroth-order method takes, declared and documented once."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, TypedDict

from zokernel.directions.philox import check_seed
from zokernel.errors import UsageError
from zokernel.perturb import Perturb, make_perturb
from zokernel.perturb.in_place import RESTORE_MODES

REMOVAL_DATE = "2027-06-01"


class ZerothOrderOptions(TypedDict, total=False):
    """Options shared by all zeroth-order methods.

    Attributes:
        perturb: How losses are taken at perturbed weights and how the weights are restored: ``in_place`` (the default;
            up to rounding, as part of the update), ``in_place:grid`` (exactly, fp32 weights), ``in_place:copy``
            (exactly, any dtype, one copy), ``in_forward`` (the weights do not change, and layers read perturbed
            copies), or an object of :mod:`zokernel.perturb`.
        seed: Seed of all directions of the run (default 0).
        weight_decay: Decoupled weight decay: every step multiplies the weights by ``1 - lr * weight_decay`` (default
            0).  Parameter groups may have their own.
        restore: Deprecated: ``restore="copy"`` is ``perturb="in_place:copy"``.
    """

    perturb: str | Perturb
    seed: int
    weight_decay: float
    restore: str


SHARED_DEFAULTS: dict[str, Any] = {"perturb": "in_place", "seed": 0, "weight_decay": 0.0}


def shared_options(options: ZerothOrderOptions, owner: type) -> tuple[Perturb, int, float]:
    """Return the shared options of a method, checked.

    Args:
        options: Keyword arguments of its constructor beyond its own options.
        owner: The method's class.

    Returns:
        How to perturb, the seed and the weight decay; the last is checked with those of the groups.

    Raises:
        TypeError: If there is no such option.
        UsageError: If a value is out of range.
    """
    unknown = sorted(set(options) - set(SHARED_DEFAULTS) - {"restore"})
    if unknown:
        names = ", ".join(name for name in constructor_options(owner) if name != "lr")
        raise TypeError(f"{owner.__name__} has no option {unknown[0]!r}: it has {names}.")
    perturb = requested_perturb(options, stacklevel=5)
    seed = check_seed(options.get("seed", SHARED_DEFAULTS["seed"]))
    return make_perturb(perturb), seed, options.get("weight_decay", SHARED_DEFAULTS["weight_decay"])


def requested_perturb(options: ZerothOrderOptions, *, stacklevel: int) -> str | Perturb:
    """Remove what ``perturb``, or the deprecated ``restore``, says from a method's options, and return it.

    Args:
        options: Keyword arguments of the method's constructor beyond its own options.
        stacklevel: Calls from here up to the user's, for the warning.

    Raises:
        UsageError: If both are given, or there is no such ``restore``.
    """
    if "restore" not in options:
        return options.pop("perturb", SHARED_DEFAULTS["perturb"])
    if "perturb" in options:
        raise UsageError("perturb= says how weights are restored: leave out restore=.")
    restore = options.pop("restore")
    if restore not in RESTORE_MODES:
        raise UsageError(
            f"There is no restore={restore!r}: restore= is deprecated, pass perturb='in_place', 'in_place:grid', "
            "'in_place:copy' or 'in_forward' (which was restore='still')."
        )
    perturb = "in_place" if restore == "fold" else f"in_place:{restore}"
    warnings.warn(
        f"restore={restore!r} is deprecated and will be removed after {REMOVAL_DATE}: pass perturb={perturb!r}.",
        FutureWarning,
        stacklevel=stacklevel,
    )
    return perturb


def constructor_options(cls: type) -> dict[str, Any]:
    """Return the options of a method's constructor with their defaults, the shared ones included.

    Example:
        >>> from zokernel.optim import MeZO
        >>> options = constructor_options(MeZO)
        >>> options["eps"], options["seed"]
        (0.001, 0)
    """
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    takes_shared = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    own = {name: parameter.default for name, parameter in own_options(cls).items()}
    return own | (SHARED_DEFAULTS if takes_shared else {})


def own_options(cls: type) -> dict[str, inspect.Parameter]:
    """Return the options of a method's constructor, without the shared ones, as they are declared.

    Example:
        >>> from zokernel.optim import MeZO
        >>> own_options(MeZO)["total_steps"].annotation
        'int | None'
    """
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name not in ("self", "params") and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
