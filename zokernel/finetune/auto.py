r"""``--method auto``: settings chosen from the kernel theory and from what was measured on real tasks.

Each choice has its reason; each can be overridden by its own flag.

- *Batch.*  With a gradient noise scale :math:`\nu = tr\Sigma/\|g\|^2` a step's progress goes like
  :math:`1/(1 + \nu/b)` at batch size b, so the tokens to a given loss go like :math:`b + \nu`: a batch well below
  :math:`\nu` (6 to 14 at the start of SST-2 and TREC) wastes none.
- *Directions.*  One-sided differences share the loss at the centre: P + 1 forwards instead of 2P.  Their error falls
  like 1/P until that of the b examples takes over, so P grows with b: half of it.
- *Step.*  Slopes are divided by their running root mean square, so the learning rate is a distance, and grows with the
  directions.  Slopes of TREC are 1.6 (all weights) and 3 times (LoRA) those of SST-2, and so are the rates that either
  bears without it.  Where the loss is low, a share of Polyak's step is shorter and bounds it: :math:`P / (P + 1 + r)`
  of it descends fastest, and about a third was best for eight directions on both tasks (r = 15 or so).
- *Schedule.*  A rate that falls to zero can begin larger.

``docs/results/queries.md`` has the measurements, and where they do not help.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from zokernel.errors import UsageError

if TYPE_CHECKING:
    from zokernel.finetune.config import ZOConfig

logger = logging.getLogger(__name__)

METHOD = "forward_difference"
BATCH = 4
# Learning rate of normalised slopes at one direction a step, by what is trained; measured at two and eight.
RATES = {"full parameters": 3e-3, "LoRA": 1.25e-2, "virtual tokens": 1.25e-2}
POLYAK_SHARE = 0.35
LORA_EPS = 2e-2


def choose_settings(config: ZOConfig) -> None:
    """Fill in what ``method="auto"`` leaves open, and log it.

    Args:
        config: The run's settings; ``method`` becomes the method that was chosen.

    Raises:
        UsageError: If slopes are not to be normalised and no learning rate is given.
    """
    config.method = METHOD
    given = list(config.method_args or [])
    if not any(pair.startswith("normalize=") for pair in given):
        bound = [] if any(pair.startswith("polyak_share=") for pair in given) else [f"polyak_share={POLYAK_SHARE}"]
        config.method_args = [*given, "normalize=true", *bound]
    elif config.learning_rate is None:
        raise UsageError("The rate that method auto chooses is one for normalised slopes: give --learning_rate too.")
    if config.per_device_train_batch_size is None:
        config.per_device_train_batch_size = BATCH
    if config.lr_scheduler_type is None:
        config.lr_scheduler_type = "linear"
    if config.num_perturbations is None:
        config.num_perturbations = max(2, config.per_device_train_batch_size // 2)
    logger.info(
        "Method auto: %s (%s) with %d directions a step, batch %d, %s learning rate.",
        METHOD,
        ", ".join(config.method_args or []),
        config.num_perturbations,
        config.per_device_train_batch_size,
        config.lr_scheduler_type,
    )


def learning_rate(config: ZOConfig, trained: str) -> float:
    """Return the default rate for what is trained: so much for every direction.

    Example:
        >>> from types import SimpleNamespace
        >>> learning_rate(SimpleNamespace(num_perturbations=2), "full parameters")
        0.006
    """
    assert config.num_perturbations is not None
    return RATES[trained] * config.num_perturbations
