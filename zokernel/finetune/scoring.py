r"""The forward pass that a classification loss needs, and nothing more.

When every option is one token, a single forward over the prompts scores all of them; otherwise each option is appended
to its prompt and scored by the mean log-probability of its tokens.  Either way the LM head runs only on the scored
positions, without a KV cache, and the loss is taken in fp32.

Shapes: B examples, C classes, R rows of the batch (B or B*C), T tokens, K scored positions a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernel.errors import UsageError
from zokernel.finetune.tasks.prompt import Encoded


class EncodedDataset(torch.utils.data.Dataset):
    """A list of encoded examples as the dictionaries that a collator takes.

    ``input_ids`` is the prompt; samplers that group by length read its length.
    """

    def __init__(self, examples: Sequence[Encoded]):
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def longest(self, count: int) -> EncodedDataset:
        """Return the ``count`` examples with the longest prompts."""
        return EncodedDataset(sorted(self.examples, key=lambda example: -len(example.prompt_ids))[:count])

    def __getitem__(self, position: int) -> dict[str, Any]:
        example = self.examples[position]
        return {"input_ids": example.prompt_ids, "option_ids": example.option_ids, "label": example.label}


@dataclass(frozen=True)
class Collator:
    """Batches examples: right padding, explicit scored positions.

    Args:
        pad_token_id: Any valid token; padded positions are masked and never scored.
    """

    pad_token_id: int

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return ``labels`` (B,), ``input_ids`` and ``attention_mask`` (R, T), ``positions`` and ``targets``.

        With single-token options R = B, ``positions`` is (B, 1) and ``targets`` (B, C) holds each option's token.
        Otherwise R = B*C, and both are (B*C, K) with ``targets`` -100 where an option has fewer than K tokens.
        """
        labels = torch.tensor([feature["label"] for feature in features])
        if all(len(option) == 1 for feature in features for option in feature["option_ids"]):
            rows = [feature["input_ids"] for feature in features]
            positions = torch.tensor([[len(row) - 1] for row in rows])
            targets = torch.tensor([[option[0] for option in feature["option_ids"]] for feature in features])
        else:
            pairs = [(f["input_ids"], option) for f in features for option in f["option_ids"]]
            rows = [prompt + option[:-1] for prompt, option in pairs]
            longest = max(len(option) for _, option in pairs)
            positions = torch.tensor(
                [[min(len(p) - 1 + k, len(p) + len(o) - 2) for k in range(longest)] for p, o in pairs]
            )
            targets = torch.tensor([option + [-100] * (longest - len(option)) for _, option in pairs])
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            input_ids[number, : len(row)] = torch.tensor(row)
            attention_mask[number, : len(row)] = 1
        return {
            "labels": labels,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "positions": positions,
            "targets": targets,
        }


class ScoredPositions:
    """Context in which a model's LM head sees only the hidden states of the scored positions.

    A forward pre-hook on the output embedding replaces its input (R, T, H) by (R, K, H); everything the model does to
    its logits afterwards (scaling, soft-capping) still happens.

    Args:
        model: A language model of transformers, or a peft wrapper of one.
        positions_RK: Positions whose logits are wanted.

    Raises:
        UsageError: If the model has no output embedding.
    """

    def __init__(self, model: nn.Module, positions_RK: Tensor):
        finder = getattr(model, "get_output_embeddings", None)
        head = finder() if callable(finder) else None
        if head is None:
            raise UsageError(f"{type(model).__name__} has no LM head to score label words with: use a language model.")
        self._head, self._positions = head, positions_RK

    def __enter__(self) -> None:
        def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden_RTH = args[0]
            index_RKH = self._positions.unsqueeze(-1).expand(-1, -1, hidden_RTH.shape[-1])
            return (hidden_RTH.gather(1, index_RKH), *args[1:])

        self._handle = self._head.register_forward_pre_hook(select)

    def __exit__(self, *exc_info: object) -> None:
        self._handle.remove()


def option_scores(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the score of every option.

    Args:
        model: A causal language model of transformers (or a wrapper with the same call).
        batch: What :class:`Collator` returns.

    Returns:
        Mean log-probability of each option's tokens, up to a constant of the example: (B, C), fp32.
    """
    base = getattr(model, "module", model)
    with ScoredPositions(base, batch["positions"]):
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits_RKV, targets = output.logits, batch["targets"]
    num_examples = batch["labels"].shape[0]
    if logits_RKV.shape[0] == num_examples:
        # One token an option: the normaliser of the softmax is common to all of them and cancels in the loss.
        return logits_RKV[:, 0].gather(1, targets).float()
    logprobs_RK = -F.cross_entropy(logits_RKV.float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    counts_R = (targets != -100).sum(1)
    return (logprobs_RK.sum(1) / counts_R).view(num_examples, -1)


def classification_loss(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Cross entropy of the softmax over the options' scores, in fp32."""
    return F.cross_entropy(scores_BC.float(), labels_B)
