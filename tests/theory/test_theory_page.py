"""Docstrings refer to headings of the theory page that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = re.compile(r'docs/theory\.md,\s+("[^"]+"(?:,?(?:\s+and)?\s+"[^"]+")*)')


def test_headings_of_the_theory_page_exist():
    page = (ROOT / "docs/theory.md").read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    headings = {re.sub(r"^[A-D]\.3\.\d ", "", title) for title in titles}
    used = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in (ROOT / "zokernel").rglob("*.py")
        for match in REFERENCE.finditer(path.read_text(encoding="utf-8"))
        for name in re.findall(r'"([^"]+)"', match.group(1))
    }
    assert len(used) > 15
    assert sorted((where, name) for where, name in used if name not in headings) == []
