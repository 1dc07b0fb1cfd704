"""Templates: text with columns of a table in braces, and a few published ways of fitting a column into a sentence."""

from __future__ import annotations

import string
from collections.abc import Callable

from zokernel.data.tables import Row
from zokernel.errors import UsageError

MASK = "mask"


def _lower_first(text: str) -> str:
    first = text.split(" ", 1)[0].split("'")[0]
    return text if first == "I" else text[:1].lower() + text[1:]


def _open_ended(text: str) -> str:
    return text[:-1].rstrip() if text[-1:] in ".!?;:," else text


def _as_question(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith("?") else "?")


WORDINGS: dict[str, Callable[[str], str]] = {
    "": lambda text: text,
    "lower": str.lower,
    "decap": _lower_first,
    "open": _open_ended,
    "question": _as_question,
}


def parse(template: str) -> tuple[str, ...]:
    """Return the columns that a template names, each once, in order; ``{mask}`` is not one of them.

    Args:
        template: Text such as ``{sentence} It was``.  ``{column:wording}`` changes the column's text: ``lower`` (all
            letters), ``decap`` (the first letter, unless the word is I), ``open`` (no final punctuation), ``question``
            (capitalised, ending in a question mark).

    Returns:
        Names of columns.

    Raises:
        UsageError: If the template is malformed, names no column or an unknown wording.

    Example:
        >>> parse("{sentence1:open}? {mask}, {sentence2:decap}")
        ('sentence1', 'sentence2')
    """
    try:
        fields = [(name, spec) for _, name, spec, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UsageError(f"The template {template!r} is malformed ({error}): write columns as {{name}}.") from error
    columns = [name for name, _ in fields if name != MASK]
    if not columns or not all(name.isidentifier() for name in columns):
        raise UsageError(f"The template {template!r} must name columns in braces, such as '{{sentence}} It was'.")
    for name, spec in fields:
        if spec and spec not in WORDINGS:
            known = ", ".join(filter(None, WORDINGS))
            raise UsageError(f"The template has {{{name}:{spec}}}, but {spec!r} is no wording: choose one of {known}.")
    if sum(name == MASK for name, _ in fields) > 1:
        raise UsageError(f"The template {template!r} has more than one {{mask}}: one place is scored.")
    return tuple(dict.fromkeys(columns))


def fill(template: str, row: Row) -> str:
    """Return the template with the columns of ``row``, stripped and worded; ``row`` supplies ``mask`` too if used.

    Example:
        >>> fill("{premise:open} so", {"premise": "It rained. "})
        'It rained so'
    """
    parts = []
    for literal, name, spec, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            parts.append(WORDINGS[spec or ""](str(row[name]).strip()))
    return "".join(parts)
