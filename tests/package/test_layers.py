"""No two files import each other, not even in a circle of many, for types or inside functions.

The layers themselves, and circles between packages, are contracts in ``pyproject.toml``, checked by ``make lint``.
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import pytest

grimp = pytest.importorskip("grimp")


def test_no_file_imports_itself_in_a_circle():
    graph = grimp.build_graph("zokernel", cache_dir=None)  # imports for types and inside functions count
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        pytest.fail(f"circular imports: {circle}")
