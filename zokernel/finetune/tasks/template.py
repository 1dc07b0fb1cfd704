"""Templates: text with columns of a table in braces, and a few published ways of fitting a column into a sentence."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.secrets import hide_in_text

logger = logging.getLogger(__name__)

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


# A doubled brace is a brace; between single ones stands a column's name, of any characters but braces.
_PART = re.compile(r"(?P<double>\{\{|\}\})|\{(?P<name>[^{}]*)\}|(?P<text>[^{}]+)|(?P<stray>.)", re.DOTALL)


def _parts(template: str) -> Iterator[tuple[str, str | None, str]]:
    """Yield the template's pieces as (literal text, column or ``None``, wording)."""
    for match in _PART.finditer(template):
        if match["stray"]:
            raise UsageError(
                f"The template {template!r} is malformed (a single {match['stray']!r}): write columns as {{name}}, and "
                "a brace of the text twice."
            )
        if match["name"] is None:
            yield match["text"] or match["double"][0], None, ""
            continue
        name, colon, wording = match["name"].rpartition(":")
        if not colon or (wording not in WORDINGS and not wording.isidentifier()):
            name, wording = match["name"], ""
        yield "", name, wording


def parse(template: str) -> tuple[str, ...]:
    """Return the columns that a template names, each once, in order; ``{mask}`` is not one of them.

    Args:
        template: Text such as ``{sentence} It was``; a column may have any name: ``{Review Text}``.
            ``{column:wording}`` changes the column's text: ``lower`` (all letters), ``decap`` (the first letter, unless
            the word is I), ``open`` (no final punctuation), ``question`` (capitalised, ending in a question mark).  A
            column that is itself called ``a:b`` is written ``{a:b:}``.

    Returns:
        Names of columns.

    Raises:
        UsageError: If the template is malformed, names no column or an unknown wording.

    Example:
        >>> parse("{sentence1:open}? {mask}, {sentence2:decap}"), parse("{Review Text} It was")
        (('sentence1', 'sentence2'), ('Review Text',))
    """
    refuse_broken(template, "The template")
    fields = [(name, wording) for _, name, wording in _parts(template) if name is not None]
    columns = [name for name, _ in fields if name != MASK]
    if not columns or not all(name.strip() for name in columns):
        raise UsageError(f"The template {template!r} must name columns in braces, such as '{{sentence}} It was'.")
    for name, wording in fields:
        if wording not in WORDINGS:
            choices = ", ".join(filter(None, WORDINGS))
            raise UsageError(
                f"The template has {{{name}:{wording}}}, but {wording!r} is not a wording: choose one of {choices}, or "
                f"write {{{name}:{wording}:}} if the column is called that."
            )
    if sum(name == MASK for name, _ in fields) > 1:
        raise UsageError(f"The template {template!r} has more than one {{mask}}: one place is scored.")
    return tuple(dict.fromkeys(columns))


def refuse_broken(text: str, what: str) -> None:
    """Refuse text that no encoding takes: a command line whose bytes were not UTF-8.

    Raises:
        UsageError: If there are halves of surrogate pairs in it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} {text!r} is not valid UTF-8 text: type it again in a UTF-8 terminal.") from error


def literals(template: str) -> str:
    """Return the template's own text, without its columns.

    Example:
        >>> literals("{{{premise:open}}} so")
        '{} so'
    """
    return "".join(text for text, _, _ in _parts(template))


def fill(template: str, row: Row) -> str:
    """Return the template with the columns of ``row``, stripped and worded; ``row`` supplies ``mask`` too if used.

    Raises:
        UsageError: If a column holds nothing (``None``).

    Example:
        >>> fill("{premise:open} so", {"premise": "It rained. "})
        'It rained so'
    """
    parts = []
    for text, name, wording in _parts(template):
        parts.append(text)
        if name is None:
            continue
        if row[name] is None:
            raise UsageError(f"Column {name!r} holds no text in the row {dict(row)!r:.200}: leave the row out.")
        parts.append(WORDINGS[wording](str(row[name]).strip()))
    return "".join(parts)


def without_secrets(text: str, what: str) -> str:
    """Return a template in which no access token or password stands, since templates are saved with what is trained.

    Args:
        text: The template; its columns stay.
        what: What it is called in the log.

    Returns:
        The template that is trained with, and saved.

    Example:
        >>> without_secrets("https://me:secret@host {sentence} It was", "template")
        'https://<login>@host {sentence} It was'
    """
    hidden = "".join(map(hide_in_text, re.split(r"(\{[^{}]*\})", text)))
    if hidden != text:
        logger.warning(
            "The %s holds an access token or a password: it is replaced by a placeholder in training and in every "
            "file.",
            what,
        )
    return hidden


def column_in_braces(name: str) -> str:
    """Return how a template writes a column.

    Example:
        >>> column_in_braces("Review Text"), column_in_braces("dc:title")
        ('{Review Text}', '{dc:title:}')
    """
    return f"{{{name}:}}" if ":" in name else f"{{{name}}}"
