"""On CI a skipped test fails the run, unless there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("reason", "ci", "processes", "code"),
    [
        ("there is no GPU", "true", "0", 0),
        ("no Chromium", "true", "0", 1),
        ("no Chromium", "true", "2", 1),
        ("no Chromium", "", "0", 0),
    ],
)
def test_a_skipped_test_fails_on_ci(tmp_path, reason, ci, processes, code):
    test = f"import pytest\ndef test_one():\n    pass\ndef test_two():\n    pytest.skip({reason!r})\n"
    (tmp_path / "test_it.py").write_text(test)
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "skips",
            "-n",
            processes,
            "--rootdir",
            tmp_path,
            tmp_path,
        ],
        env={**os.environ, "CI": ci, "PYTEST_ADDOPTS": "", "PYTHONPATH": str(TESTS)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == code, finished.stdout + finished.stderr
    assert ("but skipped test_it.py::test_two" in finished.stdout) == bool(code)
