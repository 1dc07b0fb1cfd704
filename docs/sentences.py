"""One sentence per line: the rule for the sources of this site, so that a change shows which sentence it changed."""

from __future__ import annotations

import re
from collections.abc import Iterator

# What ends in a full stop and ends no sentence.
ABBREVIATIONS = ("e.g.", "i.e.", "et al.", "cf.", "vs.", "Fig.", "Eq.", "Sec.", "No.", "Phil.", "Trans.", "...")
_END = re.compile(r"[.!?][\"')*\]]* +(?=[A-Z`\"'*\[(])")
_LITERAL = re.compile(r"(`+|\$)(.+?)\1|(?<=\]\()([^)]*)(?=\))")
_LEAD = re.compile(r"(?:[-*]|\d+\.)? *\*\*[^*]+\*\* +")
_LIST = re.compile(r" *(?:[-*]|\d+\.) +")


def split(text: str) -> list[str]:
    """Return the sentences of a paragraph; words in bold at its start belong to the first.

    Example:
        >>> split("**Rate.** Use `a. B`, e.g. by Li et al. It works. So what?")
        ['**Rate.** Use `a. B`, e.g. by Li et al. It works.', 'So what?']
    """
    hidden = _LITERAL.sub(lambda match: re.sub(r"[^`$]", "x", match.group()), text)
    lead = _LEAD.match(hidden)
    ends = [
        match.end()
        for match in _END.finditer(hidden, lead.end() if lead else 0)
        if not hidden[: match.start() + 1].endswith(ABBREVIATIONS)
    ]
    return [text[start:end].rstrip() for start, end in zip([0, *ends], [*ends, len(text)])]


def item(text: str) -> str:
    r"""Return an item of a list, one sentence per line.

    Example:
        >>> item("One. Two.")
        '- One.\n  Two.'
    """
    return "- " + "\n  ".join(split(text))


def prose(page: str) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a page that are neither code, formula, table, heading, picture nor HTML."""
    fence = ""
    for number, line in enumerate(page.splitlines(), 1):
        mark = re.match(r" *(`{3,}|\$\$)", line)
        if mark and not fence:
            fence = "" if mark[1] == "$$" and line.count("$$") > 1 else mark[1]
        elif fence:
            fence = "" if fence in line else fence
        elif line.strip() and not line.startswith(("|", "#", "![", "<", "    ", "!!!")):
            yield number, line


def faults(page: str) -> list[str]:
    r"""Return where a line holds more than one sentence, or a sentence goes on in the next line.

    Example:
        >>> faults("One. Two.\n\nThree\nis long.\n")
        ['line 1: One. Two.', 'line 4: is long.']
    """
    lines, last = [], (0, "")
    for number, line in prose(page):
        open_before = number == last[0] + 1 and not re.search(r"[.!?:][\"')*`\]]*$", last[1])
        if len(split(_LIST.sub("", line, count=1))) > 1 or (open_before and not _LIST.match(line)):
            lines.append(f"line {number}: {line}")
        last = (number, line)
    return lines
