"""Which layout of options a model scores as its own forward does: checked on a few examples, not looked up."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zokernel.errors import UsageError, first_line
from zokernel.finetune.data.collate import Collator, EncodedDataset, to_device
from zokernel.finetune.models.vocabulary import embedding_rows
from zokernel.finetune.scoring.options import option_logprobs, option_scores
from zokernel.finetune.scoring.trial import score_tolerance, try_outputs

logger = logging.getLogger(__name__)


@torch.no_grad()
def choose_collator(model: nn.Module, pad_token_id: int | None, dataset: EncodedDataset) -> Collator:
    """Return the collator that shares prompts between options if the model gives the same scores that way.

    The claim is checked, not looked up: a few examples are scored in both layouts.  Models without explicit positions
    or free attention masks (recurrent ones, ALiBi, some fused attention) differ or fail, and get one row per option.

    Args:
        model: The model to train.
        pad_token_id: Padding token; one without an embedding is replaced.
        dataset: Encoded examples, of which the two with the shortest and longest prompts are tried.

    Returns:
        A :class:`Collator`.

    Raises:
        UsageError: If the decoder of a sequence-to-sequence model cannot be scored.
    """
    rows, device = embedding_rows(model), next(model.parameters()).device
    if pad_token_id is None or pad_token_id < 0 or (rows is not None and pad_token_id >= rows):
        pad_token_id = 0  # padding is masked, but looked up all the same
    plain, packed = Collator(pad_token_id), Collator(pad_token_id, shared_prompt=True)
    items = [dataset[i] for i in range(len(dataset))]
    if items and "decoder_start" in items[0]:
        check_decoder(model, plain, items)
        return plain
    multi_token = [i for i in items if len(i["option_ids"]) > 1 and max(map(len, i["option_ids"])) > 1]
    if not multi_token or "mask_id" in multi_token[0]:
        return plain
    multi_token.sort(key=lambda item: len(item["input_ids"]))
    trial = multi_token[:1] + multi_token[-1:]
    config = getattr(model, "peft_config", None)
    if config and any(c.is_prompt_learning for c in config.values()):
        reason = "virtual tokens in front allow no packed attention mask"
    else:
        expected = option_scores(model, to_device(plain(trial), device))
        scores, reason = try_outputs(lambda: option_scores(model, to_device(packed(trial), device)))
        if scores is not None:
            finite = expected.isfinite()
            largest_error = (scores - expected)[finite].abs().max().item()
            if largest_error <= score_tolerance(model):
                logger.info("Options of several tokens share their prompt's computation.")
                return packed
            reason = f"the scores would differ by {largest_error:.2g}"
    logger.warning(
        "%s cannot share a prompt between its options (%s): each option gets its own copy of it, which is slower but "
        "correct.",
        type(model).__name__,
        reason,
    )
    return plain


def check_decoder(model: nn.Module, collator: Collator, items: Sequence[dict[str, Any]]) -> None:
    """Check that a decoder gives the same scores here as in the model's own plain forward.

    Args:
        model: A sequence-to-sequence model.
        collator: Batches examples.
        items: Encoded examples, of which the one with the longest prompt is tried.

    Raises:
        UsageError: If the scores differ, or cannot be computed.
    """
    item = max(items, key=lambda item: len(item["input_ids"]))
    start, device = list(item["decoder_start"]), next(model.parameters()).device
    name = type(model).__name__
    try:
        # Outside of autocast, which would round the head of the plain forward.
        with torch.autocast(device.type, enabled=False):
            means = []
            for option in item["option_ids"]:
                logits = model(
                    input_ids=torch.tensor([item["input_ids"]], device=device),
                    attention_mask=torch.ones(1, len(item["input_ids"]), dtype=torch.long, device=device),
                    decoder_input_ids=torch.tensor([[*start, *option[:-1]]], device=device),
                    use_cache=False,
                ).logits[0, len(start) - 1 :]
                losses = F.cross_entropy(logits.float(), torch.tensor(option, device=device), reduction="none")
                means.append(-losses.mean())
            sums, counts = option_logprobs(model, to_device(collator([item]), device))
            scores = sums / counts
    except UsageError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise UsageError(
            f"The decoder of {name} cannot score options ({type(error).__name__}: {first_line(error)}): train it with "
            "zokernel.finetune.zeroth_order(Seq2SeqTrainer)."
        ) from error
    expected = torch.stack(means)
    largest_error = ((scores[0] - expected).abs() / expected.abs().clamp(min=1)).max().item()
    if not largest_error <= score_tolerance(model):
        raise UsageError(
            f"The scores of {name} would differ by {largest_error:.2g} from those of its own forward: train it with "
            "zokernel.finetune.zeroth_order(Seq2SeqTrainer)."
        )
