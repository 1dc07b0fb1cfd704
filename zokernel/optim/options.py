"""The options that every zeroth-order method takes, declared and documented once."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, TypedDict

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
        How to perturb, the seed and the weight decay.

    Raises:
        TypeError: If there is no such option.
        UsageError: If a value is out of range.
    """
    unknown = sorted(set(options) - set(SHARED_DEFAULTS) - {"restore"})
    if unknown:
        names = ", ".join(name for name in constructor_options(owner) if name != "lr")
        raise TypeError(f"{owner.__name__} has no option {unknown[0]!r}: it has {names}.")
    perturb = options.get("perturb", SHARED_DEFAULTS["perturb"])
    if "restore" in options:
        if "perturb" in options:
            raise UsageError("perturb= says how weights are restored: leave out restore=.")
        restore = options["restore"]
        if restore not in RESTORE_MODES:
            raise UsageError(
                f"There is no restore={restore!r}: restore= is deprecated, pass perturb='in_place', 'in_place:grid', "
                "'in_place:copy' or 'in_forward' (which was restore='still')."
            )
        perturb = "in_place" if restore == "fold" else f"in_place:{restore}"
        warnings.warn(
            f"restore={restore!r} is deprecated and will be removed after {REMOVAL_DATE}: pass perturb={perturb!r}.",
            FutureWarning,
            stacklevel=4,
        )
    weight_decay = options.get("weight_decay", SHARED_DEFAULTS["weight_decay"])
    if not weight_decay >= 0:
        raise UsageError(f"weight_decay must be >= 0, not {weight_decay}.")
    return make_perturb(perturb), options.get("seed", SHARED_DEFAULTS["seed"]), weight_decay


def constructor_options(cls: type) -> dict[str, Any]:
    """Return the options of a method's constructor with their defaults, the shared ones included.

    Example:
        >>> from zokernel.optim import MeZO
        >>> options = constructor_options(MeZO)
        >>> options["eps"], options["seed"]
        (0.001, 0)
    """
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in ("self", "params") and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    takes_shared = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return defaults | (SHARED_DEFAULTS if takes_shared else {})
