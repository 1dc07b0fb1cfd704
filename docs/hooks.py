"""Formulas of the documentation become MathML when the site is built, so that pages need no script."""

from __future__ import annotations

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)
logger = logging.getLogger("mkdocs.hooks")


def on_page_content(text: str, *, page: Any, **_: Any) -> str:
    """Convert every formula of a page; one that cannot be converted is a warning, and so an error of a strict build."""

    def replace(match: re.Match[str]) -> str:
        formula = html.unescape(match.group(2) or match.group(3)).strip()
        try:
            drawn = convert(formula, display="inline" if match.group(2) else "block")
        except Exception as error:  # the converter raises its own and built-in errors
            logger.warning("%s: the formula %r cannot be converted: %s", page.file.src_path, formula, error)
            return match.group(0)
        return drawn if match.group(2) else f'<span class="zk-block">{drawn}</span>'

    return _FORMULA.sub(replace, text)
