"""What the value of an option is: a finite number, a whole number, or a switch."""

from __future__ import annotations

import math
import operator
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from zokernel.errors import UsageError


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; text, True, NaN and infinity are none.

    Example:
        >>> [is_number(value) for value in (0.5, -3, "0.5", True, float("nan"), float("inf"))]
        [True, True, False, False, False, False]
    """
    return issubclass(type(value), Real) and not isinstance(value, bool) and abs(value) < float("inf")


def is_whole(value: Any, least: float = 1) -> bool:
    """Return whether a value is a whole number of at least ``least``; 2.0 is none, since nothing can be counted by it.

    Example:
        >>> [is_whole(value) for value in (2, 2.0, "2", 0, True)]
        [True, False, False, False, False]
    """
    return issubclass(type(value), Integral) and not isinstance(value, bool) and value >= least


def plain_number(name: str, value: Any) -> Any:
    """Return a number or text of another library, such as numpy's, as Python's own; anything else as it is.

    Kept as it is, ``np.float32`` would round what is computed with it, ``np.uint8`` would overflow, and neither can be
    written to a journal.

    Args:
        name: The option's name, for the message.
        value: Its value.

    Raises:
        UsageError: If it is a tensor or an array of one element.

    Example:
        >>> [plain_number("rank", value) for value in (np.int64(2), np.float32(0.5), np.True_, np.str_("auto"))]
        [2, 0.5, True, 'auto']
        >>> plain_number("eps", np.array(1e-3))
        Traceback (most recent call last):
        zokernel.errors.UsageError: eps is an array: pass eps.item().
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, Integral):
        return operator.index(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, np.str_):
        return str(value)
    is_array = not isinstance(value, np.generic) and hasattr(value, "item") and hasattr(value, "shape")
    if is_array and math.prod(value.shape) == 1:
        kind = "an array" if isinstance(value, np.ndarray) else "a tensor"
        raise UsageError(f"{name} is {kind}: pass {name}.item().")
    return value


def plain_fields(settings: Any) -> None:
    """Make the numbers in the fields of a dataclass Python's own, see :func:`plain_number`.

    Args:
        settings: A dataclass, also a frozen one.

    Raises:
        UsageError: If a field is a tensor or an array of one element.
    """
    for field in fields(settings):
        value = getattr(settings, field.name)
        if (plain := plain_number(field.name, value)) is not value:
            object.__setattr__(settings, field.name, plain)


def check_positive(**numbers: Any) -> None:
    """Refuse numbers that are not positive and finite.

    Args:
        **numbers: Values by name.

    Raises:
        UsageError: If there is one.

    Example:
        >>> check_positive(eps=0.0)
        Traceback (most recent call last):
        zokernel.errors.UsageError: eps must be positive and finite, not 0.0.
    """
    for name, value in numbers.items():
        value = plain_number(name, value)
        if not (is_number(value) and value > 0):
            raise UsageError(f"{name} must be positive and finite, not {value!r}.")


def check_shares(**shares: Any) -> None:
    """Refuse shares, such as weights of the past, outside [0, 1).

    Args:
        **shares: Values by name.

    Raises:
        UsageError: If there is one.

    Example:
        >>> check_shares(momentum=1.0)
        Traceback (most recent call last):
        zokernel.errors.UsageError: momentum must be in [0, 1), not 1.0.
    """
    for name, value in shares.items():
        value = plain_number(name, value)
        if not (is_number(value) and 0 <= value < 1):
            raise UsageError(f"{name} must be in [0, 1), not {value!r}.")


def check_switches(**switches: Any) -> None:
    """Refuse switches that are not True or False: a text such as "false" would count as true.

    Args:
        **switches: Values by name.

    Raises:
        UsageError: If there is one.

    Example:
        >>> check_switches(normalize="false")
        Traceback (most recent call last):
        zokernel.errors.UsageError: normalize must be True or False, not 'false'.
    """
    for name, value in switches.items():
        if not isinstance(plain_number(name, value), bool):
            raise UsageError(f"{name} must be True or False, not {value!r}.")
