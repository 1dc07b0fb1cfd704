"""Standard errors of shares of examples, and of their changes."""

from __future__ import annotations

import math


def share_error(share: float, examples: int) -> float:
    r"""Return the standard error of a share of examples, which is not zero at 0 and 1.

    Half a success and half a failure are added, the centre of Wilson's interval (1927) of one standard error:

    .. math:: p = \frac{N s + 1/2}{N + 1}, \qquad SE = \sqrt{\frac{p\,(1 - p)}{N}} .

    For the mean of numbers between 0 and 1, it is an upper bound.

    Args:
        share: The share s, between 0 and 1.
        examples: Their number N.

    Example:
        >>> round(share_error(0.5, 100), 3), round(share_error(1.0, 24), 3)
        (0.05, 0.029)
    """
    centred = _towards_half(share, examples)
    return math.sqrt(centred * (1 - centred) / examples)


def change_error(before: float, after: float, examples: int) -> float:
    r"""Return the largest standard error that the change of a share may have, measured twice on the same examples.

    At most :math:`q = \min(p + p', 2 - p - p')` of the examples change their answer, with the shares of
    :func:`share_error`, so

    .. math:: SE \le \sqrt{\frac{q - (p' - p)^2}{N}} .

    Args:
        before: The share before.
        after: The share after.
        examples: Their number N.

    Example:
        >>> round(change_error(0.5, 0.5, 100), 3), round(change_error(1.0, 1.0, 24), 3)
        (0.1, 0.041)
    """
    first, last = _towards_half(before, examples), _towards_half(after, examples)
    return math.sqrt((min(first + last, 2 - first - last) - (last - first) ** 2) / examples)


def _towards_half(share: float, examples: int) -> float:
    return (examples * share + 0.5) / (examples + 1)
