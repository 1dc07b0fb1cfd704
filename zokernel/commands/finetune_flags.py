"""The flags of ``zokernel finetune``, read from the sources of the classes that declare them.

Importing those classes takes seconds, and a mistyped flag is named without that.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from zokernel.commands.parser import unknown_flag_error

COMMANDS = ("finetune", "demo")
SOURCES = (
    ("transformers", "training_args.py"),
    ("zokernel", "finetune/settings/arguments.py"),
    ("zokernel", "finetune/settings/zo_arguments.py"),
    ("zokernel", "finetune/settings/config.py"),
)
OF_EVERY_COMMAND = ("help", "help_all", "config")


def refuse_unknown_flags(command: str, argv: Sequence[str]) -> None:
    """Refuse a flag that ``zokernel finetune`` does not have; do nothing if transformers is not installed.

    Args:
        command: ``finetune`` or ``demo``.
        argv: Arguments after it.

    Raises:
        UsageError: If there is one.

    Example:
        >>> refuse_unknown_flags("finetune", ["--lerning-rate", "1e-5"])
        Traceback (most recent call last):
        zokernel.errors.UsageError: There is no flag '--lerning-rate' (did you mean --learning_rate?).
    """
    names = declared_flags()
    accepted = {*names, *(f"no_{name}" for name in names), *OF_EVERY_COMMAND}
    flags = [word.partition("=")[0] for word in argv if word.startswith("--") and " " not in word]  # else a value
    spelled = {flag: flag[2:].replace("-", "_") for flag in flags}
    if not names or spelled.keys() & {"--", "--help"} or "help_all" in spelled.values():
        return
    for flag, name in spelled.items():
        if name not in accepted:
            raise unknown_flag_error(flag, names, f"zokernel {command}")


@cache
def declared_flags() -> tuple[str, ...]:
    """Return the names of the fields of the classes, in order; none if transformers is not installed."""
    return tuple(_declared_fields())


def _declared_fields() -> Iterator[str]:
    for package, file in SOURCES:
        spec = importlib.util.find_spec(package)  # imports nothing
        if spec is None or spec.origin is None:
            return
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
        lines = [line for node in tree.body if isinstance(node, ast.ClassDef) for line in node.body]
        for line in lines:
            if isinstance(line, ast.AnnAssign) and not ast.unparse(line.annotation).startswith("ClassVar"):
                yield ast.unparse(line.target)
