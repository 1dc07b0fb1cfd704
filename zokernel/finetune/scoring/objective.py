r"""What a step minimises and what an evaluation reports.

The loss is the task's own (cross entropy over options, or of the right answer's tokens), or one that has no gradient:
:math:`1 - accuracy` or :math:`1 - F_1`, which forward passes can descend all the same (MeZO, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernel.errors import UsageError
from zokernel.finetune.scoring.decoding import greedy_answers
from zokernel.finetune.scoring.options import classification_loss, mean_scores, option_logprobs, option_scores
from zokernel.finetune.tasks.metrics import exact_match, macro_f1, token_f1

OBJECTIVES = ("cross_entropy", "accuracy", "f1")


@dataclass(frozen=True)
class Objective:
    """Loss and metrics of a task.

    Args:
        objective: ``cross_entropy``, or the metric to maximise directly: ``accuracy`` or ``f1``.
        loss: The cross entropy: over ``options``, or of the right ``answer``'s tokens.
        kind: ``classification``, ``choice`` or ``generation``.
        tokenizer: Needed to generate.
        max_new_tokens: Longest generated answer.
        calibration: A batch of one content-free example whose scores are subtracted when options are compared in an
            evaluation (``None``: no calibration).

    Raises:
        UsageError: If there is no such objective, or it does not fit the kind of task.
    """

    objective: str = "cross_entropy"
    loss: str = "options"
    kind: str = "classification"
    tokenizer: Any = None
    max_new_tokens: int = 50
    calibration: dict[str, Any] | None = None

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise UsageError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}.")
        if self.kind == "generation" and self.objective == "accuracy":
            raise UsageError("Generated answers are scored by f1: use --objective f1 or cross_entropy.")
        if self.kind == "choice" and self.objective == "f1":
            raise UsageError("F1 over options that differ between examples means nothing: use --objective accuracy.")

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return the loss of a batch as an fp32 scalar."""
        if self.objective == "cross_entropy":
            return self._scored(model, batch)[0]
        if self.kind == "generation":
            return 1 - torch.tensor([f1 for f1, _ in self._generated(model, batch)]).mean()
        return self._missed(option_scores(model, batch), batch)

    def evaluate(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and ``logits`` (B, C), ``predicted`` (B,) and ``values`` (B, M) of the metrics."""
        loss, scores_BC = self._scored(model, batch)
        if self.kind == "generation":
            values = torch.tensor(self._generated(model, batch), device=scores_BC.device)
            if self.objective == "f1":
                loss = 1 - values[:, 0].mean()
            return loss, {"logits": scores_BC, "predicted": batch["labels"], "values": values}
        if self.objective != "cross_entropy":
            loss = self._missed(scores_BC, batch)
        if self.calibration is not None:
            moved = {
                key: value.to(scores_BC.device) if isinstance(value, Tensor) else value
                for key, value in self.calibration.items()
            }
            scores_BC = scores_BC - option_scores(model, moved)
        predicted = scores_BC.argmax(-1)
        return loss, {"logits": scores_BC, "predicted": predicted, "values": _right(predicted, batch)[:, None].float()}

    def metrics(self, prediction: Any) -> dict[str, float]:
        """Return the metrics over a data set, as ``transformers.Trainer`` asks for them."""
        _, predicted, values = map(torch.as_tensor, prediction.predictions)
        means = values.float().mean(0).tolist()
        if self.kind == "generation":
            return {"f1": means[0], "em": means[1]}
        found = {"accuracy": means[0]}
        if self.kind == "classification":
            found["f1"] = macro_f1(predicted, torch.as_tensor(prediction.label_ids))
        return found

    @property
    def can_stack(self) -> bool:
        """Whether the loss of several copies of a batch can be taken in one forward."""
        return self.objective == "cross_entropy"

    def stacked(self, model: nn.Module, batch: dict[str, Any], copies: int) -> Tensor:
        """Return the loss of every copy of a batch that has been repeated, copy after copy: (copies,).

        Raises:
            UsageError: If the objective needs more than one forward, or is not a mean over examples.
        """
        if not self.can_stack:
            raise UsageError(f"--objective {self.objective} takes one forward a loss: leave out --perturb stacked.")
        labels = batch["labels"]
        if self.loss == "options":
            losses = F.cross_entropy(option_scores(model, batch).float(), labels, reduction="none")
            return losses.view(copies, -1).mean(1)
        right = labels[:, None]
        sums, counts = (found.gather(1, right).view(copies, -1).sum(1) for found in option_logprobs(model, batch))
        return -sums / counts

    def _scored(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the cross entropy and the options' scores."""
        labels = batch["labels"]
        if self.loss == "options":
            scores_BC = option_scores(model, batch)
            return classification_loss(scores_BC, labels), scores_BC
        sums, counts = option_logprobs(model, batch)
        right = labels[:, None]
        # Averaged over the batch's tokens, as published: a long answer weighs more than a short one.
        loss = -sums.gather(1, right).sum() / counts.gather(1, right).sum()
        mask = batch.get("option_mask", torch.ones_like(counts, dtype=torch.bool))
        return loss, mean_scores(sums, counts, mask)

    def _missed(self, scores_BC: Tensor, batch: dict[str, Any]) -> Tensor:
        predicted = scores_BC.argmax(-1)
        if self.objective == "f1":
            return torch.tensor(1 - macro_f1(predicted, batch["labels"]), device=scores_BC.device)
        return 1 - _right(predicted, batch).float().mean()

    def _generated(self, model: nn.Module, batch: dict[str, Any]) -> list[tuple[float, float]]:
        answers = greedy_answers(
            model, self.tokenizer, batch["prompts"], batch["prompts_mask"], max_new_tokens=self.max_new_tokens
        )
        return [(token_f1(a, refs), exact_match(a, refs)) for a, refs in zip(answers, batch["references"])]


def _right(predicted_B: Tensor, batch: dict[str, Any]) -> Tensor:
    """Return whether each prediction is (one of) the right options."""
    if "correct" in batch:
        return batch["correct"].gather(1, predicted_B[:, None])[:, 0]
    return predicted_B == batch["labels"]
