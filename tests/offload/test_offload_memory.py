"""Memory of streamed runs, by the kernel's own count: pages of files apart, it does not grow with the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux counts memory without files apart"
)


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    script = Path(__file__).with_name("streamed_peaks.py")
    process = subprocess.run(
        [sys.executable, script, tmp_path_factory.mktemp("peaks")], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("trained", ["adapter", "weights"])
def test_memory_does_not_grow_with_the_weights(peaks: dict[str, list[int]], trained: str) -> None:
    shallow, deep = peaks["weights"]
    assert deep - shallow > 220 << 20
    small, large = peaks["peaks of " + trained]
    # 25 MB on two cores: fifteen more layers of an adapter with its copies for the losses, and settings of the blocks.
    assert large - small < (deep - shallow) / 5
