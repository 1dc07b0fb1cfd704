r"""What a step minimises on chats, instructions and texts: the mean negative log-likelihood of the tokens that count.

.. math:: L = -\frac{1}{N} \sum_{n=1}^{N} \log p(t_n \mid t_{<n})

over the :math:`N` scored tokens of all rows together, so that a long answer weighs more than a short one, as in trl.
The perplexity is :math:`e^L`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.finetune.scoring.language_head import row_losses, token_losses
from zokernel.finetune.scoring.padding_free import PaddingFree
from zokernel.finetune.scoring.shared_encoder import refuse_trained_embeddings


@dataclass(frozen=True)
class LanguageObjective:
    """Loss and perplexity of text; see :class:`zokernel.finetune.scoring.objective.Objective` for the methods.

    Args:
        whole: Compute the logits of all scored positions at once: for models whose head does not run block by block.
        padding_free: Lets short rows of a batch share one.
    """

    whole: bool = False
    padding_free: PaddingFree | None = None

    objective = "cross_entropy"
    can_stack = True

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return the loss of a batch as an fp32 scalar."""
        return token_losses(model, self.without_padding(batch), whole=self.whole).mean()

    def without_padding(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with short rows sharing one where that is less work, or as it is."""
        return batch if self.padding_free is None else self.padding_free(batch)

    def weight(self, batch: dict[str, Any]) -> float:
        """Return how many tokens the loss of a batch is a mean over."""
        return float((batch["targets"] >= 0).sum())

    def evaluate(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and as ``terms`` each row's sum of losses and number of tokens: (R, 2)."""
        losses_N = token_losses(model, self.without_padding(batch), whole=self.whole)[0]
        rows_N = (batch["targets"] >= 0).nonzero()[:, 0]
        sums_R = losses_N.new_zeros(len(batch["labels"])).index_add_(0, rows_N, losses_N)
        return losses_N.mean(), {"terms": torch.stack([sums_R, batch["labels"].to(sums_R)], 1)}

    def total_loss(self, prediction: Any) -> float:
        """Return the loss over a data set from the ``terms`` of its rows."""
        total, count = self.terms(prediction).sum(0).tolist()
        return total / count

    def terms(self, prediction: Any) -> Tensor:
        """Return each row's sum of losses and its number of tokens: (R, 2) float64."""
        return torch.as_tensor(prediction.predictions).double()

    def metrics(self, prediction: Any) -> dict[str, float]:
        """Return the perplexity over a data set."""
        return {"perplexity": perplexity(self.total_loss(prediction))}

    def example_terms(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return each row's sum of losses, and how many tokens that is over: (R, 2)."""
        if "decoder_input_ids" in batch:
            refuse_trained_embeddings(model)
        sums_R = row_losses(model, batch, whole=self.whole)
        return torch.stack([sums_R, batch["labels"].to(sums_R)], 1)

    def stacked(self, model: nn.Module, batch: dict[str, Any], copies: int) -> Tensor:
        """Return the loss of every copy of a batch that has been repeated, copy after copy: (copies,)."""
        if "decoder_input_ids" in batch:
            refuse_trained_embeddings(model)
        return token_losses(model, batch, copies=copies, whole=self.whole).mean(1)


def perplexity(loss: float) -> float:
    """Return the perplexity of a mean loss in nats; infinite if it is no number of Python's.

    Example:
        >>> perplexity(0.0), perplexity(1000.0)
        (1.0, inf)
    """
    return math.exp(loss) if loss < 700 else math.inf
