"""Which files of the package an action goes through."""

from __future__ import annotations

import sys
from pathlib import Path

import zokernel

PACKAGE = Path(zokernel.__file__).parent


def files_of(action):
    """Return the files of the package whose functions run while ``action`` does."""
    files = set()

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            files.add(path.relative_to(PACKAGE).as_posix())

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return files
