"""The exceptions that zokernel raises on purpose: one sentence saying what is wrong and what to do about it."""

from __future__ import annotations

import importlib.metadata
import re

from zokernel.secrets import hide_in_text

_PACKAGES = {"yaml": "pyyaml", "PIL": "pillow"}  # what a module's package is called where that differs


class ZokernelError(Exception):
    """Base class of every error that zokernel raises on purpose.

    The command line prints the message alone (no traceback unless ``--debug``) and exits with ``exit_code``.
    """

    exit_code = 1

    def __str__(self) -> str:
        """Return the message without the passwords and tokens that it repeats, such as those of an address."""
        return hide_in_text(super().__str__())


class UsageError(ZokernelError, ValueError):
    """The request itself is wrong: an unknown name, a missing file or column, an impossible setting (exit code 2)."""

    exit_code = 2


class RunError(ZokernelError, RuntimeError):
    """The request was fine but could not be carried out: a NaN loss, not enough memory, no network (exit code 1)."""


class LossError(RunError):
    """A loss came out NaN or infinite; the weights are those before the step."""


class MissingDependencyError(RunError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'zokernel[{extra}]'.")


def missing_extra(error: ModuleNotFoundError, purpose: str) -> MissingDependencyError | None:
    """Return the error that names the extra which brings a module, or None if no extra does.

    Args:
        error: What was raised by the import.
        purpose: What needs the module; the subject of the sentence.

    Example:
        >>> print(missing_extra(ModuleNotFoundError(name="peft.tuners"), "An adapter"))
        An adapter needs peft, which is not installed: pip install 'zokernel[finetune]'.
    """
    cause: BaseException | None = error
    while cause is not None and not getattr(cause, "name", None):  # transformers' own error has no name: its cause has
        cause = cause.__cause__
    module = (getattr(cause, "name", None) or "").partition(".")[0]
    package = _PACKAGES.get(module, module).replace("_", "-")
    extras: dict[str, set[str]] = {}
    for requirement in importlib.metadata.requires("zokernel") or ():
        match = re.match(r"([\w.-]+).*extra == ['\"](\w+)", requirement)
        if match:
            extras.setdefault(match.group(2), set()).add(match.group(1))
    candidates = [extra for extra, packages in extras.items() if package in packages]
    if not candidates:
        return None
    return MissingDependencyError(package, min(candidates, key=lambda extra: len(extras[extra])), purpose)


def first_line(error: BaseException) -> str:
    r"""Return what another library's error says, short enough to stand inside one sentence.

    Args:
        error: The error.

    Returns:
        The first line of its message, at most 240 characters of it; its type's name when it says nothing.

    Example:
        >>> first_line(OSError("no such model\nand a page of advice")), first_line(KeyError())
        ('no such model', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:240]
