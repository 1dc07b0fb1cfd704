"""What the library, its documents, examples and benchmarks refer to exists: files, links, names, papers."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("zokernel", "docs", "benchmarks", "examples")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]

# A file of the repository by its path, or a folder with a slash behind it.
FILE = re.compile(
    r"(?<![\w./{}-])(?:zokernel|docs|tests|benchmarks|examples)/[\w./-]*?"
    r"(?:\.(?:py|md|ya?ml|sh|jsonl?|html|css|png)\b|/(?![\w{<*]))"
)
BARE_FILE = re.compile(r"`((?:\w+/)*\w+\.py)`")
# Files that a reader is told to write.
OF_THE_READER = {"nets.py", "train.py", "models.py"}
MODULE = re.compile(r"`(zokernel(?:\.\w+)+)(?:\(\))?`")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")
LINK = re.compile(r"(?<!!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
LABEL = re.compile(
    r"(?<![\w.])(?:(?:theory|methods?|errata|erratum)\s+[A-D0-9]\.\d+(?:\.\d+)*|[A-D]\.\d+\.\d+)(?![\w.]*\w)"
)
LINKED_LABEL = re.compile(r"\[[^\[\]]*\]\([^()\s]+\)")
OF_A_PAPER = re.compile(r"(?:appendix|appendices|section|sections|figure|table)\s+$", re.IGNORECASE)
LINE_NUMBER = re.compile(r"\b\w+\.py:\d+")
OUTSIDE = re.compile(r"(?<![\w/.-])reference/\w+")
ARXIV = re.compile(r"(?<![\d.])\d{2}(?:0[1-9]|1[0-2])\.\d{5}(?:v\d+)?(?![\d.]*\d)")
TITLE = re.compile(r"\((?:19|20)\d\d\), ((?:(?!arXiv|\((?:19|20)\d\d\))[^;\[]){3,200}?), \[?arXiv:(\d{4}\.\d{5})")
CITATION = re.compile(r"arXiv:\d{4}\.\d{5}|\b[A-Z][\w-]+(?: et al\.| and [A-Z][\w-]+)?,? \(?(?:19|20)\d\d\b")


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield where each line is, and the line."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        yield f"{path.relative_to(ROOT)}, line {number}", line


def all_lines() -> Iterator[tuple[str, str]]:
    return itertools.chain.from_iterable(map(lines_of, [*SOURCES, *PAGES]))


@cache
def repository_files() -> set[str]:
    folders = [ROOT / "tests", *(ROOT / folder for folder in FOLDERS)]
    return {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.rglob("*") if path.is_file()}


def missing_files() -> list[str]:
    missing = []
    for place, line in all_lines():
        missing += [f"{place}: {name}" for name in FILE.findall(line) if not (ROOT / name).exists()]
        for name in BARE_FILE.findall(line):
            exists = any(f"/{path}".endswith(f"/{name}") for path in repository_files())
            if not exists and name not in OF_THE_READER and not FILE.match(name):
                missing.append(f"{place}: {name}")
    return missing


def slugify(heading: str) -> str:
    """Return what Markdown's table of contents makes of a heading."""
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


@cache
def anchors_of(page: Path) -> set[str]:
    """Anchors of a page as the site gives them: headings, explicit ids, and objects of the API."""
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    anchors = set(re.findall(r"(?:\bid=\"|\{:? ?#)([\w-]+)", text))
    for heading in re.findall(r"^#+ +(.*?) *(?:\{[^}]*\})?$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", lambda match: match.group(1) or "", heading)
        slug = base = slugify(plain)
        for count in itertools.count(1):
            if slug not in anchors:
                break
            slug = f"{base}_{count}"
        anchors.add(slug)
    for name in re.findall(r"^::: (\S+)", text, re.MULTILINE):
        anchors.add(name)
        target = absolute(name)
        anchors |= {f"{name}.{member}" for member in dir(target)}
    return anchors


def broken_links() -> list[str]:
    broken = []
    for page in PAGES:
        fenced = False
        for place, line in lines_of(page):
            fenced ^= line.lstrip().startswith("```")
            for link in [] if fenced else LINK.findall(re.sub(r"`[^`]*`", "", line)):
                if re.match(r"[a-z]+:", link):
                    continue
                name, _, anchor = link.partition("#")
                target = (page.parent / name).resolve() if name else page
                if target.parent == ROOT / "docs" and not target.exists():  # pages of the site that lie in the root
                    target = ROOT / f"{target.stem.upper()}.md"
                if not target.exists():
                    broken.append(f"{place}: {link}")
                elif anchor and target.suffix == ".md" and anchor not in anchors_of(target):
                    broken.append(f"{place}: {link} (no such heading)")
    return broken


def dangling_labels() -> list[str]:
    """Return labels of documents that are not here, and line numbers, which are wrong after the next change.

    The page of the theory has labels of its own; other pages link to it.
    """
    dangling = []
    for place, line in all_lines():
        text = LINKED_LABEL.sub("", line)
        if not place.startswith("docs/theory.md"):
            dangling += [
                f"{place}: {match.group()}"
                for match in LABEL.finditer(text)
                if not OF_A_PAPER.search(text[: match.start()])
            ]
        dangling += [f"{place}: {name}" for name in (*LINE_NUMBER.findall(text), *OUTSIDE.findall(text))]
    return dangling


def bare_arxiv_numbers() -> list[str]:
    return [
        f"{where}: {match.group()}"
        for where, line in all_lines()
        for match in ARXIV.finditer(line)
        if not line[: match.start()].endswith(("arXiv:", "arxiv.org/abs/", "arxiv.org/pdf/"))
    ]


def methods_without_source() -> list[str]:
    """Return modules of published methods, estimators and kernels that name no paper."""
    published = (ROOT / "zokernel/optim/published").glob("*.py")
    estimators = [path for path in (ROOT / "zokernel/estimators").glob("*.py") if "(Estimator)" in path.read_text()]
    kernels = (ROOT / "zokernel/kernels").glob("*_kernel.py")
    paths = sorted(path for path in (*published, *estimators, *kernels) if path.name != "__init__.py")
    assert len(paths) > 15
    return [str(path.relative_to(ROOT)) for path in paths if not CITATION.search(path.read_text(encoding="utf-8"))]


def papers_of_several_titles() -> list[str]:
    """Return papers that are cited with different titles; a part of a title, or its acronym, is none of its own."""
    titles: dict[str, dict[str, str]] = {}
    for path in [*SOURCES, *PAGES]:
        text = " ".join(path.read_text(encoding="utf-8").split())
        for title, paper in TITLE.findall(text):
            titles.setdefault(paper, {})[title.strip("*").casefold()] = str(path.relative_to(ROOT))
    assert len(titles) > 15
    return [
        f"arXiv:{paper}: {title!r} in {of_title[title]}, {longest!r} in {of_title[longest]}"
        for paper, of_title in sorted(titles.items())
        for longest in [max(of_title, key=len)]
        for title in of_title
        if title not in longest
    ]


@cache
def absolute(name: str) -> Any:
    """Import the object of a dotted name; None if there is none."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:size]))
        except ImportError:
            continue
        return chain(module, parts[size:])
    return None


def chain(start: Any, names: list[str]) -> Any:
    for name in names:
        if isinstance(start, type) and not hasattr(start, name):
            return start if has_field(start, name) else None
        start = getattr(start, name, None)
        if start is None:
            return None
    return start


source_of = cache(inspect.getsource)


def has_field(kind: type, name: str) -> bool:
    """Whether instances have an attribute: one that is annotated, or set by a method."""
    for base in kind.__mro__:
        if name in inspect.get_annotations(base):
            return True
        is_own = base.__module__.startswith("zokernel.")
        if is_own and re.search(rf"\bself\.{name}\b(?:: [^=]+)? =", source_of(base)):
            return True
    return False


def resolves(name: str, module: Any) -> bool:
    """Whether a role's name is an object of its module, of a class of it, or of any module that can be imported."""
    name = name.strip().removesuffix("()")
    if "<" in name:
        name = name[name.index("<") + 1 :].rstrip(">").lstrip("~")
    parts = name.split(".")
    if module is not None and chain(module, parts) is not None:
        return True
    classes = [value for value in vars(module).values() if isinstance(value, type)] if module is not None else []
    return any(chain(kind, parts) is not None for kind in classes) or absolute(name) is not None


def module_of(path: Path) -> Any:
    if path.suffix != ".py" or not path.is_relative_to(ROOT / "zokernel"):
        return None
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__").removesuffix(".__main__")
    return importlib.import_module(name)


def unknown_names() -> list[str]:
    """Return roles, and dotted names of the package in code quotes, that name nothing."""
    unknown = []
    for path in [*SOURCES, *PAGES]:
        text = path.read_text(encoding="utf-8")
        used = [*ROLE.finditer(text), *MODULE.finditer(text)]
        module = module_of(path) if used else None
        for match in used:
            name, line = " ".join(match.group(1).split()), text.count("\n", 0, match.start()) + 1
            of_script = re.search(rf"^(?:(?:def|class) {name}\b|{name}\b[^\n=]* = )", text, re.MULTILINE)
            if not of_script and not resolves(name, module):
                unknown.append(f"{path.relative_to(ROOT)}, line {line}: {name}")
    return unknown


CHECKS = [
    missing_files,
    broken_links,
    dangling_labels,
    bare_arxiv_numbers,
    methods_without_source,
    papers_of_several_titles,
    unknown_names,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_references(check):
    assert check() == []
