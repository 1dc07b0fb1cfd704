"""zokernel: fine-tune neural networks with forward passes only, and understand that training through its kernels.

Subpackages load on first use, so ``import zokernel`` stays cheap and plain PyTorch users never import transformers:

    directions   seeded, position-addressable random directions, added to the weights without being stored
    estimators   projected gradients from forward passes (two-point, kernel-smoothed, Richardson, ...)
    optim        zeroth-order optimizers: MeZO, KerZOO and those they are compared to
    kernels      eNTK, ZO-eNTK and NZK of any model
    theory       the closed forms behind them; no model needed
    dynamics     what one step, or a whole run, does to the model's outputs
    finetune     the Hugging Face trainer, tasks and scoring
    data         models and data that install from package registries; local files
    experiments  every figure and table of the three papers
"""

from __future__ import annotations

from zokernel._lazy import lazy_exports

__all__, __getattr__, __dir__ = lazy_exports(__name__)  # the names of __init__.pyi
