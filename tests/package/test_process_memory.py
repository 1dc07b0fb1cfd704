"""Memory that a process gives back: LLVM's code once loops are loaded, and the room that activations took."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest
import torch

from zokernel.finetune.models.memory import PeakMemory
from zokernel.process_memory import release_code, release_heap

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux only")


@linux
def test_llvms_code_does_not_stay_once_loops_are_loaded():
    code = """
import psutil, torch
from zokernel.directions import Dense
def resident(library):
    maps = psutil.Process().memory_maps(grouped=False)
    return sum(m.rss for m in maps if library in m.path and m.perms == "r-xp") / 2**20
weights = {"w": torch.zeros(1000)}
for law in ("rademacher", "gaussian"):  # two loops: LLVM is run again after its pages are gone
    Dense(law).add_(weights, 1.0, seed=0, step=0, index=0)
print(resident("libllvmlite"), resident("libtorch_cpu"), int(weights["w"].count_nonzero()))
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    llvm, torchs, total = map(float, finished.stdout.split())
    assert llvm < 1 < torchs  # MiB: about 50 otherwise; other libraries keep theirs
    assert total == 1000


def test_released_code_can_be_run():
    released = release_code("libtorch_cpu")
    assert (released > 0) == (sys.platform == "linux")
    assert torch.ones(5).cumsum(0)[-1] == 5


@linux
def test_freed_memory_goes_back():
    blocks = [torch.ones(1 << 14) for _ in range(4000)]  # 64 KiB each, which the C library takes from its heap
    last = blocks[-1]
    before = psutil.Process().memory_info().rss
    del blocks
    assert release_heap()  # glibc's, for which torch is built
    assert psutil.Process().memory_info().rss < before - 200 * 2**20  # of 250 MiB
    assert last.sum() == 1 << 14


@linux
def test_a_peak_leaves_out_what_was_freed_before_its_block():
    """As loading and quantizing a model frees pieces of its heap, with the model's own above them."""
    blocks = [torch.ones(1 << 14) for _ in range(4000)]
    last = blocks[-1]
    before = psutil.Process().memory_info().rss
    del blocks
    with PeakMemory() as memory:
        block = torch.ones(1 << 23)  # 32 MiB
    assert memory.is_of_block
    assert memory.peak_bytes < before - 150 * 2**20  # 250 MiB less than before, and 32 more
    assert memory.peak_bytes > psutil.Process().memory_info().rss - 2**20
    assert last.sum() + block.sum() == (1 << 14) + (1 << 23)
