"""Chats, instructions and texts made ready for a model: batches of tokens, and the loss that suits its head."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from zokernel.errors import UsageError
from zokernel.finetune.data.collate import to_device
from zokernel.finetune.data.collate_text import TextCollator, TextDataset, pack
from zokernel.finetune.data.datasets import Splits
from zokernel.finetune.scoring.continuations import Sample, shown_prompt
from zokernel.finetune.scoring.language import LanguageObjective
from zokernel.finetune.scoring.language_head import blocks_agree, token_losses
from zokernel.finetune.scoring.padding_free import choose_padding_free
from zokernel.finetune.scoring.trial import try_outputs
from zokernel.finetune.tasks.control_tokens import report_typed_tokens
from zokernel.finetune.tasks.encode_text import EncodedText, TextEncoder
from zokernel.readable import plural

logger = logging.getLogger(__name__)

TRIAL_TOKENS = 256  # tokens of each row that is tried, so that trying costs less than a step
SAMPLES = 3  # prompts that are continued for the report


def encode_texts(encoder: TextEncoder, splits: Splits, *, packing: bool) -> dict[str, TextDataset]:
    """Tokenize the splits, and say how many tokens there are.

    Rows to evaluate on are sorted by length, which wastes no compute on padding; only rows to train on are packed.

    Args:
        encoder: Tokenizes rows.
        splits: The rows.
        packing: Whether training rows hold several documents.

    Returns:
        ``train``, ``validation`` and ``test``.
    """
    held_out = splits.validation if splits.test == splits.validation else [*splits.validation, *splits.test]
    report_typed_tokens([*splits.train, *held_out], encoder.tokenizer)
    encoded: dict[str, list[EncodedText]] = {}
    for split, rows in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        # The same rows are not tokenized, and reported, twice.
        same = split == "test" and rows == splits.validation
        encoded[split] = encoded["validation"] if same else encoder.encode(rows, where=split.capitalize())
    for split in ("validation", "test"):
        encoded[split] = sorted(encoded[split], key=lambda example: example.size)
    logger.info(
        "Data: %s.",
        "; ".join(
            f"{plural(len(rows), f'{split} row')} of {sum(e.size for e in rows):,} tokens, "
            f"{sum(len(e.scored) for e in rows):,} of them learned"
            if split == "train"
            else f"{plural(len(rows), f'{split} row')}, {sum(len(e.scored) for e in rows):,} tokens scored"
            for split, rows in encoded.items()
        ),
    )
    if packing:
        packed = pack(encoded["train"], encoder.max_length)
        logger.info(
            "Packing: %s in %s of up to %d tokens, none of which sees another.",
            plural(len(encoded["train"]), "text"),
            plural(len(packed), "row"),
            encoder.max_length,
        )
        encoded["train"] = packed
    return {split: TextDataset(rows) for split, rows in encoded.items()}


def samples_of(encoder: TextEncoder, splits: Splits, *, room: int) -> list[Sample]:
    """Return the first held-out prompts that leave room for an answer."""
    samples: list[Sample] = []
    for row in splits.test:
        ids, answer = encoder.prompt(row)
        if ids and len(ids) <= room:
            samples.append(Sample(ids, shown_prompt(encoder.tokenizer, ids), answer))
        if len(samples) == SAMPLES:
            break
    return samples


@torch.no_grad()
def language_objective(model: nn.Module, collator: TextCollator, dataset: TextDataset) -> LanguageObjective:
    """Return the loss of texts, after a trial of whether this model's head runs block by block.

    Args:
        model: The model to train.
        collator: Batches rows.
        dataset: Rows to train on, of which the beginnings of two are tried.

    Raises:
        UsageError: If rows are packed, and the model cannot keep their documents apart.
    """
    device = next(model.parameters()).device
    documents = _beginnings(dataset)
    batch = to_device(collator([vars(e) for e in documents]), device)
    objective = LanguageObjective(whole=not blocks_agree(model, batch))
    if objective.whole:
        logger.warning(
            "%s cannot compute its logits in blocks: those of all scored tokens of a batch are in memory together.",
            type(model).__name__,
        )
    if any(len(e.lengths) > 1 for e in dataset.examples):
        whole = pack(documents, sum(len(e.input_ids) for e in documents))
        _check_packing(model, batch, to_device(collator([vars(e) for e in whole]), device), objective)
    losses = partial(token_losses, whole=objective.whole)
    return replace(objective, padding_free=choose_padding_free(model, collator, dataset, losses))


def _check_packing(
    model: nn.Module, apart: dict[str, Tensor], together: dict[str, Tensor], objective: LanguageObjective
) -> None:
    """Check that packed documents have the losses that they have alone."""
    expected_loss = token_losses(model, apart, whole=objective.whole).sum()
    loss, reason = try_outputs(lambda: token_losses(model, together, whole=objective.whole).sum())
    if loss is not None:
        tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 1e-2
        if (loss - expected_loss).abs() <= tolerance * expected_loss.abs():
            return
        reason = f"their loss would differ by {(loss / expected_loss - 1).abs().item():.2g} of itself"
    window = getattr(getattr(model, "config", None), "sliding_window", None)
    shorter = f", or lower --max_length to its window of {window} tokens" if window else ""
    raise UsageError(f"{type(model).__name__} cannot keep packed texts apart ({reason}): leave out --packing{shorter}.")


def _beginnings(dataset: TextDataset) -> list[EncodedText]:
    """Return the beginnings of the first documents that have a scored token there: two if there are two."""
    beginnings: list[EncodedText] = []
    for example in dataset.examples:
        begin = 0
        for length in example.lengths:
            end = begin + min(length, TRIAL_TOKENS)
            scored = [place - begin for place in example.scored if begin < place < end]
            if scored:
                ids, source = example.input_ids[begin:end], example.source_ids[:TRIAL_TOKENS]
                beginnings.append(EncodedText(ids, scored, [end - begin], source))
            begin += length
            if len(beginnings) == 2:
                return beginnings
    if not beginnings:  # all that counts lies behind long prompts
        example, end = dataset.examples[0], dataset.examples[0].scored[0] + 1
        beginnings.append(EncodedText(example.input_ids[:end], [end - 1], [end], example.source_ids[:TRIAL_TOKENS]))
    return beginnings
