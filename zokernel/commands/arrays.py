"""Arrays of NumPy's files, as commands read them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from zokernel.errors import UsageError, first_line


def read_array(path: Path) -> np.ndarray:
    """Return the array of a ``.npy`` file.

    Raises:
        UsageError: If it is no such file, or a damaged one.
    """
    return read_arrays(path, kind=".npy")[""]


def read_arrays(path: Path, *, kind: str = ".npz") -> dict[str, np.ndarray]:
    """Return the arrays of a ``.npz`` file by name; nothing is unpickled.

    Raises:
        UsageError: If it is no such file, or a damaged one.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            arrays = {"": loaded}
        else:
            with loaded:
                arrays = {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not a readable {kind} file of plain arrays: {first_line(error)}.") from error
    if ("" in arrays) != (kind == ".npy"):
        raise UsageError(f"{path} is not a {kind} file: save it with numpy.{'save' if kind == '.npy' else 'savez'}.")
    return arrays
