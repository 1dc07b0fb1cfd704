"""What the heaps of threads keep while weights are streamed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from test_streamed_forward import FAMILIES, closure, save, streamed, train, with_lora
from torch import Tensor

from zokernel.offload import StreamedForward, streamed_blocks
from zokernel.process_memory import memory_count, release_heap


def in_a_process(measure: Callable[[Path, Any], None], folder: Path) -> int:
    """Return the number that a function puts into a queue, called with a saved model in a process of its own."""
    processes = forked.context()
    left = processes.SimpleQueue()
    process = processes.Process(target=measure, args=(save(FAMILIES["llama"], folder / "model"), left))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return int(left.get())


def left_by_six_losses(folder: Path, left: Any) -> None:
    """Put how many bytes six losses of one pass leave, each of which needs 31 MiB and keeps little above it."""
    model = with_lora(streamed(folder, trains_weights=False))
    blocks, plain, tensors = streamed_blocks(model), closure(model), []
    assert blocks is not None

    def loss() -> Tensor:
        activations = [torch.ones(1 << 14) for _ in range(500)]
        tensors.append(torch.ones(100))
        del activations
        return plain()

    perturb = StreamedForward(blocks, model)
    train(model, perturb, steps=1)
    release_heap()
    before = memory_count("RssAnon")
    assert len(perturb.losses_of([(loss, {})] * 6, step=1)) == len(tensors) == 6
    left.put(memory_count("RssAnon") - before)


@pytest.mark.skipif(memory_count("RssAnon") is None, reason="only Linux counts memory without files apart")
def test_a_pass_leaves_no_room_in_the_heaps_of_its_threads(tmp_path: Path) -> None:
    """In a process of its own, since threads of other tests keep memory, too."""
    assert in_a_process(left_by_six_losses, tmp_path) < 25 << 20


def left_in_another_thread(folder: Path, left: Any) -> None:
    """Put how many bytes a thread leaves that takes 20 MiB and frees them, twice."""
    model = streamed(folder, trains_weights=False)
    release_heap()
    before = memory_count("RssAnon")
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):  # glibc takes the first from the system, and the next of that size from the thread's heap
            pool.submit(lambda: torch.ones(5 << 20).sum().item()).result()
        left.put(memory_count("RssAnon") - before)
    assert streamed_blocks(model) is not None


@pytest.mark.skipif(memory_count("RssAnon") is None, reason="only Linux counts memory without files apart")
def test_the_heap_of_a_thread_keeps_little_of_what_it_frees(tmp_path: Path) -> None:
    assert in_a_process(left_in_another_thread, tmp_path) < 8 << 20
