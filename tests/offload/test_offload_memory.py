"""Memory of streamed runs, by the kernel's own count: pages of files apart, it does not grow with the weights."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import transformers
from test_streamed_forward import FAMILIES, save, streamed, train, with_lora

from zokernel.offload import StreamedForward, streamed_blocks
from zokernel.process_memory import release_heap

STATUS = Path("/proc/self/status")
WEIGHTS, BOUND = 300 << 20, 80 << 20

pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="only Linux counts memory without files apart")


def anonymous() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class Peak:
    """Largest anonymous memory of the process while the block runs, looked at every millisecond."""

    def __enter__(self) -> Peak:
        self.peak, self._done = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(1e-3):
            self.peak = max(self.peak, anonymous())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=19,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    # Compilers and libraries are loaded in the first steps of a process, whatever the model.
    small = save(FAMILIES["untied"], tmp_path_factory.mktemp("small") / "model")
    for full in (False, True):
        run(small, full=full)
    return save(config, tmp_path_factory.mktemp("large") / "model")


def run(folder: Path, *, full: bool) -> list[list[float]]:
    model = streamed(folder, trains_weights=full, copy=f"copy-{full}")
    copy = model.working_copy
    model = model if full else with_lora(model)
    blocks = streamed_blocks(model)
    assert blocks is not None
    losses, _ = train(model, StreamedForward(blocks, model, copy), steps=2)
    blocks.settle_all()
    return losses


@pytest.mark.parametrize("full", [False, True])
def test_memory_is_bounded_by_a_block(large: Path, full: bool) -> None:
    assert (large / "model.safetensors").stat().st_size > WEIGHTS
    gc.collect()
    release_heap()
    before = anonymous()
    with Peak() as memory:
        losses = run(large, full=full)
    assert len(set(losses[0] + losses[1])) == 12
    assert memory.peak - before < BOUND
