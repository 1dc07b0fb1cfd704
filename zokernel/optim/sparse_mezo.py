"""Sparse-MeZO: only the small weights of each tensor are perturbed and trained."""

from __future__ import annotations

import torch
from torch import Tensor

from zokernel.directions import Sparse
from zokernel.directions.sparse import pack_bits
from zokernel.estimators.two_point import TwoPoint
from zokernel.optim.base import ZerothOrderOptimizer
from zokernel.optim.parameters import Params
from zokernel.optim.registry import register

CHUNK = 1 << 17
# Integer type of the same width, and the number of 16-bit digits in it.
BITS = {torch.float32: (torch.int32, 2), torch.bfloat16: (torch.int16, 1), torch.float16: (torch.int16, 1)}


@register("sparse_mezo")
class SparseMeZO(ZerothOrderOptimizer):
    r"""MeZO on directions :math:`m \odot z` with :math:`m_k = 1[|\theta_k| \le h]`, h a quantile of each tensor.

    The mask is taken from the weights when the optimizer is made and kept as one bit a weight, in the state too: masks
    recomputed later would differ between the two ends of a perturbation and drift with training.

    Args:
        params: A module, an iterable of tensors or ``(name, tensor)`` pairs, or parameter groups.
        lr: Learning rate.
        density: Share of each tensor that is trained: its smallest weights.
        eps: Radius of the perturbation, in units of the weights.
        num_perturbations: Directions a step; each costs two forward passes.
        distribution: Law of the trained coordinates: ``rademacher``, ``gaussian`` or ``uniform``.
        seed: Seed of all directions of the run.
        weight_decay: Decoupled weight decay; it applies to all weights.
        momentum: Heavy-ball momentum; needs one fp32 copy of the parameters when not zero.
        restore: ``fold``, ``grid`` or ``copy`` (see :class:`ZerothOrderOptimizer`).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([0.1, -0.2, 3.0, -4.0]))
        >>> optimizer = SparseMeZO([weight], lr=0.05, density=0.5)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> weight.detach().round(decimals=2).abs()
        tensor([0., 0., 3., 4.])
    """

    directions: Sparse

    def __init__(
        self,
        params: Params,
        lr: float = 1e-6,
        *,
        density: float = 0.25,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        distribution: str = "rademacher",
        seed: int = 0,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        restore: str = "fold",
    ):
        super().__init__(
            params,
            estimator=TwoPoint(eps, num_perturbations),
            directions=Sparse(distribution, density=density),
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            seed=seed,
            restore=restore,
        )
        masks = {
            name: mask_of_small(tensor.detach(), density)
            for name, tensor in self.named_params.items()
            if tensor.dtype in BITS and not hasattr(tensor, "device_mesh")
        }
        self.directions.load_state_dict({"masks": masks})
        self.directions.freeze(self.named_params)


def mask_of_small(weight: Tensor, density: float) -> Tensor:
    """Return which elements are among the smallest in magnitude, as packed bits, in a few megabytes of memory.

    Floating point magnitudes are ordered as their bit patterns are, so the threshold is found digit by digit from two
    histograms, a chunk of the tensor at a time.

    Args:
        weight: Any shape; float32, bfloat16 or float16.
        density: Share of the elements to keep; ties at the threshold are all kept.

    Returns:
        (ceil(n / 8),) uint8, least significant bit first, row-major.

    Example:
        >>> import torch
        >>> mask_of_small(torch.tensor([0.1, -3.0, 0.2, 5.0]), 0.5)
        tensor([5], dtype=torch.uint8)
    """
    flat = weight.reshape(-1)
    threshold = kth_magnitude(flat, round(density * flat.numel()))
    return torch.cat([pack_bits(chunk.abs() <= threshold) for chunk in flat.split(CHUNK)])


def kth_magnitude(values: Tensor, k: int) -> Tensor:
    """Return the k-th smallest magnitude (k from 1) of a vector, exactly; minus one for k = 0."""
    if k == 0:
        return torch.tensor(-1.0, dtype=values.dtype, device=values.device)
    patterns, digits = BITS[values.dtype]
    prefix = torch.zeros((), dtype=torch.int64, device=values.device)
    for shift in reversed(range(0, 16 * digits, 16)):
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=values.device)
        for chunk in values.split(CHUNK):
            bits = chunk.abs().view(patterns).to(torch.int64)
            alike = bits[(bits >> (shift + 16)) == (prefix >> (shift + 16))]
            counts += torch.bincount((alike >> shift) & 0xFFFF, minlength=1 << 16)
        cumulated = counts.cumsum(0)
        digit = torch.searchsorted(cumulated, torch.tensor(k, device=values.device))
        k -= int(cumulated[digit] - counts[digit])
        prefix += digit << shift
    return prefix.to(patterns).view(values.dtype)
