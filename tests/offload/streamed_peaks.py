"""Print the peaks of anonymous memory of streamed runs of two depths, as JSON.

A script, since the heaps that other tests leave would blur them.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from pathlib import Path

import transformers
from test_streamed_forward import save, streamed, train, with_lora

from zokernel.offload import StreamedForward, streamed_blocks
from zokernel.process_memory import release_heap

DEPTHS = (4, 19)


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class Peak:
    """Largest anonymous memory of the process while the block runs, sampled every millisecond."""

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


def llama(depth: int, folder: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=depth,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    return save(config, folder / "model")


def run(folder: Path, *, full: bool) -> int:
    """Losses that differ show that the weights moved."""
    model = streamed(folder, trains_weights=full, copy=f"copy-{full}")
    copy = model.working_copy
    model = model if full else with_lora(model)
    blocks = streamed_blocks(model)
    assert blocks is not None
    losses, _ = train(model, StreamedForward(blocks, model, copy), steps=2)
    blocks.settle_all()
    return len(set(losses[0] + losses[1]))


def main(root: Path) -> None:
    folders = {depth: llama(depth, root / str(depth)) for depth in DEPTHS}
    weights = {depth: (folder / "model.safetensors").stat().st_size for depth, folder in folders.items()}
    results: dict[str, dict[int, int]] = {}
    for full in (False, True):
        run(folders[DEPTHS[0]], full=full)  # compilers and libraries are loaded in the first steps
        peaks = results["weights" if full else "adapter"] = {}
        for depth, folder in folders.items():
            gc.collect()
            release_heap()
            with Peak() as memory:
                assert run(folder, full=full) == 12
            peaks[depth] = memory.peak
    print(
        json.dumps(
            {
                "weights": list(weights.values()),
                **{f"peaks of {key}": list(peaks.values()) for key, peaks in results.items()},
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
