r"""Batches without padding: the rows of a batch laid end to end, kept apart by the attention mask.

A padded batch of R rows computes as many tokens as R times its longest row.  Laid end to end the model computes only
the real ones, but each of the N tokens attends over N places instead of T.  A token costs about :math:`24 H^2`
operations in the matrices of a block and :math:`4 H` per place that it attends over, so that the work is

.. math:: R T (1 + \tfrac{T}{6 H}) \quad\text{padded,}\qquad N (1 + \tfrac{N}{6 H}) \quad\text{laid end to end.}

The smaller is taken, batch by batch.

Shapes: R rows, T tokens of the longest row, N tokens of all rows together, K scored positions per row, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.finetune.scoring.options import score_tolerance
from zokernel.private_apis import attention_implementation

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


@dataclass(frozen=True)
class PaddingFree:
    """Lays the rows of a batch end to end where that is less work than padding.

    Args:
        hidden_size: Width of the model, H.

    Example:
        >>> mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
        >>> batch = {"attention_mask": mask, "input_ids": mask, "positions": torch.tensor([[5], [0], [1]])}
        >>> PaddingFree(hidden_size=576)(batch)["input_ids"].shape
        torch.Size([1, 9])
    """

    hidden_size: int

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch laid end to end, or as it is."""
        rows, length = batch["attention_mask"].shape
        tokens = int(batch["attention_mask"].sum())
        padded, end_to_end = (n * (1 + t / (6 * self.hidden_size)) for n, t in ((rows * length, length), (tokens,) * 2))
        return laid_end_to_end(batch) if end_to_end < padded else batch


def laid_end_to_end(batch: Batch) -> Batch:
    """Return a padded batch as one row.

    Args:
        batch: What ``Collator`` or ``TextCollator`` returns for a causal language model.

    Returns:
        The same batch with ``input_ids``, ``attention_mask``, ``position_ids`` and ``segments`` (1, N), ``rows``
        (1, N), which row each token comes from, and ``positions`` (R, K) counted from the first row's beginning.
    """
    real_RT = batch["attention_mask"].bool()
    R, T = real_RT.shape
    device = real_RT.device
    lengths_R = real_RT.sum(1)
    begins_R = lengths_R.cumsum(0) - lengths_R
    places_RT = batch.get("position_ids", torch.arange(T, device=device).expand(R, T))
    segments_RT = batch.get("segments", torch.zeros(R, T, dtype=torch.long, device=device))
    numbers_RT = torch.arange(R, device=device)[:, None].expand(R, T)
    together = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "position_ids": places_RT,
        "segments": segments_RT,
        "rows": numbers_RT,
    }
    one_row = {name: value[real_RT][None] for name, value in together.items()}
    return batch | one_row | {"positions": batch["positions"] + begins_R[:, None]}


@torch.no_grad()
def choose_padding_free(
    model: nn.Module,
    collator: Callable[[Sequence[Any]], Batch],
    dataset: Any,
    outputs: Callable[[nn.Module, Batch], Tensor],
) -> PaddingFree | None:
    """Return what lays batches end to end, if the model gives the same outputs that way; None if it does not.

    The claim is checked, not looked up.  It is tried on CPUs, where the time of a forward goes with its tokens.

    Args:
        model: The model to train.
        collator: Batches examples.
        dataset: Encoded examples, of which the two with the shortest and longest prompts are tried.
        outputs: Returns what is computed of a batch: scores or losses.
    """
    items = sorted((dataset[i] for i in range(len(dataset))), key=lambda item: len(item["input_ids"]))
    device = next(model.parameters()).device
    if not items or device.type != "cpu":
        return None
    batch = collator(items[:1] + items[-1:])
    text = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
    hidden_size = getattr(text, "hidden_size", None)
    config = getattr(model, "peft_config", None) or {}
    if (
        "decoder_input_ids" in batch
        or "masked" in batch
        or hidden_size is None
        or attention_implementation(model) not in ("sdpa", "eager")
        or any(c.is_prompt_learning for c in config.values())
    ):
        return None
    layout = PaddingFree(hidden_size)
    if layout(batch) is batch:
        return None
    expected = outputs(model, batch)
    try:
        found = outputs(model, laid_end_to_end(batch))
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    finite = expected.isfinite()
    error = ((found - expected).abs() / expected.abs().clamp(min=1))[finite].max()
    if not error <= score_tolerance(model):
        return None
    logger.info("Batches are laid end to end, without padding, where that is less work.")
    return layout
