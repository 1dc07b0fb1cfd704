"""What is said of the memory beforehand is what runs take, within a factor: weights, copies and activations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FACTOR = 2
# Freed room goes back at once: what a heap keeps of it varies from run to run by more than an adapter's run holds.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux counts memory by kind")


def test_runs_take_the_memory_that_was_said(tmp_path: Path) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    run = subprocess.run(
        [sys.executable, str(here / "memory_peaks.py"), str(tmp_path)],
        env=os.environ | RETURNED | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout[run.stdout.index("{") :])
    assert len(found) == 5
    for flags, told in found.items():
        assert 1 / FACTOR < told["ratio"] < FACTOR, (flags, told)
