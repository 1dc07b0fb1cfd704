"""Print the peaks of memory of runs beside what was estimated beforehand, as JSON.

A script: other heaps would blur them.

python tests/offload/memory_peaks.py FOLDER [MODEL] [ROWS TOKENS]
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from test_streamed_forward import save

from zokernel.finetune.models.memory_setups import Setup, list_setups, measure
from zokernel.finetune.models.streamed import StreamingOptions, load_streamed
from zokernel.offload import StreamedForward, streamed_blocks
from zokernel.optim import ZerothOrder
from zokernel.perturb import InForward
from zokernel.process_memory import release_heap

LOSSES = 2
MEASURED = {
    "--perturb in_forward": "RssAnon RssFile",
    "--lora true": "RssAnon RssFile",
    "--offload disk": "RssAnon",
    "--offload disk --offload_updates journal": "RssAnon",
    "--lora true --offload disk": "RssAnon",
}


def held(kinds: str) -> int:
    """Return the bytes of these kinds that the process holds, by the kernel's count."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[kind].split()[0]) * 1024 for kind in kinds.split())


def peak(run: Callable[[], Any], kinds: str) -> int:
    """Return by how much memory grew while a function ran, sampled every two milliseconds."""
    gc.collect()
    release_heap()
    before = most = held(kinds)
    finished = threading.Event()

    def watch() -> None:
        nonlocal most
        while not finished.wait(2e-3):
            most = max(most, held(kinds))

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    finished.set()
    watcher.join()
    return most - before


def train(folder: Path, setup: Setup, root: Path, rows: int, tokens: int) -> None:
    """Take a step with a setup; of streamed weights two, since updates are made when they are read next."""
    trains = setup.trains == "all weights"
    architecture = transformers.AutoConfig.from_pretrained(folder)
    if "disk" in setup.flags:
        updates = "journal" if "journal" in setup.flags else "disk"
        streaming = StreamingOptions(root / "copy", trains_weights=trains, updates=updates)
        model = load_streamed(architecture, folder, torch.float32, streaming, kind="causal", name="the model")
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = streamed_blocks(model)
    store = getattr(model, "working_copy", None)
    if not trains:
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).eval()
    perturb = InForward() if blocks is None else StreamedForward(blocks, model, store)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = ZerothOrder(trained, lr=1e-6, estimator=f"two_point(1e-3, {LOSSES // 2})", perturb=perturb)
    ids = torch.randint(0, architecture.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    for _ in range(1 if blocks is None else 2):
        optimizer.step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def main(root: Path, model: str | None = None, rows: int = 2, tokens: int = 64) -> None:
    sizes = {"vocab_size": 4000, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
    small, large = (
        transformers.LlamaConfig(**sizes, num_hidden_layers=depth, tie_word_embeddings=True) for depth in (1, 8)
    )
    small = save(small, root / "small")
    folder = Path(model) if model else save(large, root / "large")
    config = transformers.AutoConfig.from_pretrained(folder)
    setups = list_setups(measure(config, torch.float32), losses=LOSSES, rows=rows, tokens=tokens)
    for setup in setups:  # compilers and libraries are loaded in the first steps
        if setup.flags in MEASURED:
            train(small, setup, root / "first", 1, 8)
    peaks = {}
    for setup in setups:
        if setup.flags in MEASURED:
            bytes_held = peak(lambda setup=setup: train(folder, setup, root, rows, tokens), MEASURED[setup.flags])
            peaks[setup.flags] = {
                "said": setup.memory,
                "measured": bytes_held,
                "ratio": round(setup.memory / bytes_held, 2),
            }
            print(setup.flags, peaks[setup.flags], file=sys.stderr, flush=True)
    print(json.dumps(peaks, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *more = sys.argv[1:]
    main(Path(folder), *more[:1], *map(int, more[1:]))
