"""Train a random Llama whose weights are streamed; print anonymous memory, bytes and seconds per step.

python benchmarks/offload.py --gigabytes 4 --folder large --train lora
python benchmarks/offload.py --gigabytes 1.5 --folder large --train full --updates journal --compare

Before every step the pages of the files are let go of, so that they are read from the disk.  ``--compare`` also
measures one read of the weights and the forwards in memory: a step should take little more than the longer of the two.
On a machine that others use, set OMP_WAIT_POLICY=passive: threads that wait for one another take the cores otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from zokernel.finetune.models.streamed import StreamingOptions, load_streamed
from zokernel.offload import StreamedForward, streamed_blocks
from zokernel.optim import ZerothOrder
from zokernel.perturb import InForward
from zokernel.process_memory import memory_count

HIDDEN, INNER, VOCABULARY = 2048, 5632, 32000


def anonymous() -> int:
    """Return the anonymous memory of this process in bytes, by the kernel's count."""
    count = memory_count("RssAnon")
    assert count is not None, "only Linux counts memory by kind"
    return count


def forget_pages(folder: Path) -> None:
    """Let the system forget the pages of a folder's files, so that they are read from the disk again."""
    for path in folder.rglob("*.safetensors"):
        opened = os.open(path, os.O_RDONLY)
        os.fdatasync(opened)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)


def seconds_to_read(path: Path) -> float:
    """Return the seconds that one read of a file takes, from the disk."""
    forget_pages(path.parent)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
    return time.perf_counter() - start


def compare(folder: Path, step: float, forwards: int, ids: torch.Tensor) -> None:
    """Print how long one read of the weights and the forwards of a step take in memory."""
    read = seconds_to_read(folder / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(forwards):
                model(input_ids=ids, labels=ids, use_cache=False)
        times.append(time.perf_counter() - start)
    compute = min(times[1:])
    print(
        f"one read of the weights: {read:.2f} s; {forwards} plain forwards in memory: {compute:.2f} s; a step takes "
        f"{step / max(read, compute):.2f} times the longer of them"
    )


def save(folder: Path, gigabytes: float) -> None:
    """Write a random Llama in bfloat16, a tensor at a time."""
    per_layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
    layers = max(1, round(gigabytes * 2**30 / per_layer))
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=16,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model.safetensors").exists():
        return
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        size = 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.partial").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for parameter in model.parameters():
            numbers = torch.randn(parameter.shape) * 0.02 if parameter.ndim > 1 else torch.ones(parameter.shape)
            file.write(numbers.bfloat16().view(torch.uint8).numpy().tobytes())
    (folder / "model.partial").replace(folder / "model.safetensors")
    config.save_pretrained(folder)


class PeakWatch:
    """Follows the anonymous memory of this process in a thread of its own."""

    def __init__(self) -> None:
        self._peak, self._stopped = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        while not self._stopped.wait(0.01):
            self._peak = max(self._peak, anonymous())

    def stop(self) -> int:
        """Return the peak in bytes."""
        self._stopped.set()
        self._thread.join()
        return self._peak


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model, and the working copy of its weights if they are streamed."""
    folder = args.folder / "model"
    if args.where == "memory":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        copy = None
    else:
        model = load_streamed(
            transformers.AutoConfig.from_pretrained(folder),
            folder,
            torch.bfloat16,
            StreamingOptions(args.folder / "copy", args.train == "full", where=args.where, updates=args.updates),
            kind="causal",
            name="random",
        )
        copy = model.working_copy
    if args.train == "lora":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).eval()
    return model, copy


def main() -> None:
    """Run some steps and print what they took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--train", choices=["lora", "full"], default="lora")
    parser.add_argument("--where", choices=["disk", "cpu", "memory"], default="disk")
    parser.add_argument("--updates", choices=["disk", "journal"], default="disk")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--directions", type=int, default=2)
    args = parser.parse_args()
    save(args.folder / "model", args.gigabytes)
    watch = PeakWatch()
    model, copy = load(args)
    blocks = streamed_blocks(model)
    optimizer = ZerothOrder(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad],
        lr=1e-6,
        estimator=f"two_point(1e-3, {args.directions})",
        perturb=InForward() if blocks is None else StreamedForward(blocks, model, copy),
    )
    ids = torch.randint(0, VOCABULARY, (args.rows, args.tokens), generator=torch.Generator().manual_seed(0))
    if blocks is not None:
        print(f"{blocks.nbytes / 2**30:.2f} GiB of weights in {len(blocks.units)} units; {2 * args.directions} losses")
    seconds = []
    for step in range(args.steps):
        if args.where == "disk":
            forget_pages(args.folder)
        read = blocks.bytes_read if blocks else 0
        written, start = copy.bytes_written if copy else 0, time.perf_counter()
        loss = optimizer.step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
        seconds.append(time.perf_counter() - start)
        read = ((blocks.bytes_read if blocks else 0) - read) / 2**30
        written = ((copy.bytes_written if copy else 0) - written) / 2**30
        print(f"step {step + 1}: loss {loss:.4f}, read {read:.2f} GiB, written {written:.2f} GiB, {seconds[-1]:.1f} s")
    print(f"peak of anonymous memory: {watch.stop() / 2**30:.2f} GiB")
    if args.compare:
        compare(args.folder / "model", min(seconds[1:]), 2 * args.directions, ids)


if __name__ == "__main__":
    main()
