"""Whether code drew random numbers: the states of the usual generators, before and after."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> list[Any]:
    """Return the states of the generators of torch, Python and NumPy.

    Example:
        >>> before = random_state()
        >>> same_random_state(before, random_state())
        True
        >>> noise = torch.randn(1)
        >>> same_random_state(before, random_state())
        False
    """
    numpy: Any = np.random.get_state(legacy=False)
    states: list[Any] = [torch.get_rng_state(), random.getstate(), numpy["state"]]
    if torch.cuda.is_available() and torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        states += torch.cuda.get_rng_state_all()
    return states


def same_random_state(first: list[Any], second: list[Any]) -> bool:
    """Return whether no generator has moved between two states."""
    for one, other in zip(first, second):
        if isinstance(one, Tensor):
            if not torch.equal(one, other):
                return False
        elif isinstance(one, dict):  # NumPy's: numbers, and perhaps an array of them
            if one.keys() != other.keys() or any(not np.array_equal(one[key], other[key]) for key in one):
                return False
        elif one != other:
            return False
    return True
