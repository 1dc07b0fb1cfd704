"""The optimizer of a run, with the parameter groups of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zokernel.finetune.settings.config import ZOConfig
from zokernel.optim import ZerothOrder, get_method, method_options


def make_optimizer(model: nn.Module, decayed_names: Sequence[str], args: ZOConfig) -> Any:
    """Return the optimizer of ``args.method`` on the trainable parameters, keyed by their names.

    Args:
        model: The model.
        decayed_names: Names of the parameters to which weight decay applies.
        args: The settings of the run.  ``auto`` and ``stacked`` leave the method's own way of perturbing.
    """
    options = args.method_options()
    weight_decay = options.pop("weight_decay", 0.0)
    if args.perturb not in ("auto", "stacked") and "perturb" in method_options(args.method):
        options["perturb"] = args.perturb
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in parameters if n in set(decayed_names)], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in parameters if n not in set(decayed_names)], "weight_decay": 0.0},
    ]
    method: Any = get_method(args.method)
    optimizer: torch.optim.Optimizer = method(
        [group for group in groups if group["params"]], lr=args.learning_rate, **options
    )
    if isinstance(optimizer, ZerothOrder):
        optimizer.watches_loss = False  # the trainer takes the first loss twice
    return optimizer
