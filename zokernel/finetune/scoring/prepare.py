"""The examples of a run made ready for its model: tokens, what batches them, and what is minimised on a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import nn

from zokernel.finetune.data.check_text import text_encoder
from zokernel.finetune.data.collate import EncodedDataset
from zokernel.finetune.data.collate_text import TextCollator
from zokernel.finetune.data.datasets import Splits
from zokernel.finetune.data.encode_splits import encode_splits
from zokernel.finetune.models.kind import fills_masks, kind_of_model
from zokernel.finetune.models.vocabulary import check_token_ids
from zokernel.finetune.rewards.prompts import PromptCollator
from zokernel.finetune.scoring.choose_collator import choose_collator
from zokernel.finetune.scoring.continuations import Sample, learned_ends
from zokernel.finetune.scoring.make_objective import make_objective
from zokernel.finetune.scoring.options import option_scores
from zokernel.finetune.scoring.padding_free import choose_padding_free
from zokernel.finetune.scoring.prepare_rewards import prompt_datasets, reward_objective, reward_samples
from zokernel.finetune.scoring.prepare_text import encode_texts, language_objective, samples_of
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.tasks import Task
from zokernel.finetune.tasks.reward import RewardTask
from zokernel.finetune.tasks.seq2seq import Decoder, decoder_of
from zokernel.finetune.tasks.text import TextTask


@dataclass(frozen=True)
class Inputs:
    """What the examples of a run are made ready from, and for.

    Attributes:
        task: What the rows are.
        splits: The rows.
        model: The model, which is tried on batches in several layouts.
        tokenizer: Its tokenizer.
        data: What the user said about the data.
        max_length: Longest sequence.
        objective: What a step minimises.
    """

    task: Task
    splits: Splits
    model: nn.Module
    tokenizer: Any
    data: DataArguments
    max_length: int
    objective: str = "cross_entropy"

    def decoder(self) -> Decoder | None:
        """Return how a sequence-to-sequence model frames texts; None for any other model."""
        return decoder_of(self.model, self.tokenizer) if kind_of_model(self.model) == "seq2seq" else None


@dataclass(frozen=True)
class Prepared:
    """What a trainer needs of the examples.

    Attributes:
        encoded: The data sets ``train``, ``validation`` and ``test``.
        collator: Batches examples.
        objective: Loss and metrics of a batch.
        samples: Held-out prompts that are continued for the report.
        ends: Tokens that end a continuation.
        decoder_prompt: What a decoder's continuation begins with, for sequence-to-sequence models.
        context: The text of the demonstrations, which stands before every prompt.
    """

    encoded: dict[str, Any]
    collator: Any
    objective: Any
    samples: list[Sample] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    decoder_prompt: tuple[int, ...] = ()
    context: str = ""


def prepare(inputs: Inputs) -> Prepared:
    """Tokenize the examples of a run for its model.

    Args:
        inputs: The examples, the model and what the user said about them.

    Returns:
        The data sets, and what belongs to them.

    Raises:
        UsageError: If the examples do not fit the model.
    """
    if isinstance(inputs.task, RewardTask):
        return _prepare_prompts(inputs)
    if isinstance(inputs.task, TextTask):
        return _prepare_texts(inputs, inputs.task)
    return _prepare_options(inputs)


def _prepare_options(inputs: Inputs) -> Prepared:
    task, model, tokenizer, data = inputs.task, inputs.model, inputs.tokenizer, inputs.data
    masked, decoder = fills_masks(model), inputs.decoder()
    encoded, context = encode_splits(
        task,
        inputs.splits,
        tokenizer,
        max_length=inputs.max_length,
        masked=masked,
        decoder=decoder,
        num_demonstrations=data.num_demonstrations,
        # A loss on the answer's tokens needs no other option, but accuracy does.
        only_answer=task.loss == "answer" and inputs.objective == "cross_entropy",
    )
    everything = EncodedDataset([example for dataset in encoded.values() for example in dataset.examples])
    parts = ((e.prompt_ids, e.suffix_ids, [e.mask_id or 0], *e.option_ids) for e in everything.examples)
    check_token_ids(model, tokenizer, chain.from_iterable(parts))
    collator = choose_collator(model, tokenizer.pad_token_id, everything)
    objective = make_objective(
        task,
        tokenizer,
        collator,
        objective=inputs.objective,
        masked=masked,
        decoder=decoder,
        calibrate=data.calibrate,
        context=context,
        max_length=inputs.max_length,
        max_new_tokens=data.max_new_tokens,
        padding_free=choose_padding_free(model, collator, everything, option_scores),
    )
    return Prepared(encoded, collator, objective, context=context)


def _prepare_texts(inputs: Inputs, task: TextTask) -> Prepared:
    splits, model, tokenizer, data = inputs.splits, inputs.model, inputs.tokenizer, inputs.data
    max_length, kind, decoder = inputs.max_length, kind_of_model(model), inputs.decoder()
    encoder = text_encoder(task, tokenizer, data, max_length=max_length, kind=kind, decoder=decoder)
    encoded = encode_texts(encoder, splits, packing=data.packing)
    examples = [e for dataset in encoded.values() for e in dataset.examples]
    check_token_ids(model, tokenizer, chain.from_iterable((e.input_ids, e.source_ids) for e in examples))
    collator = TextCollator(tokenizer.pad_token_id)
    return Prepared(
        encoded,
        collator,
        language_objective(model, collator, encoded["train"]),
        # The answer of a decoder takes no room from what is read.
        samples_of(encoder, splits, room=max_length if decoder else max_length - data.max_new_tokens),
        learned_ends(encoded["train"], tokenizer),
        decoder.prompt if decoder else (),
    )


def _prepare_prompts(inputs: Inputs) -> Prepared:
    splits, model, tokenizer = inputs.splits, inputs.model, inputs.tokenizer
    encoded = prompt_datasets(splits, tokenizer, max_length=inputs.max_length)
    check_token_ids(model, tokenizer, (e.input_ids for dataset in encoded.values() for e in dataset.examples))
    objective = reward_objective(model, tokenizer, splits, inputs.data)
    collator = PromptCollator(tokenizer.pad_token_id)
    return Prepared(encoded, collator, objective, reward_samples(encoded, tokenizer), list(objective.ends))
