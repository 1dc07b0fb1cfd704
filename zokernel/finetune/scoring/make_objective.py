"""The objective of a task, with what it needs of model and tokenizer."""

from __future__ import annotations

from typing import Any

from zokernel.errors import UsageError
from zokernel.finetune.data.collate import Collator, EncodedDataset
from zokernel.finetune.scoring.objective import Objective
from zokernel.finetune.scoring.padding_free import PaddingFree
from zokernel.finetune.tasks import Task, encode
from zokernel.finetune.tasks.generation import GenerationTask
from zokernel.finetune.tasks.prompt import PromptTask
from zokernel.finetune.tasks.seq2seq import Decoder


def make_objective(
    task: Task,
    tokenizer: Any,
    collator: Collator,
    *,
    objective: str,
    masked: bool,
    decoder: Decoder | None = None,
    calibrate: bool = False,
    context: str = "",
    max_length: int = 2048,
    max_new_tokens: int = 50,
    padding_free: PaddingFree | None = None,
) -> Objective:
    """Return the loss and metrics of a task.

    Args:
        task: The task.
        tokenizer: The model's tokenizer.
        collator: Batches examples.
        objective: ``cross_entropy``, ``accuracy`` or ``f1``.
        masked: Whether the model fills masks.
        decoder: How a sequence-to-sequence model frames the texts that it writes.
        calibrate: Whether the scores in an empty prompt are subtracted in evaluations.
        context: What stands before every prompt, and so before the empty one.
        max_length: Longest sequence.
        max_new_tokens: Longest generated answer.
        padding_free: Lets short rows of a batch share one.

    Raises:
        UsageError: If the objective does not fit the task.
    """
    calibration = None
    if calibrate:
        if not isinstance(task, PromptTask):
            raise UsageError("--calibrate compares the same label words in every example: it is for classification.")
        blank: dict[str, Any] = dict.fromkeys(task.required_columns(), "")
        blank[task.label_column] = task.names()[0]
        framed: dict[str, Any] = {"masked": masked, "decoder": decoder, "context": context, "max_length": max_length}
        calibration = collator([EncodedDataset(encode(task, [blank], tokenizer, **framed))[0]])
    return Objective(
        objective,
        loss=task.loss,
        kind=task.kind,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        ending=task.ending if isinstance(task, GenerationTask) else "",
        calibration=calibration,
        padding_free=padding_free,
    )
