"""Parts spelled as text, as the command line and journals have them: ``low_rank(2, refresh=5)``."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zokernel.errors import UsageError


def parse_call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Read ``name``, ``name(1, 2)`` or ``name(1, key=2)``.

    Arguments are literals, or names and calls, which stay text for whoever takes them.

    Returns:
        The name, positional and keyword arguments.

    Raises:
        UsageError: If the text is none of these.

    Example:
        >>> parse_call("low_rank(2, refresh=5)"), parse_call("blockwise(low_rank(2))")
        (('low_rank', [2], {'refresh': 5}), ('blockwise', ['low_rank(2)'], {}))
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, [], {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and all(k.arg for k in tree.keywords):
            keywords = {str(k.arg): _argument(k.value) for k in tree.keywords}
            return tree.func.id, [_argument(argument) for argument in tree.args], keywords
    except (SyntaxError, ValueError):
        pass
    raise UsageError(f"{text!r} is not of the form name or name(value, key=value).")


def _argument(node: ast.expr) -> Any:
    return ast.unparse(node) if isinstance(node, ast.Call | ast.Name) else ast.literal_eval(node)


def build(text: str, constructors: Mapping[str, Callable[..., Any]], kind: str) -> Any:
    """Make the part that ``text`` describes.

    Args:
        text: As for :func:`parse_call`.
        constructors: Constructors by name.
        kind: What the parts are, for messages.

    Raises:
        UsageError: If there is no such part, or it does not take these arguments.
    """
    name, arguments, keywords = parse_call(text)
    return make_part(name, arguments, keywords, constructors, kind)


def make_part(
    name: str,
    arguments: Sequence[Any],
    keywords: Mapping[str, Any],
    constructors: Mapping[str, Callable[..., Any]],
    kind: str,
) -> Any:
    """Make the part of a name, with the arguments that were read; see :func:`build`."""
    if name not in constructors:
        raise UsageError(f"There is no {kind} {name!r}: choose one of {', '.join(constructors)}.")
    try:
        return constructors[name](*arguments, **keywords)
    except TypeError as error:
        raise UsageError(f"The {kind} {name!r} cannot be made: {error}.") from error
