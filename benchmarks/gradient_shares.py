"""Which weights' gradients are signal and which are noise: the squared mean gradient against the mean squared gradient.

A zeroth-order slope is as noisy as the gradient of its batch is large; what a step can gain is the mean gradient.  By
groups of weights, from backpropagated gradients of batches of four: shares of the squared mean gradient (without the
bias of its estimate) and of the mean squared gradient, at the start or after a short run of ``--method auto``.

    python benchmarks/gradient_shares.py --tasks sst2 trec --data_folder DIR [--batches 24] [--threads 2]

``DIR`` is that of ``query_efficiency.py``.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import paired
import torch
from directions import machine, table
from query_contenders import CONTENDERS, FORWARDS, rates_of
from query_efficiency import FILES, Arena, race

from zokernel.finetune.models.freezing import layers_of
from zokernel.finetune.scoring.options import classification_loss, option_scores


def moments(arena: Arena, batches: int) -> dict[str, tuple[float, float]]:
    """Return, for every weight, the square of the mean gradient and the mean square of a batch's."""
    weights = dict(arena.trained)
    for parameter in weights.values():
        parameter.requires_grad_(True)
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    squares: dict[str, float] = defaultdict(float)
    stream = arena.batches(4, seed=123)
    for _ in range(batches):
        batch = next(stream)
        loss = classification_loss(option_scores(arena.model, batch), batch["labels"])
        for (name, gradient_sum), gradient in zip(total.items(), torch.autograd.grad(loss, list(weights.values()))):
            gradient_sum += gradient
            squares[name] += float(gradient.square().sum())
    # The squared sum holds every batch's own square once, which is no signal.
    pairs = batches * (batches - 1)
    return {
        name: ((float(gradient_sum.square().sum()) - squares[name]) / pairs, squares[name] / batches)
        for name, gradient_sum in total.items()
    }


def groups(arena: Arena) -> dict[str, str]:
    """Return the group of every weight."""
    stack = layers_of(arena.model)
    first = {id(p) for layer in stack[: round(len(stack) / 6)] for p in layer.parameters()}
    layered = {id(p) for layer in stack for p in layer.parameters()}
    group_of = {}
    for name, p in arena.trained:
        part = "first sixth of the layers" if id(p) in first else "other layers" if id(p) in layered else "embeddings"
        group_of[name] = "vectors" if p.dim() < 2 else f"matrices, {part}"
    return group_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(FILES), default=["sst2", "trec"])
    parser.add_argument("--data_folder", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--trained", action="store_true", help="after a run of auto, not at the start")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"Machine: {machine()}. {options.batches} batches of 4.")
    for task in options.tasks:
        arena = Arena(task, "full", options.data_folder)
        if options.trained:
            race(arena, CONTENDERS["auto"], rates_of("auto", task, "full")[0], 11, FORWARDS[task])
        moments_of, group_of = moments(arena, options.batches), groups(arena)
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for name, p in paired.trained(arena.model):
            for number, value in enumerate((p.numel(), *moments_of[name])):
                sums[group_of[name]][number] += value
        whole = [sum(column) for column in zip(*sums.values())]
        rows = [
            [group, f"{count:,.0f}", *(f"{100 * part / all_:.1f}%" for part, all_ in zip(parts, whole[1:]))]
            for group, (count, *parts) in sorted(sums.items())
        ]
        rows.append(["all", f"{whole[0]:,.0f}", f"{whole[1]:.0f}", f"{whole[2]:.0f}"])
        print(f"\n{task}\n\n{table(['weights', 'number', 'squared mean gradient', 'mean square of a batch'], rows)}")


if __name__ == "__main__":
    main()
