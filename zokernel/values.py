"""What the value of an option is: a finite number, a whole number, or a switch."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

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
        if not isinstance(value, bool):
            raise UsageError(f"{name} must be True or False, not {value!r}.")
