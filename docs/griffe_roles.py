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
_RULE = r"=+(?: +=+)+"
_TABLE = re.compile(rf"^([ \t]*)({_RULE})\n((?:[ \t]*\S.*\n)+?)\1{_RULE}[ \t]*$(?!\n[ \t]*\S)", re.MULTILINE)


def table(match: re.Match[str]) -> str:
    """Return a simple table of reStructuredText as one of Markdown; a line without a first cell continues its row."""
    indent, rule, body = match.groups()
    starts = [found.start() for found in re.finditer("=+", rule)]
    rows: list[list[str]] = []
    head: list[list[str]] = []
    for line in body.splitlines():
        line = line.removeprefix(indent)
        if re.fullmatch(rf"{_RULE}\s*", line):
            head, rows = rows, []
            continue
        cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None])]
        if cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells)]
    top = head[0] if head else [""] * len(starts)
    lines = [top, ["---"] * len(starts), *rows]
    return "\n".join(f"{indent}| {' | '.join(_pipes(cell) for cell in cells)} |" for cells in lines)


def _pipes(cell: str) -> str:
    """Return a cell without bars, which would end it: formulas have commands for them."""

    def bars(found: re.Match[str]) -> str:
        return found.group(0).replace(r"\|", r"\Vert ").replace("|", r"\vert ")

    return re.sub(r"(?<!\\)\|", r"\|", _MATH.sub(bars, cell))


def to_markdown(text: str) -> str:
    r"""Return a docstring with ``$...$`` for formulas and code for names.

    Example:
        >>> to_markdown("The kernel :math:`K` of :func:`~zokernel.kernels.entk`.")
        'The kernel $K$ of `zokernel.kernels.entk`.'
        >>> lines = "====  =======", "name  value", "====  =======", "one   :math:`|x|`", "      too", "====  ======="
        >>> print(to_markdown("\n".join(lines)))
        | name | value |
        | --- | --- |
        | one | $\vert x\vert$ too |
    """
    text = _TABLE.sub(table, text)
    text = _BLOCK.sub(lambda m: f"{m.group(1)}$$\n{m.group(1)}{' '.join(m.group(2).split())}\n{m.group(1)}$$", text)
    text = _MATH.sub(lambda m: f"${' '.join(m.group(1).split())}$", text)
    return _EXAMPLE.sub(r"\1Examples:", _ROLE.sub(r"`\1`", text))


class Roles(griffe.Extension):
    """Rewrites every docstring that griffe loads."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
