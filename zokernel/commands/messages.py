"""What reaches the screen: zokernel's own log lines, once, and none of the remarks of the libraries below it."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from zokernel.secrets import hide_in_text

_logger = logging.getLogger("zokernel")
_flags: set[str] = set()  # of the command that runs

# An argument in Python's words, perturb='in_place', max_grad_norm=0.5 or outputs= alone, but not in what is quoted.
_ARGUMENT = re.compile(r"""("[^"]*")|(?<![^\s(])(\w+)=(?:'([^']*)'|([-+.\w]*\w))?(?=\.?[\s,:;)]|\.?$)""")


def is_replica() -> bool:
    """Return whether torchrun started this process beside another one on this machine, which speaks for both."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def set_up_messages(*, debug: bool) -> None:
    """Show the log of zokernel on standard error, as plain sentences.

    Args:
        debug: Show everything: details, and what the libraries say.
    """
    logging.basicConfig(handlers=[new_handler()])
    logging.getLogger().setLevel(logging.WARNING if debug else logging.ERROR)
    if not debug:
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # what torchao registers, and how
    _logger.setLevel(logging.DEBUG if debug else logging.ERROR if is_replica() else logging.INFO)
    if not (debug or sys.warnoptions):
        # What a library warns of is for its programmers; a warning of zokernel is a sentence for its user.
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("default", module=r"zokernel(\.|$)")
        warnings.formatwarning = lambda message, *rest, **more: format_message(f"{message}\n")


def new_handler() -> logging.Handler:
    """Return what writes log lines to standard error, without passwords and tokens."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_ForUsers("%(message)s"))
    return handler


class _ForUsers(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return the line as a user of the command line reads it."""
        return format_message(super().format(record))


def set_message_flags(flags: Iterable[str]) -> None:
    """Let messages name the flags of the command that runs, by their names without dashes."""
    _flags.clear()
    _flags.update(flags)


def format_message(text: str) -> str:
    """Return a message as a user of the command line reads it: with flags for arguments, and without secrets.

    The library speaks of arguments as Python has them.  Those that are no flags of the command stay as they are.

    Example:
        >>> set_message_flags(["perturb", "outputs", "do_predict"])
        >>> format_message("use perturb='in_place', or restrict outputs= to a few of params=.")
        'use --perturb in_place, or restrict --outputs to a few of params=.'
        >>> format_message('do_predict=True cannot be honoured here, nor is the row {"text": "so outputs= 1"}.')
        '--do_predict true cannot be honoured here, nor is the row {"text": "so outputs= 1"}.'
    """
    return hide_in_text(_ARGUMENT.sub(_as_flag, text))


def _as_flag(match: re.Match[str]) -> str:
    _, name, quoted, bare = match.groups()
    if name not in _flags:
        return match.group()
    if quoted is not None:
        return f"--{name} {shlex.quote(quoted)}"
    return f"--{name} {bare.lower() if bare in ('True', 'False') else bare}" if bare else f"--{name}"


@contextmanager
def each_line_once(*names: str) -> Iterator[None]:
    """Let a line of these loggers through once, whatever the numbers in it.

    Args:
        names: Names of loggers.
    """
    once = _EachOnce()
    for name in names:
        logging.getLogger(name).addFilter(once)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeFilter(once)


class _EachOnce(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether nothing like it has been said yet."""
        line = re.sub(r"[\d.]+ ?[KMG]?B?", "", record.getMessage())
        new = line not in self._seen
        self._seen.add(line)
        return new


def quiet_transformers() -> None:
    """Turn off the notices of transformers, and its bar of loading weights; the hub's bar of a download stays."""
    import huggingface_hub.utils
    import transformers

    shows_downloads = not huggingface_hub.utils.are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # the hub's bars, too
    if shows_downloads:
        huggingface_hub.utils.enable_progress_bars()
