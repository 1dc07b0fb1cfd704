"""A step with a direction for every example against two plain forwards of the same rows, in one run.

    python benchmarks/per_example.py [--batches 4 16] [--length 40] [--threads 1]

LoRA is trained along dense directions, all weights along directions of rank 1.  Prints the ratio of times (step / two
forwards).  CPU time is hardly changed by other processes.
"""

from __future__ import annotations

import argparse

import paired
import torch
import torch.nn.functional as F
from directions import machine, table

from zokernel.directions import Dense, LowRank
from zokernel.estimators import PerExample, TwoPoint
from zokernel.finetune.scoring.options import option_scores
from zokernel.optim import ZerothOrder


def compare(train: str, size: int, length: int, rounds: int) -> list[str]:
    model = paired.load(lora=train == "lora")
    batch = paired.make_batch(size, length)

    def losses() -> torch.Tensor:
        with paired.autocast():
            scores = option_scores(model, batch)
        return F.cross_entropy(scores.float(), batch["labels"], reduction="none")

    optimizer = ZerothOrder(
        paired.trained(model),
        lr=1e-9,
        directions=Dense() if train == "lora" else LowRank(1, refresh=0),
        estimator=PerExample(TwoPoint(1e-2 if train == "lora" else 1e-3)),
        perturb="per_example",
    )

    @torch.no_grad()
    def plain() -> None:
        losses(), losses()

    times = paired.take_turns({"plain": plain, "step": lambda: optimizer.step(losses)}, rounds, warm_up=2)
    wall, cpu = paired.median_ratios(times["step"], times["plain"])
    return [train, str(size), f"{paired.median_seconds(times['plain']):.3f}", f"{wall:.3f}", f"{cpu:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16], help="examples per batch")
    parser.add_argument("--length", type=int, default=40, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each, taken in turns")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    rows = [compare(train, size, args.length, args.rounds) for train in ("lora", "full") for size in args.batches]
    print(table(["trained", "batch", "two forwards (s)", "step / two forwards", "the same, CPU time"], rows))


if __name__ == "__main__":
    main()
