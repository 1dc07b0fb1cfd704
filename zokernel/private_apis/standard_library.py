"""Private APIs of the standard library."""

from __future__ import annotations

from typing import Any


def exit_at_once(code: int) -> None:
    """End the process without running what is left to run.

    Private: ``os._exit``.  It is documented in spite of its name: after Ctrl-C in the middle of an import, everything
    else would raise errors of half-loaded libraries.
    """
    import os

    os._exit(code)


def flags_of(parser: Any) -> list[Any]:
    """Return the flags of a parser of argparse.

    Private: ``ArgumentParser._actions``.  argparse lists them in no public way.
    """
    return list(parser._actions)
