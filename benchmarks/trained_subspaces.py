r"""What one step gains by which weights are trained: all layers, some, or a subspace of each layer's inputs.

A step of MeZO along :math:`z` with the gradient g of its batch changes the mean loss, at its best rate, by

.. math:: \frac{(E\, g \cdot \bar g)^2}{2\, E\big[ |g|^2 (\mathrm{tr} F + 2\, \hat g^T F \hat g) \big]},

all restricted to what is trained, with :math:`\bar g` the gradient of other examples and F their Fisher matrix.
Gradients are exact, and F sums over the classes, so nothing is left to chance but which examples are drawn.

Subspaces of a layer's inputs: ``random 16`` has 16 random directions, as a new LoRA adapter has; ``fixed r`` the first
r right singular vectors of the inputs of 32 other examples; ``own r`` those of the batch itself (AGZO,
Lin et al. 2026, arXiv:2601.17261).

    python benchmarks/trained_subspaces.py --data_folder DIR --tasks sst2 trec
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import paired
import torch
from directions import table
from plan_followed import Course, Sources
from torch import Tensor, nn

from zokernel.finetune.scoring.options import option_scores

Tensors = dict[str, Tensor]
CALIBRATION = 32  # examples whose inputs give the fixed subspaces
RANK = 16


@dataclass
class Subspace:
    """What is trained, and what was measured there.

    Args:
        names: Layers.
        bases: Bases of their inputs, for each batch or for all; none for the whole layer.
    """

    names: list[str]
    bases: list[Tensors] = field(default_factory=list)
    of_batch: list[Tensors] = field(default_factory=list)  # gradients of the batches
    norms: list[float] = field(default_factory=list)  # and their squares
    along: list[float] = field(default_factory=list)  # their products with the mean gradient of the others
    trace: list[float] = field(default_factory=list)
    curvature: list[float] = field(default_factory=list)  # along the gradient of the batch, times its square

    def restricted(self, gradient: Tensors, batch: int) -> Tensors:
        """Return a gradient in the coordinates of what is trained."""
        if not self.bases:
            return {name: gradient[name] for name in self.names}
        base = self.bases[batch % len(self.bases)]
        return {name: gradient[name] @ base[name] for name in self.names}

    def begin(self, gradients: list[Tensors]) -> None:
        """Take the gradients of the batches."""
        self.of_batch = [self.restricted(gradient, batch) for batch, gradient in enumerate(gradients)]
        self.norms = [product(gradient, gradient) for gradient in self.of_batch]
        self.along, self.trace, self.curvature = ([0.0] * len(gradients) for _ in range(3))

    def add(self, gradient: Tensors, *, along: float, fisher: float) -> None:
        """Add a gradient of one of the other examples, to their mean and to their Fisher matrix, by these weights."""
        restricted: Tensors = {}
        for batch, batch_gradient in enumerate(self.of_batch):
            if batch < max(1, len(self.bases)):
                restricted = self.restricted(gradient, batch)
                square = product(restricted, restricted)
            slope = product(restricted, batch_gradient)
            self.along[batch] += along * slope
            self.trace[batch] += fisher * square
            self.curvature[batch] += fisher * slope**2

    def gain(self, batches: list[int]) -> float:
        """Return the gain of a step at its best rate, by some of the batches."""
        along = sum(self.along[n] for n in batches) / len(batches)
        loss = sum(self.norms[n] * self.trace[n] + 2 * self.curvature[n] for n in batches) / len(batches)
        return along**2 / (2 * loss)


def product(left: Tensors, right: Tensors) -> float:
    return sum(float((left[name] * right[name]).sum()) for name in left)


def gradient_of(layers: dict[str, nn.Linear], loss: Callable[[], Tensor]) -> Tensors:
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), [layer.weight for layer in layers.values()])
    return dict(zip(layers, gradients, strict=True))


@torch.no_grad()
def bases_of(layers: dict[str, nn.Linear], loss: Callable[[], Tensor]) -> Tensors:
    """Return right singular vectors of the inputs of every layer."""
    inputs_of: Tensors = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs_of[name] = args[0].detach().flatten(0, -2).float()

        return keep

    handles = [layer.register_forward_pre_hook(keeper(name)) for name, layer in layers.items()]
    loss()
    for handle in handles:
        handle.remove()
    return {
        name: torch.linalg.svd(inputs, full_matrices=False)[2][:RANK].T.contiguous()
        for name, inputs in inputs_of.items()
    }


def first(bases: list[Tensors], rank: int) -> list[Tensors]:
    return [{name: base[:, :rank] for name, base in of_batch.items()} for of_batch in bases]


def measure_gains(course: Course, settings: argparse.Namespace) -> dict[str, Subspace]:
    """Return what each choice of trained weights gains on a task."""
    model, rows = course.model, course.examples
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in name}
    for layer in linear.values():
        layer.weight.requires_grad_(True)

    def loss_of(items: list) -> Callable[[], Tensor]:
        return paired.make_closure(model, course.collate(items), bf16=False)

    starts = range(CALIBRATION, CALIBRATION + settings.batches * settings.batch, settings.batch)
    batches = [loss_of(rows[start : start + settings.batch]) for start in starts]
    generator = torch.Generator().manual_seed(0)
    random = {name: torch.randn(m.in_features, RANK, generator=generator) / RANK**0.5 for name, m in linear.items()}
    fixed, batch_bases = [bases_of(linear, loss_of(rows[:CALIBRATION]))], [bases_of(linear, batch) for batch in batches]
    all_layers, attention = list(linear), [name for name in linear if name.endswith(("q_proj", "v_proj"))]
    subspaces = {"all layers": Subspace(all_layers), "q, v": Subspace(attention)}
    subspaces |= {
        "all layers, random 16": Subspace(all_layers, [random]),
        "q, v, random 16": Subspace(attention, [random]),
    }
    subspaces |= {f"all layers, fixed {rank}": Subspace(all_layers, first(fixed, rank)) for rank in (1, 4, 16)}
    subspaces |= {f"all layers, own {rank}": Subspace(all_layers, first(batch_bases, rank)) for rank in (1, 4, 16)}
    gradients = [gradient_of(linear, batch) for batch in batches]
    for subspace in subspaces.values():
        subspace.begin(gradients)
    for row in rows[-settings.others :]:
        batch = course.collate([row])
        with torch.no_grad():
            shares = option_scores(model, batch).float().softmax(-1)[0]
        true = int(batch["labels"])
        for label, share in enumerate(shares.tolist()):
            batch["labels"] = torch.full_like(batch["labels"], label)
            gradient = gradient_of(linear, paired.make_closure(model, batch, bf16=False))
            for subspace in subspaces.values():
                subspace.add(gradient, along=(label == true) / settings.others, fisher=share / settings.others)
    return subspaces


def gain_table(subspaces: dict[str, Subspace], batches: int) -> str:
    """Return the table; errors of ratios by leaving out one batch at a time."""
    whole = list(range(batches))
    without = [[n for n in whole if n != left] for left in whole]
    usual = subspaces["all layers"]
    lines = []
    for name, subspace in subspaces.items():
        ratios = torch.tensor([subspace.gain(some) / usual.gain(some) for some in without])
        error = ((batches - 1) / batches * (ratios - ratios.mean()).square().sum()).sqrt()
        means = [sum(values) / batches for values in (subspace.along, subspace.norms, subspace.trace)]
        ratio = subspace.gain(whole) / usual.gain(whole)
        lines.append([name, f"{ratio:.2f} ± {error:.2f}", f"{subspace.gain(whole):.4f}", *(f"{m:.3g}" for m in means)])
    return table(["trained", "gain over all layers'", "gain", "g . mean g", "g^2", "trace"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_folder", type=Path, required=True)
    parser.add_argument(
        "--tasks", nargs="+", choices=["sst2", "trec", "rte", "movie-reviews"], default=["sst2", "trec"]
    )
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--others", type=int, default=24)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for task in settings.tasks:
            data = Sources(settings.data_folder, Path("samples.jsonl"), Path(scratch)).arguments(task)
            print(
                f"{task}\n{gain_table(measure_gains(Course(data, lora=False), settings), settings.batches)}\n",
                flush=True,
            )


if __name__ == "__main__":
    main()
