r"""The paper's network: the LeNet with exactly 29,624 parameters, and how it is trained.

The paper states only d = 29,624.  One architecture of that size fits its description: Ren and Sutherland's MNIST LeNet
(convolutions 6 and 16, average pooling, tanh, fully connected 60 and 42).  Their recipe: 2,000 images, batches of 64,
SGD with learning rate 1e-3, momentum 0.9 and weight decay 5e-4, cosine schedule over 100 epochs, no normalisation.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zokernel.errors import RunError
from zokernel.experiments.base import Config

logger = logging.getLogger(__name__)

NUM_PARAMETERS = 29_624
CHECKPOINTS = ("init", "partial", "trained")


def lenet(seed: int = 0) -> nn.Sequential:
    """Return the LeNet with PyTorch's default initialisation.

    Args:
        seed: Seed of the initialisation (the global random state is left alone).

    Returns:
        The network, in eval mode.

    Raises:
        RunError: If it does not have 29,624 parameters.

    Example:
        >>> sum(p.numel() for p in lenet().parameters())
        29624
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 60),
            nn.Tanh(),
            nn.Linear(60, 42),
            nn.Tanh(),
            nn.Linear(42, 10),
        ).eval()
    count = sum(parameter.numel() for parameter in net.parameters())
    if count != NUM_PARAMETERS:
        raise RunError(f"The LeNet has {count} parameters instead of {NUM_PARAMETERS}.")
    return net


@dataclass(frozen=True)
class Digits:
    """Digits scaled to [0, 1].

    Attributes:
        train_x: (n, 1, 28, 28).
        train_y: (n,).
        test_x: (m, 1, 28, 28).
        test_y: (m,).
        source: What the images are, for summaries.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    source: str

    def first_of_each(self, num_classes: int = 10) -> Tensor:
        """Return the first test image of each class, (10, 1, 28, 28)."""
        return torch.stack([self.test_x[self.test_y == label][0] for label in range(num_classes)])


def load_digits(config: Config) -> Digits:
    """Return full MNIST, or at smoke scale synthetic strokes that need no download.

    Args:
        config: The experiment's configuration.

    Returns:
        The images.
    """
    if config.scale == "smoke":
        return synthetic_digits(config.seed)
    from zokernel.data import load_mnist

    train_x, train_y, test_x, test_y = (torch.as_tensor(part) for part in load_mnist())
    scale = [images.float().div(255)[:, None] for images in (train_x, test_x)]
    return Digits(scale[0], train_y.long(), scale[1], test_y.long(), "MNIST (60,000 / 10,000)")


def synthetic_digits(seed: int, train: int = 600, test: int = 100) -> Digits:
    """Return ten smooth random patterns with shifts and noise: a stand-in with ten learnable classes."""
    generator = torch.Generator().manual_seed(1000 + seed)
    coarse = torch.rand(10, 1, 5, 5, generator=generator)
    patterns = nn.functional.interpolate(coarse, size=(28, 28), mode="bicubic").clamp(0, 1) ** 2

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % 10
        shifts = torch.randint(-2, 3, (count, 2), generator=generator)
        shifted = [patterns[y].roll((int(a), int(b)), (1, 2)) for y, (a, b) in zip(labels, shifts, strict=True)]
        noise = 0.1 * torch.randn(count, 1, 28, 28, generator=generator)
        return (torch.stack(shifted) + noise).clamp(0, 1), labels

    return Digits(*draw(train), *draw(test), "synthetic patterns (no download)")


def train(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    seed: int = 0,
    lr: float = 1e-3,
    batch_size: int = 64,
    horizon: int | None = None,
) -> nn.Module:
    """Train in place with the reference recipe.

    Args:
        net: The network.
        x: Images.
        y: Labels.
        epochs: Passes over the images.
        seed: Seed of the order.
        lr: Peak learning rate.
        batch_size: Images per step.
        horizon: Epochs of the cosine schedule; ``epochs`` when ``None``.

    Returns:
        The network, in eval mode.
    """
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=horizon or epochs, eta_min=1e-6)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
    return net.eval()


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images classified correctly."""
    with torch.no_grad():
        return (net(x).argmax(1) == y).float().mean().item()


@dataclass(frozen=True)
class Checkpoints:
    """LeNets at three stages of one training run.

    Attributes:
        nets: ``init``, ``partial`` and ``trained``.
        accuracies: Their test accuracies.
        digits: The data.
        recipe: How they were trained, in words.
    """

    nets: dict[str, nn.Module]
    accuracies: dict[str, float]
    digits: Digits
    recipe: str


def updated_image(digits: Digits, label: int) -> Tensor:
    """Return the first training image of a class, (1, 1, 28, 28): the example that a step is taken on."""
    return digits.train_x[digits.train_y == label][:1]


_TRAINED: dict[str, Checkpoints] = {}


def checkpoints(config: Config) -> Checkpoints:
    """Train the LeNet and keep it at initialisation, part of the way, and at the end.

    ``init`` is untrained, ``partial`` has seen one epoch of the training set at a tenth of the rate, ``trained`` all
    of them.  Experiments of one process share the networks.

    Args:
        config: The experiment's configuration.

    Returns:
        The three networks with their test accuracies.
    """
    key = repr(config)
    if key in _TRAINED:
        return _TRAINED[key]
    digits = load_digits(config)
    epochs = config.pick("epochs", smoke=3, cpu=4, full=20)
    lr = config.pick("lr", smoke=1e-1, cpu=2e-2)
    nets: dict[str, nn.Module] = {"init": lenet(config.seed)}
    nets["partial"] = train(
        lenet(config.seed), digits.train_x, digits.train_y, epochs=1, seed=config.seed, lr=lr / 10, horizon=epochs
    )
    nets["trained"] = train(lenet(config.seed), digits.train_x, digits.train_y, epochs=epochs, seed=config.seed, lr=lr)
    accuracies = {name: accuracy(net, digits.test_x, digits.test_y) for name, net in nets.items()}
    recipe = f"{digits.source}; partial: 1 epoch, trained: {epochs} epochs of SGD (momentum 0.9, peak rate {lr:g})"
    logger.info("LeNet on %s; test accuracy %s", digits.source, accuracies)
    _TRAINED[key] = Checkpoints(nets, accuracies, digits, recipe)
    return _TRAINED[key]
