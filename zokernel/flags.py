"""Which flags a command line gives."""

from __future__ import annotations

from collections.abc import Iterable


def given_flags(words: Iterable[str]) -> list[str]:
    """Return the names of the flags that a command line gives, in its order.

    Args:
        words: The words of the command line, as :func:`shlex.split` returns them.

    Example:
        >>> given_flags(["zokernel", "journal", "show", "runs/mine", "--step=2", "--no-cache", "--damaged"])
        ['step', 'no_cache', 'damaged']
    """
    return [word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")]
