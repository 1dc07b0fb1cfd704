r"""``--method auto``: settings chosen from the kernel theory and from what was measured on real tasks.

Each choice has its reason; each can be overridden by its own flag.

- *Batch.*  With a gradient noise scale :math:`\nu = tr\Sigma/\|g\|^2` a step's progress goes like
  :math:`1/(1 + \nu/b)` at batch size b, so the tokens to a given loss go like :math:`b + \nu`: a batch well below
  :math:`\nu` (6 to 14 at the start of SST-2 and TREC) wastes none.
- *Directions.*  One-sided differences share the loss at the centre: P + 1 forwards instead of 2P.  Their error falls
  like 1/P until that of the b examples takes over, so P grows with b: half of it.
- *Adapters* of LoRA are trained in the last third of the layers.  What a direction is worth is
  :math:`\|g\|^2/tr F`, the alignment of the examples' kernels; there it is 2.8 times (SST-2) and 1.2 times (TREC) that
  of all adapters.
- *Schedule.*  A rate that falls to zero can begin larger.

``docs/results/queries.md`` has the measurements, and where they do not help.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from zokernel.directions.blockwise import layer_of, natural_order

if TYPE_CHECKING:
    from zokernel.finetune.config import ZOConfig

logger = logging.getLogger(__name__)

METHOD = "forward_difference"
BATCH = 4
# Learning rate for each direction of a step, by what is trained.
RATES = {"full parameters": 6e-5, "LoRA": 1e-2, "virtual tokens": 1e-2}
LORA_EPS = 1e-2


def choose_settings(config: ZOConfig) -> None:
    """Fill in what ``method="auto"`` leaves open, and log it.

    Args:
        config: The run's settings; ``method`` becomes the method that was chosen.
    """
    config.method = METHOD
    if config.per_device_train_batch_size is None:
        config.per_device_train_batch_size = BATCH
    if config.lr_scheduler_type is None:
        config.lr_scheduler_type = "linear"
    if config.num_perturbations is None:
        config.num_perturbations = max(2, config.per_device_train_batch_size // 2)
    logger.info(
        "Method auto: %s with %d directions a step, batch %d, %s learning rate.",
        METHOD,
        config.num_perturbations,
        config.per_device_train_batch_size,
        config.lr_scheduler_type,
    )


def learning_rate(config: ZOConfig, trained: str) -> float:
    """Return the default rate for what is trained; more directions bear a larger one.

    Example:
        >>> from types import SimpleNamespace
        >>> learning_rate(SimpleNamespace(num_perturbations=2), "full parameters")
        0.00012
    """
    assert config.num_perturbations is not None
    return RATES[trained] * config.num_perturbations


def choose_adapters(model: nn.Module) -> None:
    """Leave only the adapters of the last third of the layers to be trained, and log it.

    Args:
        model: A model with a new LoRA adapter, which adds nothing yet where it is not trained.
    """
    weights = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kept = {name for name, _ in in_last_third(weights)}
    for name, parameter in weights:
        parameter.requires_grad_(name in kept)
    logger.info("Method auto: %d of %d adapter weights are trained, in the last third.", len(kept), len(weights))


def in_last_third(weights: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return the weights of the last third of a model's layers: all of them, if it has fewer than three.

    Args:
        weights: ``(name, tensor)`` pairs, numbered by layer as in ``layers.7.self_attn``.

    Returns:
        Those pairs, in their order.

    Example:
        >>> [name for name, _ in in_last_third([(f"layers.{n}.lora_A", None) for n in range(6)])]
        ['layers.4.lora_A', 'layers.5.lora_A']
    """
    layers = list(dict.fromkeys(layer_of(name) for name, _ in weights))
    layers.sort(key=natural_order)
    kept = set(layers[len(layers) - len(layers) // 3 :] if len(layers) >= 3 else layers)
    return [(name, tensor) for name, tensor in weights if layer_of(name) in kept]
