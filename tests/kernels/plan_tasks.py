"""A small task whose gradients are known, for the tests of plans."""

from __future__ import annotations

import torch
from cases import mlp

from zokernel.kernels.prober import ProbedTask


def small_task(classes=2, update=6, observe=3, seed=0) -> ProbedTask:
    torch.manual_seed(seed)
    net = mlp((5, 16, classes)).double()
    x = torch.randn(update + observe, 5).double()
    labels = torch.randint(0, classes, (update + observe,))
    return ProbedTask(dict(net.named_parameters()), net, x, labels, update, num_tokens=update + observe)
