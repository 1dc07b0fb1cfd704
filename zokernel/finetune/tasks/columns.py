"""Columns that were meant: a name that is not in a table may be one of its own, written in another way."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def close_column(name: str, columns: Iterable[object]) -> str | None:
    """Return the column that a name was probably meant for: one of the same letters and digits, or of similar ones.

    Args:
        name: A name that was asked for.
        columns: The names there are.

    Example:
        >>> close_column("sentiment", ["id", "Sentiment: final?"]), close_column("LABEL", ["text", "Label"])
        ('Sentiment: final?', 'Label')
        >>> close_column("label", ["review", "stars"]) is None
        True
    """
    by_letters: dict[str, str] = {}
    for column in map(str, columns):
        by_letters.setdefault(_letters(column), column)
    close = difflib.get_close_matches(_letters(name), by_letters, n=1)
    return by_letters[close[0]] if close else None


def _letters(name: str) -> str:
    """Return the letters and digits of a name in lower case, or all of a name without any."""
    return "".join(sign for sign in name.casefold() if sign.isalnum()) or name
