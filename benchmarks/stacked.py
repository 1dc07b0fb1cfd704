"""All losses of a step in one forward against one after the other, at small batches, in one run.

    python benchmarks/stacked.py [--batches 1 2 4] [--perturbations 1 3] [--threads 2]

LoRA is trained with MeZO, all parameters with LOZO's low-rank directions.  Prints the ratio of times (loop / stacked)
and the largest difference of the losses: both see the same weights and perturbations.  The bound is the same ratio for
bare forwards, of the batch one by one and of as many copies of it at once: what stacking could reach at most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import paired
import torch
from directions import machine, table
from step import make_optimizer

from zokernel.finetune.data.repeat import repeat_batch
from zokernel.optim import ZerothOrder


def losses_of(optimizer: ZerothOrder) -> torch.Tensor:
    assert optimizer.last_estimate is not None
    return torch.tensor(optimizer.last_estimate.losses)


def compare(train: str, count: int, batch: dict[str, Any], model: torch.nn.Module, precision: str, rounds: int):
    bf16, method = precision == "bf16", "mezo" if train == "lora" else "lozo"
    closure = paired.make_closure(model, batch, bf16=bf16)
    loop, stacked = (make_optimizer(method, count, way, model, batch, bf16=bf16) for way in ("in_place", "stacked"))
    largest = 0.0
    forwards, at_once = loop.forwards_per_step, stacked.perturb.max_copies
    parts = [repeat_batch(batch, min(at_once, forwards - first)) for first in range(0, forwards, at_once)]
    closures = [paired.make_closure(model, part, bf16=bf16) for part in parts]

    @torch.no_grad()
    def bare(evaluations: list[Callable[[], torch.Tensor]]) -> None:
        for evaluate in evaluations:
            float(evaluate())

    contenders = {
        "loop": lambda: loop.step(closure),
        "stacked": lambda: stacked.step(closure),
        "bare loop": lambda: bare([closure] * forwards),
        "bare at once": lambda: bare(closures),
    }
    times: paired.Times = {name: [] for name in contenders}
    for number in range(rounds):
        for name, round_times in paired.take_turns(contenders, 1, warm_up=int(number == 0)).items():
            times[name] += round_times
        largest = max(largest, float((losses_of(loop) - losses_of(stacked)).abs().max()))
    wall, cpu = paired.median_ratios(times["loop"], times["stacked"])
    bound, _ = paired.median_ratios(times["bare loop"], times["bare at once"])
    seconds = [f"{paired.median_seconds(times[name]):.3f}" for name in ("loop", "stacked")]
    return [*seconds, f"{wall:.2f}x", f"{cpu:.2f}x", f"{bound:.2f}x", f"{largest:.1e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--perturbations", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--train", nargs="+", choices=("lora", "lozo"), default=["lora", "lozo"])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"Machine: {machine()}. {options.rounds} rounds.")
    header = ["trained", "batch", "P", "precision", "loop s", "stacked s", "ratio", "of CPU time", "bound"]
    header.append("losses differ by")
    print(table(header, []), flush=True)
    for train in options.train:
        model = paired.load(lora=train == "lora")
        for size in options.batches:
            batch = paired.make_batch(size)
            for count in options.perturbations:
                for precision in options.precision:
                    row = [train, str(size), str(count), precision]
                    row += compare(train, count, batch, model, precision, options.rounds)
                    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
