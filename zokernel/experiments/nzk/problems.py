"""The data and models of the NZK paper's experiments, each reduced to features, targets and a starting point."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from zokernel.kernels.features import Linearization, jacobian_features

# Shape suffixes: N examples, D parameters.


@dataclass(frozen=True)
class Problem:
    """One experiment's linear(ised) model and data, in float64.

    Attributes:
        features: Inputs of a linear model, or Jacobian rows of a network, (n, d).
        y: Targets, (n,).
        theta0: Initial weights, (d,).
        f0: Initial predictions, (n,).
        steps: Steps that the paper runs.
        lr: The paper's learning rate, the same for every curve.
        coordinate: Where each example is drawn on the horizontal axis of function plots, (n,).
        inputs: Raw inputs of the model, (n, ...).
        network: The network behind the features, or None for a linear model.
        linearization: Its Jacobian and own outputs, or None.
        notebook_lr: Learning rate that the notebook really uses: it divides by 100 where there are 200 examples.
        remarks: Sentences for the summary: what stands in for what.
    """

    features: Tensor
    y: Tensor
    theta0: Tensor
    f0: Tensor
    steps: int
    lr: float = 1e-3
    coordinate: Tensor = field(default_factory=lambda: torch.empty(0))
    inputs: Tensor = field(default_factory=lambda: torch.empty(0))
    network: nn.Module | None = None
    linearization: Linearization | None = None
    notebook_lr: float | None = None
    remarks: tuple[str, ...] = ()

    @property
    def kernel(self) -> Tensor:
        """The NTK, (n, n)."""
        return self.features @ self.features.T

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return self.features.shape[1]


def linear_problem(dim: int, noise: float, *, examples: int = 100, steps: int = 16_000, seed: int = 0) -> Problem:
    """Draw the paper's linear regression: rows of ``rand`` scaled to length one, integer weights from 1 to 9.

    With seed 0 and 100 examples the draws are those of the published notebooks (arXiv:2603.21169).

    Args:
        dim: Number of features.
        noise: Standard deviation of the target noise.
        examples: Number of examples.
        steps: Steps that the experiment runs.
        seed: Seed of the draws.

    Returns:
        The problem, in float64.

    Example:
        >>> [round(value, 4) for value in linear_problem(2, 0.05).theta0.tolist()]
        [1.541, -0.2934]
    """
    generator = torch.Generator().manual_seed(seed)
    theta0 = torch.randn(dim, 1, generator=generator)
    errors = torch.randn(examples, 1, generator=generator) * noise
    truth = torch.randint(1, 10, (dim, 1), generator=generator)
    x = torch.rand(examples, dim, generator=generator)
    x = (x / x.norm(dim=1, keepdim=True)).double()
    y = (x @ truth.double() + errors.double()).squeeze(1)
    theta = theta0.double().squeeze(1)
    return Problem(x, y, theta, x @ theta, steps, coordinate=x[:, 0], inputs=x)


def synthetic_network_problem(*, examples: int = 150, steps: int = 30_000, seed: int = 1) -> Problem:
    """Draw the paper's teacher and student, both 2-5-5-1 ReLU networks, on the unit circle.

    The teacher's parameters are standard normal; the student starts as PyTorch initialises it; its Jacobian rows are
    scaled to length one, as published (so this is not the student's own tangent kernel), and predictions start from
    the student's own outputs: with seed 1 and 150 points the first loss is 14.68, where the notebook prints 14.7.

    Args:
        examples: Number of points on the circle.
        steps: Steps that the experiment runs.
        seed: Seed of the draws.

    Returns:
        The problem, in float64.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = _mlp(2, 5, 5, 1)
        for parameter in teacher.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(examples, 2)
        x = (x / x.norm(dim=1, keepdim=True)).double()
        student = _mlp(2, 5, 5, 1).double()
    with torch.no_grad():
        y = teacher.double()(x).squeeze(1)
    angle = torch.atan2(x[:, 1], x[:, 0])
    problem = _network_problem(student, x, y, steps, coordinate=angle, normalize=True)
    assert problem.linearization is not None
    return replace(problem, f0=problem.linearization.outputs)


def image_network_problem(
    images: np.ndarray, labels: np.ndarray, *, per_class: int, steps: int = 16_000, seed: int = 0
) -> Problem:
    """Prepare two classes of images for the paper's 64-10-5-1 ReLU network: grey, 8 x 8, targets 0 and 1.

    Args:
        images: (N, H, W) or (N, H, W, 3) uint8.
        labels: (N,), of exactly two classes; the smaller becomes 0.
        per_class: Examples drawn from each class, without replacement.
        steps: Steps that the experiment runs.
        seed: Seed of the choice and of the network.

    Returns:
        The problem, in float64.
    """
    indices, y = _choose(labels, per_class, seed)
    x = shrink(images[indices])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _mlp(64, 10, 5, 1).double()
    problem = _network_problem(network, x, y, steps, coordinate=torch.arange(len(y)).double())
    return replace(problem, notebook_lr=2 * problem.lr)


def projected_image_problem(
    images: np.ndarray, labels: np.ndarray, *, per_class: int, steps: int = 16_000, seed: int = 0
) -> Problem:
    """Prepare two classes of digits for the paper's linear model on a random projection to 24 numbers.

    Args:
        images: (N, 28, 28) uint8.
        labels: (N,), of exactly two classes; the smaller becomes 0.
        per_class: Examples drawn from each class, without replacement.
        steps: Steps that the experiment runs.
        seed: Seed of the choice, the projection and the weights.

    Returns:
        The problem, in float64.
    """
    indices, y = _choose(labels, per_class, seed)
    flat = torch.as_tensor(images[indices]).double().flatten(1) / 255
    generator = torch.Generator().manual_seed(seed)
    projection = 0.5 * torch.randn(flat.shape[1], 24, generator=generator).double() / 10
    theta = torch.randn(24, generator=generator).double()
    x = flat @ projection
    return Problem(x, y, theta, x @ theta, steps, coordinate=torch.arange(len(y)).double(), inputs=x)


def shrink(images: np.ndarray, size: int = 8) -> Tensor:
    """Return images as grey values in [0, 1], bilinearly resized to ``size`` squared and flattened, (N, size^2).

    Args:
        images: (N, H, W) or (N, H, W, 3) uint8.
        size: Side of the result.

    Returns:
        Flattened images in float64.
    """
    grey = torch.as_tensor(images).double() / 255
    if grey.ndim == 4:
        grey = grey @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    resized = nn.functional.interpolate(grey[:, None], (size, size), mode="bilinear", align_corners=False)
    return resized.flatten(1)


def stand_in_images(
    side: int, per_class: int, classes: tuple[int, int], seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return made-up two-class images: a smooth random pattern for each class, plus noise; no download.

    Args:
        side: Height and width.
        per_class: Images of each class.
        classes: The two class numbers.
        seed: Seed of the draws.

    Returns:
        Images (2 per_class, side, side) uint8 and labels.
    """
    rng = np.random.default_rng(seed)
    coarse = torch.as_tensor(rng.random((2, 1, 5, 5)))
    patterns = nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1).numpy()[:, 0]
    labels = np.repeat(np.array(classes, dtype=np.uint8), per_class)
    images = patterns[(labels == classes[1]).astype(int)] * 200 + rng.normal(0, 40, (2 * per_class, side, side))
    return np.clip(images, 0, 255).astype(np.uint8), labels


Loader = Callable[[], tuple[np.ndarray, np.ndarray]]


def _choose(labels: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, Tensor]:
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    indices = np.concatenate([rng.choice(np.flatnonzero(labels == one), per_class, replace=False) for one in classes])
    y = torch.arange(len(classes)).repeat_interleave(per_class).double()
    return indices, y


def _mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _network_problem(
    network: nn.Module, x: Tensor, y: Tensor, steps: int, *, coordinate: Tensor, normalize: bool = False
) -> Problem:
    linear = jacobian_features(network, x, normalize=normalize)
    return Problem(
        linear.features,
        y,
        linear.theta,
        linear.initial_predictions(offset=False),
        steps,
        coordinate=coordinate,
        inputs=x,
        network=network,
        linearization=linear,
    )
