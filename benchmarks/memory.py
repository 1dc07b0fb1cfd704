"""Peak memory of one training step of every method, next to plain inference, each in a process of its own.

    python benchmarks/memory.py                        # SmolLM2-135M, fp32, batches of 8 x 64 tokens
    python benchmarks/memory.py --methods mezo hizoo

Prints peak resident memory, its ratio to the same process's inference peak, and the difference in copies of the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

from zokernel.finetune.settings.auto import POLYAK_SHARE

SETTINGS = {
    "inference": None,
    "mezo": ("mezo", {}),
    "mezo_in_forward": ("mezo", {"perturb": "in_forward"}),
    "sparse_mezo": ("sparse_mezo", {}),
    "lozo": ("lozo", {}),
    "lozo_m": ("lozo_m", {}),
    "subzero": ("subzero", {}),
    "fzoo": ("fzoo", {}),
    "auto": ("forward_difference", {"normalize": True, "polyak_share": POLYAK_SHARE}),
    "richardson": ("richardson", {}),
    "kerzoo": ("kerzoo", {}),
    "kerzoo_journal": ("kerzoo", {"averaging": "journal"}),
    "kerzoo_int8": ("kerzoo", {"averaging": "int8"}),
    "kerzoo_fp32": ("kerzoo", {"averaging": "fp32"}),
    "hizoo": ("hizoo", {}),
    "mezo_momentum": ("mezo", {"momentum": 0.9}),
    "zo_adam": ("zo_adam", {}),
    "adamw": ("adamw", {}),
}


def measure(name: str, model_name: str, batch: int, length: int) -> dict[str, float]:
    """Return peak bytes of inference and of two training steps in this process, and the bytes of the weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from zokernel.data import fetch
    from zokernel.finetune.models.memory import PeakMemory
    from zokernel.optim import get_method

    path = fetch(model_name) if model_name == "smollm2" else model_name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.0)  # out of the mapped file and into memory, as any training would
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)

    def closure():
        logits = model(tokens, logits_to_keep=1).logits[:, -1].float()
        return torch.nn.functional.cross_entropy(logits, tokens[:, 0])

    def take_steps(trained: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> None:
        method, options = SETTINGS[name]
        optimizer = get_method(method)(trained, lr=1e-7, **options)
        for _ in range(2):
            optimizer.step(loss)

    if SETTINGS[name] is not None:
        # Importing and compiling the engine takes about 90 MiB, whatever the model: both peaks are to contain it.
        small = torch.nn.Sequential(torch.nn.Embedding(256, 128), torch.nn.Linear(128, 256))
        take_steps(small, lambda: small(tokens[:, :2] % 256).square().mean())
    with torch.no_grad():
        closure()
        with PeakMemory() as inference:
            closure()
    with PeakMemory() as training:
        if SETTINGS[name] is not None:
            take_steps(model, closure)
        else:
            with torch.no_grad():
                closure()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"inference": inference.peak_bytes, "training": training.peak_bytes, "weights": weights}


def main() -> None:
    """Measure every method in a fresh process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--model", default="smollm2", help="smollm2 or a local folder")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.model, args.batch, args.length)))
        return
    print(f"{'method':<16}{'inference MiB':>14}{'step MiB':>10}{'ratio':>8}{'extra copies':>14}")
    for name in args.methods:
        command = [sys.executable, __file__, "--measure", name, "--model", args.model]
        command += ["--batch", str(args.batch), "--length", str(args.length)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks = json.loads(output.splitlines()[-1])
        ratio = peaks["training"] / peaks["inference"]
        copies = (peaks["training"] - peaks["inference"]) / peaks["weights"]
        inference, training = peaks["inference"] / 2**20, peaks["training"] / 2**20
        print(f"{name:<16}{inference:>14.0f}{training:>10.0f}{ratio:>8.3f}{copies:>14.2f}", flush=True)


if __name__ == "__main__":
    main()
