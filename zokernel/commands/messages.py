"""What reaches the screen: zokernel's own log lines, once, and none of the remarks of the libraries below it."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from zokernel.secrets import hide_in_text

_logger = logging.getLogger("zokernel")


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
        warnings.formatwarning = lambda message, *rest, **more: hide_in_text(f"{message}\n")


def new_handler() -> logging.Handler:
    """Return what writes log lines to standard error, without passwords and tokens."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_WithoutSecrets("%(message)s"))
    return handler


class _WithoutSecrets(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return the line without passwords and tokens."""
        return hide_in_text(super().format(record))


@contextmanager
def each_line_once(*names: str) -> Iterator[None]:
    """Let a line of these loggers through once, whatever the numbers in it.

    Args:
        names: Names of loggers.
    """
    said = _EachOnce()
    for name in names:
        logging.getLogger(name).addFilter(said)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeFilter(said)


class _EachOnce(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether nothing like it has been said yet."""
        said = re.sub(r"[\d.]+ ?[KMG]?B?", "", record.getMessage())
        new = said not in self._said
        self._said.add(said)
        return new


def quiet_transformers() -> None:
    """Turn off the notices of transformers, and its bar of loading weights; the hub's bar of a download stays."""
    import huggingface_hub.utils
    import transformers

    shown = not huggingface_hub.utils.are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # the hub's bars, too
    if shown:
        huggingface_hub.utils.enable_progress_bars()
