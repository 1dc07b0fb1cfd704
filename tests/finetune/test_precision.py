"""Training in every precision reaches the loss of fp32 on handwritten digits; naive bf16 in place does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from zokernel.directions import Dense
from zokernel.optim import MeZO

STEPS, LR, EPS, DIRECTIONS = 120, 5e-4, 1e-2, 8
SEEDS = range(3)
START = 2.3  # the losses before training are 2.31 and, with the adapter, 2.32


@pytest.fixture(scope="module")
def digits():
    from zokernel.data import load_mnist

    images, labels = (torch.as_tensor(np.asarray(part[:2048])) for part in load_mnist()[:2])
    images = images.float().view(2048, -1)
    return (images - images.mean()) / images.std(), labels.long()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 10))


class Adapted(nn.Module):
    """The network with its weights frozen in some dtype and a LoRA adapter in fp32 on its first layer."""

    def __init__(self, dtype):
        super().__init__()
        self.base = network().to(dtype).requires_grad_(False)
        torch.manual_seed(1)
        self.down, self.up = nn.Linear(784, 8, bias=False), nn.Linear(8, 24, bias=False)

    def forward(self, images):
        first, relu, last = self.base
        hidden = first(images) + self.up(self.down(images.float())).to(images.dtype)
        return last(relu(hidden))


def train(digits, seed, *, dtype=torch.float32, autocast=False, lora=False, **settings):
    images, labels = digits
    model = Adapted(dtype) if lora else network().to(dtype)
    optimizer = MeZO(model, lr=LR, eps=EPS, num_perturbations=DIRECTIONS, seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows = torch.randint(len(images), (128,), generator=generator)

        def closure(rows=rows):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
                logits = model(images[rows].to(dtype))
            return nn.functional.cross_entropy(logits.float(), labels[rows])

        optimizer.step(closure)
    with torch.no_grad():
        return nn.functional.cross_entropy(model.float()(images), labels).item()


def train_naively(digits, seed):
    """Move bf16 weights up, down, back and on, each time rounded to nearest: what goes wrong without care."""
    images, labels = digits
    model = network().bfloat16()
    weights, directions = dict(model.named_parameters()), Dense("rademacher")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for step in range(STEPS):
            rows = torch.randint(len(images), (128,), generator=generator)
            for index in range(DIRECTIONS):
                z = directions(weights, seed=seed, step=step, index=index)
                losses = []
                for scale in (EPS, -2 * EPS):
                    for name, weight in weights.items():
                        weight.add_(z[name], alpha=scale)
                    logits = model(images[rows].bfloat16())
                    losses.append(nn.functional.cross_entropy(logits.float(), labels[rows]).item())
                slope = (losses[0] - losses[1]) / (2 * EPS)
                for name, weight in weights.items():
                    weight.add_(z[name], alpha=EPS)
                    weight.add_(z[name], alpha=-LR * slope / DIRECTIONS)
        return nn.functional.cross_entropy(model.float()(images), labels).item()


@pytest.fixture(scope="module")
def reference(digits):
    """Losses of fp32 by seed."""
    return np.array([train(digits, seed) for seed in SEEDS])


CASES = {
    "bf16 autocast": {"autocast": True},
    "bf16 autocast with in_forward": {"autocast": True, "perturb": "in_forward"},
    "bf16 weights": {"dtype": torch.bfloat16, "perturb": "in_forward"},
    "bf16 weights from a copy": {"dtype": torch.bfloat16, "perturb": "in_place:copy"},
    "fp16 weights": {"dtype": torch.float16, "perturb": "in_forward"},
}


def z_score(losses, reference):
    """Standard errors between the means of paired runs."""
    difference = np.array(losses) - reference
    return difference.mean() / (reference.std(ddof=1) / len(reference) ** 0.5)


@pytest.mark.parametrize("case", CASES)
def test_reaches_the_loss_of_fp32(digits, reference, case):
    losses = [train(digits, seed, **CASES[case]) for seed in SEEDS]
    assert reference.max() < START
    assert abs(z_score(losses, reference)) < 4


def test_an_adapter_on_a_bf16_base(digits):
    whole = np.array([train(digits, seed, lora=True) for seed in SEEDS])
    losses = [train(digits, seed, lora=True, dtype=torch.bfloat16) for seed in SEEDS]
    assert whole.max() < START
    assert abs(z_score(losses, whole)) < 4


def test_naive_bf16_does_not(digits, reference):
    losses = [train_naively(digits, seed) for seed in SEEDS]
    assert z_score(losses, reference) > 8
