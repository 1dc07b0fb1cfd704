"""Docstrings use reStructuredText roles for mathematics and names; the site's Markdown has its own signs for them."""

from __future__ import annotations

import re
from typing import Any

import griffe

_MATH = re.compile(r":math:`([^`]*)`", re.DOTALL)
_ROLE = re.compile(r":(?:class|func|mod|meth|attr|data|exc):`~?([^`]*)`")
_EXAMPLE = re.compile(r"^([ \t]*)Example:[ \t]*$", re.MULTILINE)  # griffe takes only the plural for doctests
_BLOCK = re.compile(
    r"^([ \t]*)\.\. math::[ \t]*(.*?)(?=\n[ \t]*\n(?!\1[ \t]+\S)|\n(?!\1[ \t]|\n)|\Z)", re.DOTALL | re.MULTILINE
)


def to_markdown(text: str) -> str:
    """Return a docstring with ``$...$`` for formulas and code for names.

    Example:
        >>> to_markdown("The kernel :math:`K` of :func:`~zokernel.kernels.entk`.")
        'The kernel $K$ of `zokernel.kernels.entk`.'
    """
    text = _BLOCK.sub(lambda m: f"{m.group(1)}$$\n{m.group(1)}{' '.join(m.group(2).split())}\n{m.group(1)}$$", text)
    text = _MATH.sub(lambda m: f"${' '.join(m.group(1).split())}$", text)
    return _EXAMPLE.sub(r"\1Examples:", _ROLE.sub(r"`\1`", text))


class Roles(griffe.Extension):
    """Rewrites every docstring that griffe loads."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
