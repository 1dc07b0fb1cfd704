"""From rows to what the trainer takes: demonstrations, encoded splits and the objective of the task."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from zokernel.errors import UsageError
from zokernel.finetune.data.collate import Collator, EncodedDataset
from zokernel.finetune.data.datasets import Splits
from zokernel.finetune.models.adapters import virtual_tokens
from zokernel.finetune.models.load import longest_input
from zokernel.finetune.scoring.objective import Objective
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.tasks import Task, demonstrations, encode
from zokernel.finetune.tasks.encoding import report_label_words
from zokernel.finetune.tasks.prompt import PromptTask

logger = logging.getLogger(__name__)


def encode_splits(
    task: Task, splits: Splits, model: nn.Module, tokenizer: Any, arguments: DataArguments, *, objective: str
) -> dict[str, EncodedDataset]:
    """Tokenize the three splits for the model and log what was found.

    Demonstrations, if asked for, are the first training examples; the others remain to train on.

    Args:
        task: Templates and options.
        splits: The rows.
        model: The model; it may be causal or masked, and limits the length.
        tokenizer: Its tokenizer.
        arguments: Length, demonstrations.
        objective: What will be minimised, which decides whether training needs every option.

    Returns:
        ``train``, ``validation`` and ``test``.

    Raises:
        UsageError: If there are too few training examples to demonstrate with, or the task does not fit the model.
    """
    masked = fills_masks(model)
    shown = arguments.num_demonstrations
    if shown >= len(splits.train):
        raise UsageError(f"There are {len(splits.train)} training examples, too few for {shown} demonstrations.")
    context = demonstrations(task, splits.train[:shown], masked=masked)
    reserved = virtual_tokens(model) + (arguments.max_new_tokens if task.kind == "generation" else 0)
    length = longest_input(model, tokenizer, arguments.max_length, reserved=reserved)
    encoded = {}
    for split, rows in (("train", splits.train[shown:]), ("validation", splits.validation), ("test", splits.test)):
        # A loss on the answer's tokens needs no other option, but accuracy does.
        only_answer = split == "train" and task.loss == "answer" and objective == "cross_entropy"
        encoded[split] = encode(
            task, rows, tokenizer, max_length=length, masked=masked, context=context, only_answer=only_answer
        )
    everything = [example for examples in encoded.values() for example in examples]
    if task.kind == "generation":
        how = "answers are generated"
    else:
        single = report_label_words(everything, task)
        how = "one forward scores every option" if single else "options have several tokens"
    logger.info(
        "Data: %s examples; %s.", ", ".join(f"{len(examples)} {split}" for split, examples in encoded.items()), how
    )
    return {split: EncodedDataset(examples) for split, examples in encoded.items()}


def make_objective(
    task: Task, model: nn.Module, tokenizer: Any, collator: Collator, arguments: DataArguments, config: ZOConfig
) -> Objective:
    """Return the loss and metrics of a task.

    Raises:
        UsageError: If the objective does not fit the task.
    """
    calibration = None
    if arguments.calibrate:
        if not isinstance(task, PromptTask):
            raise UsageError("--calibrate compares the same label words in every example: it is for classification.")
        blank: dict[str, Any] = dict.fromkeys(task.required_columns(), "")
        blank[task.label_column] = (task.labels or ("0",))[0]
        calibration = collator([EncodedDataset(encode(task, [blank], tokenizer, masked=fills_masks(model)))[0]])
    return Objective(
        config.objective,
        loss=task.loss,
        kind=task.kind,
        tokenizer=tokenizer,
        max_new_tokens=arguments.max_new_tokens,
        calibration=calibration,
    )


def fills_masks(model: Any) -> bool:
    """Whether a model, or the model inside an adapter, is a masked language model."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return type(inner).__name__.endswith("ForMaskedLM")
