"""Columns that were meant: a name that is not in a table may be one of its own, written in another way."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CUTOFF = 0.8  # of difflib; at its own 0.6, ``text`` is close to ``context`` and ``label`` to ``table``


def close_column(name: str, columns: Iterable[object]) -> str | None:
    """Return the column that a name was probably meant for: of the same letters, of the same beginning, or alike.

    Args:
        name: A name that was asked for.
        columns: The names there are.

    Example:
        >>> close_column("sentiment", ["id", "Sentiment: final?"]), close_column("LABEL", ["text", "Label"])
        ('Sentiment: final?', 'Label')
        >>> columns = ["context", "table", "sentence1", "sentence2"]
        >>> [close_column(name, columns) for name in ("text", "label", "sentence")]
        [None, None, 'sentence1']
    """
    by_letters: dict[str, str] = {}
    for column in map(str, columns):
        by_letters.setdefault(_letters(column), column)
    letters = _letters(name)
    if letters in by_letters:
        return by_letters[letters]
    close = [other for other in by_letters if other.startswith(letters) or letters.startswith(other)]
    close += difflib.get_close_matches(letters, by_letters, n=1, cutoff=CUTOFF)
    return by_letters[close[0]] if close else None


def _letters(name: str) -> str:
    """Return the letters and digits of a name in lower case, or all of a name without any."""
    return "".join(sign for sign in name.casefold() if sign.isalnum()) or name
