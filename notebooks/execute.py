"""Run notebooks from top to bottom and write what they print and draw into them.

python notebooks/execute.py                              # all of them
python notebooks/execute.py notebooks/rewards.ipynb      # one
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient


def executed(
    path: Path,
    folder: Path,
    settings: dict[str, Any] | None = None,
    then: str = "",
    kernel: AsyncKernelManager | None = None,
) -> nbformat.NotebookNode:
    """Return a notebook with its outputs.

    Args:
        path: The notebook.
        folder: Where it runs and leaves its files.
        settings: New values of variables of the cell tagged ``parameters``.
        then: Code of one more cell, run last.
        kernel: Where it runs, and is left running; a new one when not given.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    if settings:
        (place,) = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
        lines = [f"{name} = {value!r}" for name, value in settings.items()]
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    if then:
        notebook.cells.append(nbformat.v4.new_code_cell(then))
    NotebookClient(
        notebook, km=kernel, timeout=None, coalesce_streams=True, resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def without_noise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the notebook without warnings, times, and lines that name the home folder of this machine."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "text" in output:
                    lines = output.text.splitlines(keepends=True)
                    output.text = "".join(line for line in lines if str(Path.home()) not in line)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(Path(__file__).parent.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(without_noise(executed(path, Path(folder))), path)
        print(f"{path} ran.")
