"""Pages of the methods: ``python docs/methods.py`` writes ``docs/methods`` from docstrings, defaults and methods.yaml.

Formula, options, defaults and references come from the code, so a page cannot say anything else than the class;
``methods.yaml`` adds when to use a method.  A test compares the pages with what this file would write.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from griffe_roles import to_markdown
from sentences import item, split

from zokernel.optim.options import SHARED_DEFAULTS, ZerothOrderOptions, constructor_options
from zokernel.optim.registry import methods

DOCS = Path(__file__).resolve().parent
PAGES = DOCS / "methods"
_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Example|Examples|References):\n", re.MULTILINE)
_ITEM = re.compile(r"^    \*{0,2}(\w+): ", re.MULTILINE)
_SAME = re.compile(re.escape("As for :class:`~zokernel.optim.MeZO`."))
WRITTEN = "<!-- Written by python docs/methods.py from the docstring and docs/methods.yaml. -->"


def sections(text: str) -> dict[str, str]:
    r"""Return the sections of a docstring by heading; what stands before the first one is ``""``.

    Example:
        >>> sections("One.\n\nArgs:\n    lr: Rate.\n\nReferences:\n    A book.")
        {'': 'One.', 'Args': '    lr: Rate.', 'References': '    A book.'}
    """
    parts = _SECTION.split(text)
    return {"": parts[0].strip()} | {name: body.rstrip() for name, body in zip(parts[1::2], parts[2::2])}


def items(body: str) -> dict[str, str]:
    r"""Return the entries of an ``Args`` section on one line each.

    Example:
        >>> items("    lr: Rate.\n    eps: Radius,\n        in units.")
        {'lr': 'Rate.', 'eps': 'Radius, in units.'}
    """
    parts = _ITEM.split(body)
    return {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2])}


def docstring(owner: Any) -> dict[str, str]:
    """Return the sections of an object's own docstring."""
    return sections(inspect.cleandoc(owner.__dict__.get("__doc__") or ""))


def meanings(cls: type) -> dict[str, str]:
    """Return what each option of a method means, from its docstring or that of the class it inherits from."""
    texts: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if owner.__module__.startswith("zokernel."):
            texts |= items(docstring(owner).get("Args", ""))
    mezo = items(docstring(methods()["mezo"])["Args"])
    return {name: mezo[name] if _SAME.fullmatch(text) else text for name, text in texts.items()}


def format_default(value: Any) -> str:
    """Return a default as it is typed.

    Example:
        >>> [format_default(value) for value in (1e-06, 0.001, 8, "none", True)]
        ['1e-6', '1e-3', '8', 'none', 'True']
    """
    if isinstance(value, float):
        short = f"{value:g}"
        if 0 < abs(value) < 0.01:
            short = re.sub(r"\.?0*e", "e", f"{value:.6e}")
        return re.sub(r"e-0?", "e-", short)
    return str(value)


def markdown(text: str) -> str:
    r"""Return a docstring's text as Markdown, one sentence a line.

    Example:
        >>> markdown("One ``x``,\nlong.  Two.")
        'One `x`, long.\nTwo.'
    """
    blocks = to_markdown(re.sub(r"``([^`]+)``", r"`\1`", text)).split("\n\n")
    prose = [block if "$$" in block else re.sub(r"(?<!  )\n(?!  )", " ", block) for block in blocks]
    return "\n\n".join(block if "$$" in block else _one_per_line(block) for block in prose)


def _one_per_line(block: str) -> str:
    text = re.sub(r"(?<=\S)  (?=\S)", " ", block)
    return "\n".join(sentence for line in text.splitlines() for sentence in split(line))


def cell(text: str) -> str:
    """Return text for a cell of a table."""
    return " ".join(markdown(text).split()).replace("|", "\\|")


def what_it_is(cls: type) -> str:
    """Return the first sentence of a docstring, for a table."""
    return cell(docstring(cls)[""].split("\n\n")[0].replace("\n", " "))


def summary(cls: type) -> str:
    """Return the first paragraph of a docstring."""
    return markdown(docstring(cls)[""].partition("\n\n")[0])


def defaults(cls: type) -> list[str]:
    """Return the table of a method's own options."""
    means = meanings(cls)
    options = {name: value for name, value in constructor_options(cls).items() if name not in SHARED_DEFAULTS}
    rows = [
        f"| `{name}` | `{format_default(value)}` | {cell(means.get(name, ''))} |" for name, value in options.items()
    ]
    return ["| option | default | meaning |", "|---|---|---|", *rows]


def formula(cls: type) -> str:
    """Return the definition: the docstring after its summary, and the module's where it has no formula of its own."""
    text = docstring(cls)[""]
    if ":math:" not in text and ".. math::" not in text:
        module = sections(inspect.cleandoc(sys.modules[cls.__module__].__doc__ or ""))[""]
        if ".. math::" in module:
            text += "\n\n" + module.partition("\n\n")[2]
    return markdown(text.partition("\n\n")[2]).replace("\n    ", "\n")


def references(cls: type) -> str:
    """Return the sources of a method, its base's where it has none of its own."""
    for owner in cls.__mro__:
        section = docstring(owner).get("References") if owner.__module__.startswith("zokernel.") else None
        if section:
            text = " ".join(section.split())
            return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    return ""


def page(name: str, entry: dict[str, Any]) -> str:
    """Return one page.

    Args:
        name: The page's name.
        entry: Its part of ``methods.yaml``.
    """
    classes = {method: methods()[method] for method in entry["methods"]}
    flags = ", ".join(f"`--method {method}`" for method in classes)
    lines = [f"# {entry['title']}", "", WRITTEN, "", *(summary(cls) for cls in classes.values()), ""]
    lines += [f"| on the command line | {flags} |", "|---|---|"]
    lines += [f"| in Python | {', '.join(f'`zk.optim.{cls.__name__}`' for cls in classes.values())} |"]
    lines += [f"| forwards per step | {entry['forwards']} |", f"| memory beyond the weights | {entry['state']} |", ""]
    for cls in classes.values():
        if formula(cls):
            lines += [f"## {'The formula' if len(classes) == 1 else cls.__name__}", "", formula(cls), ""]
    lines += ["## When to use it", "", *map(item, entry["when"]), ""]
    if "differs" in entry:
        lines += ["## What differs from the published code", "", *map(item, entry["differs"]), ""]
    for cls in classes.values():
        lines += [f"## Defaults{'' if len(classes) == 1 else f' of {cls.__name__}'}", "", *defaults(cls), ""]
    if name != "first_order":
        lines += ["Every method also has [these options](index.md#options-of-every-method).", ""]
    sources = list(dict.fromkeys(filter(None, map(references, classes.values()))))
    if sources:
        lines += ["## Reference", "", *map(item, sources), ""]
    return "\n".join(lines)


def index(entries: dict[str, Any]) -> str:
    """Return the page that lists all methods."""
    rows = []
    for name, entry in entries.items():
        for method in entry["methods"]:
            definition = what_it_is(methods()[method])
            rows.append(f"| [`{method}`]({name}.md) | {definition} | {entry['forwards']} | {entry['state']} |")
    shared = items(docstring(ZerothOrderOptions)["Attributes"])
    options = [f"| `{name}` | `{value}` | {cell(shared[name])} |" for name, value in SHARED_DEFAULTS.items()]
    return "\n".join(
        [
            "# Methods",
            "",
            WRITTEN,
            "",
            (PAGES / "choose.md.in").read_text(encoding="utf-8").strip(),
            "",
            "## All methods",
            "",
            "P is the number of directions per step.",
            "",
            "| `--method` | what it is | forwards per step | memory beyond the weights |",
            "|---|---|---|---|",
            *rows,
            "",
            "## Options of every method",
            "",
            "| option | default | meaning |",
            "|---|---|---|",
            *options,
            "",
        ]
    )


def pages() -> dict[Path, str]:
    """Return every page by path."""
    entries = yaml.safe_load((DOCS / "methods.yaml").read_text(encoding="utf-8"))
    texts = {PAGES / f"{name}.md": page(name, entry) for name, entry in entries.items()}
    return texts | {PAGES / "index.md": index(entries)}


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
