"""The memory estimated beforehand is what runs take, within a factor: weights, copies and activations."""

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


def test_runs_take_the_estimated_memory(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    run = subprocess.run(
        [sys.executable, str(tests / "memory_peaks.py"), str(tmp_path)],
        env=os.environ | RETURNED | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    peaks = json.loads(run.stdout[run.stdout.index("{") :])
    assert len(peaks) == 5
    for flags, peak in peaks.items():
        assert 1 / FACTOR < peak["ratio"] < FACTOR, (flags, peak)
