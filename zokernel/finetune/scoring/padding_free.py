r"""Batches without most of their padding: short rows share one, kept apart by the attention mask.

A padded batch of R rows computes R times the tokens of its longest row.  Where short rows share one, fewer tokens are
computed, but each attends over a longer row.  A token costs about :math:`24 H^2` operations in the matrices of a block
and :math:`4 H` for every place of its row.  Those of attention take up to four times as long (bf16, on a CPU), so that
r rows of L tokens cost

.. math:: r L \left(1 + \tfrac{4 L}{6 H}\right).

The number of rows for which that is least is taken, batch by batch.

Shapes: R rows of the padded batch, T tokens in each, r rows of L tokens that they share, K scored positions, H hidden.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.finetune.scoring.trial import score_tolerance, try_outputs
from zokernel.private_apis import attention_implementation

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


@dataclass(frozen=True)
class PaddingFree:
    """Lets rows of a batch share one where that is less work than padding.

    Args:
        hidden_size: Width of the model, H.

    Example:
        >>> mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
        >>> batch = {"attention_mask": mask, "input_ids": mask, "positions": torch.tensor([[5], [0], [2]])}
        >>> PaddingFree(hidden_size=576)(batch)["input_ids"].shape
        torch.Size([1, 10])
    """

    hidden_size: int

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch in fewer rows, or as it is."""
        lengths = _lengths(batch)
        count, length = batch["attention_mask"].shape
        least, best = self._work(count, length), None
        count = -(-sum(lengths) // length)
        while count:
            shared = share(lengths, count)
            if (work := self._work(count, shared.length)) < least:
                least, best = work, shared
            count //= 2
        return batch if best is None else in_shared_rows(batch, best)

    def _work(self, rows: int, length: int) -> float:
        return rows * length * (1 + 4 * length / (6 * self.hidden_size))


@dataclass(frozen=True)
class Shared:
    """Where rows of a batch are in the rows that they share.

    Attributes:
        count: Number of shared rows, r.
        length: Tokens in each, L.
        rows: The shared row that each row is in, R of them.
        begins: Where in it each row begins.
    """

    count: int
    length: int
    rows: tuple[int, ...]
    begins: tuple[int, ...]


def share(lengths: Sequence[int], count: int) -> Shared:
    """Return how rows of these lengths share so many: the longest first, each where least is so far.

    Example:
        >>> share([9, 2, 5, 4], 2)
        Shared(count=2, length=11, rows=(0, 0, 1, 1), begins=(0, 9, 0, 5))
    """
    filled = [(0, row) for row in range(count)]
    places = [(0, 0)] * len(lengths)
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        begin, row = heapq.heappop(filled)
        places[number] = (row, begin)
        heapq.heappush(filled, (begin + lengths[number], row))
    rows, begins = zip(*places)
    return Shared(count, max(filled)[0], rows, begins)


def in_shared_rows(batch: Batch, shared: Shared) -> Batch:
    """Return a padded batch in the rows that its rows share.

    Args:
        batch: What ``Collator`` or ``TextCollator`` returns for a causal language model.
        shared: Where its rows go.

    Returns:
        The same batch with ``input_ids``, ``attention_mask``, ``position_ids`` and ``segments`` (r, L); ``owners``
        (r, L), the row that each token comes from; ``rows`` (R,), the shared row that each row is in; and
        ``positions`` (R, K) in the shared rows.
    """
    real_RT = batch["attention_mask"].bool()
    R, T = real_RT.shape
    device = real_RT.device
    rows_R, begins_R = (torch.tensor(values, device=device) for values in (shared.rows, shared.begins))
    steps_T = torch.arange(T, device=device)
    target_N = (rows_R * shared.length + begins_R)[:, None].add(steps_T)[real_RT]

    def move(value_RT: Tensor, padding: int) -> Tensor:
        moved = value_RT.new_full((shared.count * shared.length,), padding)
        moved[target_N] = value_RT[real_RT]
        return moved.view(shared.count, shared.length)

    numbers_RT = torch.arange(R, device=device)[:, None].expand(R, T)
    return batch | {
        "input_ids": move(batch["input_ids"], 0),
        "attention_mask": move(batch["attention_mask"], 0),
        "position_ids": move(batch.get("position_ids", steps_T.expand(R, T)), 0),
        "segments": move(batch.get("segments", torch.zeros_like(numbers_RT)), -1),
        "owners": move(numbers_RT, -1),
        "rows": rows_R,
        "positions": batch["positions"] + begins_R[:, None],
    }


def _lengths(batch: Batch) -> list[int]:
    lengths: list[int] = batch["attention_mask"].sum(1).tolist()
    return lengths


@torch.no_grad()
def choose_padding_free(
    model: nn.Module,
    collator: Callable[[Sequence[Any]], Batch],
    dataset: Any,
    outputs: Callable[[nn.Module, Batch], Tensor],
) -> PaddingFree | None:
    """Return what lets rows share one, if the model gives the same outputs that way; None if it does not.

    The claim is checked, not looked up.  It is tried on CPUs, where the time of a forward goes with its tokens.

    Args:
        model: The model to train.
        collator: Batches examples.
        dataset: Encoded examples, of which the shortest and the longest are tried.
        outputs: Returns what is computed of a batch: scores or losses.
    """
    if not len(dataset) or next(model.parameters()).device.type != "cpu":
        return None
    by_length = dataset.longest(len(dataset))
    batch = collator([by_length[len(dataset) - 1], by_length[0]])
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
    shared = in_shared_rows(batch, share(_lengths(batch), 1))
    expected, (outputs_shared, reason) = outputs(model, batch), try_outputs(lambda: outputs(model, shared))
    if outputs_shared is not None:
        finite = expected.isfinite()
        error = ((outputs_shared - expected).abs() / expected.abs().clamp(min=1))[finite].max().item()
        reason = "" if error <= score_tolerance(model) else f"their scores would differ by {error:.2g}"
    if reason:
        logger.info("Batches stay padded, since this model cannot keep apart examples that share a row (%s).", reason)
        return None
    logger.info("Short examples of a batch share one row, without padding between them, where that is less work.")
    return PaddingFree(hidden_size)
