r"""What a step minimises and what an evaluation reports.

A loss is a mean: over examples, or over the tokens of the right answers.  :meth:`Objective.weight` says over how many
terms, so that the losses of several batches can be averaged into that of all of them together.

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
from zokernel.finetune.data.collate import to_device
from zokernel.finetune.scoring.decoding import greedy_answers
from zokernel.finetune.scoring.options import classification_loss, mean_scores, option_logprobs, option_scores
from zokernel.finetune.scoring.padding_free import PaddingFree
from zokernel.finetune.scoring.shared_encoder import refuse_trained_embeddings
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
        ending: What marks the end of a generated answer.
        calibration: A batch of one content-free example whose scores are subtracted when options are compared in an
            evaluation (``None``: no calibration).
        padding_free: Lets short rows of a batch share one (``None``: they stay padded).

    Raises:
        UsageError: If there is no such objective, or it does not fit the kind of task.
    """

    objective: str = "cross_entropy"
    loss: str = "options"
    kind: str = "classification"
    tokenizer: Any = None
    max_new_tokens: int = 50
    ending: str = "\n"
    calibration: dict[str, Any] | None = None
    padding_free: PaddingFree | None = None

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise UsageError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}.")
        if self.kind == "generation" and self.objective == "accuracy":
            raise UsageError("Generated answers are scored by f1: use objective f1 or cross_entropy.")
        if self.kind == "choice" and self.objective == "f1":
            raise UsageError("F1 over options that differ between examples means nothing: use objective accuracy.")

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return the loss of a batch as an fp32 scalar."""
        batch = self.without_padding(batch)
        if self.objective == "cross_entropy":
            if self.loss == "options":
                return classification_loss(option_scores(model, batch), batch["labels"])
            return self._score(model, batch)[0]
        if self.kind == "generation":
            return 1 - torch.tensor([f1 for f1, _ in self._score_generated(model, batch)]).mean()
        return self._metric_loss(option_scores(model, batch), batch)

    def weight(self, batch: dict[str, Any]) -> float:
        """Return how many terms the loss of a batch is a mean over: scored tokens, or examples."""
        if self.objective == "cross_entropy" and self.loss == "answer":
            return float(_answer_tokens(batch).sum())
        return float(len(batch["labels"]))

    def evaluate(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Evaluate a batch.

        Returns:
            The loss, and by name ``logits`` (B, C), ``predicted`` (B,), ``values`` (B, M) of the metrics, and ``terms``
            (B, 2): sums and counts whose totals give the loss of any set of examples (see :meth:`total_loss`).  The F1
            of classes has no such sums, and has the predicted class in their place.
        """
        batch = self.without_padding(batch)
        loss, scores_BC, terms_B2 = self._score(model, batch)
        if self.kind == "generation":
            values = torch.tensor(self._score_generated(model, batch), device=scores_BC.device)
            if self.objective == "f1":
                loss, terms_B2 = 1 - values[:, 0].mean(), _as_terms(1 - values[:, 0])
            return loss, {"logits": scores_BC, "predicted": batch["labels"], "values": values, "terms": terms_B2}
        if self.objective != "cross_entropy":
            loss = self._metric_loss(scores_BC, batch)
            uncalibrated = scores_BC.argmax(-1)
            wrong = 1 - _is_right(uncalibrated, batch).float()
            terms_B2 = _as_terms(uncalibrated.float() if self.objective == "f1" else wrong)
        if self.calibration is not None:
            scores_BC = scores_BC - option_scores(model, to_device(self.calibration, scores_BC.device))
        predicted = scores_BC.argmax(-1)
        values = _is_right(predicted, batch)[:, None].float()
        return loss, {"logits": scores_BC, "predicted": predicted, "values": values, "terms": terms_B2}

    def total_loss(self, prediction: Any) -> float:
        """Return the loss over a data set from what :meth:`evaluate` returned for each of its examples.

        Args:
            prediction: ``predictions`` (the four arrays) and ``label_ids``, as ``transformers.Trainer`` gathers them.
        """
        terms_N2 = self.terms(prediction)
        if terms_N2 is None:
            predicted = torch.as_tensor(prediction.predictions[3])[:, 0].long()
            return 1 - macro_f1(predicted, torch.as_tensor(prediction.label_ids))
        total, count = terms_N2.sum(0).tolist()
        return total / count

    def terms(self, prediction: Any) -> Tensor | None:
        """Return each example's sum of losses and the number of its terms, (N, 2) float64; None if there are none."""
        if self.objective == "f1" and self.kind == "classification":
            return None
        return torch.as_tensor(prediction.predictions[3]).double()

    def metrics(self, prediction: Any) -> dict[str, float]:
        """Return the metrics over a data set, as ``transformers.Trainer`` asks for them."""
        predicted, values = map(torch.as_tensor, prediction.predictions[1:3])
        means = values.float().mean(0).tolist()
        if self.kind == "generation":
            return {"f1": means[0], "em": means[1]}
        results = {"accuracy": means[0]}
        if self.kind == "classification":
            results["f1"] = macro_f1(predicted, torch.as_tensor(prediction.label_ids))
        return results

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
            raise UsageError(f"objective {self.objective} takes one forward per loss: leave out perturb stacked.")
        if "decoder_input_ids" in batch:
            refuse_trained_embeddings(model)
        labels = batch["labels"]
        if self.loss == "options":
            losses = F.cross_entropy(option_scores(model, batch).float(), labels, reduction="none")
            return losses.view(copies, -1).mean(1)
        right = labels[:, None]
        sums, counts = (totals.gather(1, right).view(copies, -1).sum(1) for totals in option_logprobs(model, batch))
        return -sums / counts

    def example_terms(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return each example's part of the cross entropy: its sum, and how many terms that is over, (B, 2).

        Raises:
            UsageError: If the objective is not a mean over examples.
        """
        if not self.can_stack:
            raise UsageError(
                f"objective {self.objective} is not a mean over losses of examples, so examples cannot have directions "
                "of their own: use objective cross_entropy, or a method whose directions they share."
            )
        if "decoder_input_ids" in batch:
            refuse_trained_embeddings(model)
        return self._score(model, batch)[2]

    def without_padding(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with short rows sharing one where that is less work, or as it is."""
        return batch if self.padding_free is None else self.padding_free(batch)

    def _score(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the cross entropy, the options' scores, and each example's part of the cross entropy: (B, 2)."""
        labels = batch["labels"]
        if self.loss == "options":
            scores_BC = option_scores(model, batch)
            each = F.cross_entropy(scores_BC.float(), labels, reduction="none")
            return classification_loss(scores_BC, labels), scores_BC, _as_terms(each)
        sums, counts = option_logprobs(model, batch)
        right = labels[:, None]
        # Averaged over the batch's tokens, as published: a long answer weighs more than a short one.
        sums_B, counts_B = sums.gather(1, right)[:, 0], counts.gather(1, right)[:, 0]
        mask = batch.get("option_mask", torch.ones_like(counts, dtype=torch.bool))
        terms_B2 = torch.stack([-sums_B, counts_B.to(sums_B.dtype)], 1)
        return -sums_B.sum() / counts_B.sum(), mean_scores(sums, counts, mask), terms_B2

    def _metric_loss(self, scores_BC: Tensor, batch: dict[str, Any]) -> Tensor:
        predicted = scores_BC.argmax(-1)
        if self.objective == "f1":
            return torch.tensor(1 - macro_f1(predicted, batch["labels"]), device=scores_BC.device)
        return 1 - _is_right(predicted, batch).float().mean()

    def generate(self, model: nn.Module, batch: dict[str, Any]) -> list[str]:
        """Return the answers that greedy decoding writes, one per example."""
        return greedy_answers(
            model,
            self.tokenizer,
            batch["prompts"],
            batch["prompts_mask"],
            decoder_prompt=batch.get("decoder_prompt"),
            max_new_tokens=self.max_new_tokens,
            ending=self.ending,
        )

    def _score_generated(self, model: nn.Module, batch: dict[str, Any]) -> list[tuple[float, float]]:
        answers = self.generate(model, batch)
        return [(token_f1(a, refs), exact_match(a, refs)) for a, refs in zip(answers, batch["references"])]


def _answer_tokens(batch: dict[str, Any]) -> Tensor:
    """Return how many tokens the right option of each example has, as they are scored: (B,)."""
    labels = batch["labels"]
    if "cells" not in batch:
        return torch.ones_like(labels)
    cells = batch["cells"]
    B, C = batch["option_mask"].shape
    counts = torch.bincount(cells[cells >= 0], minlength=B * C).view(B, C)
    return counts.gather(1, labels[:, None])[:, 0]


def _as_terms(each_B: Tensor) -> Tensor:
    """Return one loss per example as sums and counts: (B, 2)."""
    return torch.stack([each_B, torch.ones_like(each_B)], 1)


def _is_right(predicted_B: Tensor, batch: dict[str, Any]) -> Tensor:
    """Return whether each prediction is (one of) the right options."""
    if "correct" in batch:
        return batch["correct"].gather(1, predicted_B[:, None])[:, 0]
    return predicted_B == batch["labels"]
