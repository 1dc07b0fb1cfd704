"""What a step costs beside its forward passes: (step - its bare forwards) / (its bare forwards), in one run.

A bare forward is the same loss under ``no_grad``.  On a shared machine a forward's own time wanders by a quarter within
seconds, so each forward of a step comes right after a bare one; the rest of the step (sweeps, update) counts as the
step's.  Every line is the median over rounds, of wall time and of CPU time.  Stacked steps take several losses in one
forward and can cost less than their forwards would one by one.

    python benchmarks/step.py                                      # everything: about half an hour on two cores
    python benchmarks/step.py --methods mezo --perturbations 1 --train full --precision bf16 --rounds 5
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import paired
import torch
from directions import machine, table

from zokernel.directions import Restore
from zokernel.estimators.base import Offsets
from zokernel.finetune.data.repeat import repeat_batch
from zokernel.finetune.scoring.objective import Objective
from zokernel.optim import ZerothOrder, get_method
from zokernel.perturb import Perturb, Stacked
from zokernel.perturb.base import Closure

WAYS = ("in_place", "in_forward", "stacked")
METHODS = ("mezo", "kerzoo", "fzoo")


def make_optimizer(
    method: str, count: int, way: str, model: torch.nn.Module, batch: dict[str, Any], *, bf16: bool
) -> ZerothOrder:
    trained = paired.trained(model)

    def losses(copies: int) -> torch.Tensor:
        with paired.autocast(bf16=bf16, device=batch["labels"].device.type):
            return Objective().stacked(model, repeat_batch(batch, copies), copies)

    # As in a run: as many copies as fill a batch of 32 examples, two at least.
    perturb = Stacked(losses, max_copies=max(2, 32 // len(batch["labels"]))) if way == "stacked" else way
    return get_method(method)(trained, lr=0.0, num_perturbations=count, perturb=perturb)


class AfterBareForwards(Perturb):
    """Takes a bare forward before every forward of a step, and keeps the time of the bare ones."""

    def __init__(self, inner: Perturb):
        self.inner, self.name, self.together = inner, inner.name, isinstance(inner, Stacked)
        self.spent = (0.0, 0.0)

    @property
    def weights(self) -> Restore:  # type: ignore[override]
        """Those of ``inner``."""
        return self.inner.weights

    def attach(self, *args: Any, **kwargs: Any) -> None:
        """Attach ``inner``."""
        self.inner.attach(*args, **kwargs)

    def losses(self, closure: Closure, points: Sequence[Offsets], *, step: int) -> list[float]:
        """Return the losses at ``points``."""
        losses: list[float] = []
        size = len(points) if self.together else 1
        for begin in range(0, len(points), size):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in points[begin : begin + size]:
                float(closure())
            self.spent = (self.spent[0] + time.perf_counter() - wall, self.spent[1] + time.process_time() - cpu)
            losses += self.inner.losses(closure, points[begin : begin + size], step=step)
        return losses


def measure(optimizer: ZerothOrder, closure: Callable[[], torch.Tensor], rounds: int) -> list[str]:
    timed = AfterBareForwards(optimizer.perturb)
    optimizer.perturb = timed
    bare, steps = [], []
    for number in range(-1, rounds):
        timed.spent = (0.0, 0.0)
        wall, cpu = time.perf_counter(), time.process_time()
        optimizer.step(closure)
        elapsed = time.perf_counter() - wall, time.process_time() - cpu
        if number >= 0:
            bare.append(timed.spent)
            steps.append((elapsed[0] - timed.spent[0], elapsed[1] - timed.spent[1]))
    wall, cpu = paired.median_ratios(steps, bare)
    seconds = [f"{paired.median_seconds(times):.3f}" for times in (bare, steps)]
    return [*seconds, f"{100 * (wall - 1):+.1f}%", f"{100 * (cpu - 1):+.1f}%"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--perturbations", nargs="+", type=int, default=[1, 3, 8])
    parser.add_argument("--train", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch = paired.make_batch(options.batch)
    print(
        f"Machine: {machine()}. Batch {options.batch}, {batch['input_ids'].shape[1]} tokens; {options.rounds} rounds."
    )
    header = ["trained", "precision", "method", "P", "perturbed", "forwards s", "step s", "overhead", "of CPU time"]
    print(table(header, []), flush=True)
    for train in options.train:
        model = paired.load(lora=train == "lora")
        for precision in options.precision:
            closure = paired.make_closure(model, batch, bf16=precision == "bf16")
            for method in options.methods:
                for count in options.perturbations:
                    if method == "fzoo" and count == 1:
                        continue  # the spread of one loss is nothing to normalise by
                    for way in options.ways:
                        if way == "stacked" and train == "full":
                            continue  # copies of all weights do not fit; low-rank directions are in stacked.py
                        optimizer = make_optimizer(method, count, way, model, batch, bf16=precision == "bf16")
                        row = [train, precision, method, str(count), way, *measure(optimizer, closure, options.rounds)]
                        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
