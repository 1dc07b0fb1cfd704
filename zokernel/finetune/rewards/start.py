r"""How far a model has moved from the weights that a run began with, by the answers that it writes.

For the tokens :math:`y_1 \dots y_T` of an answer to x, its end included,

.. math:: d(y) = \frac{1}{T} \sum_t \Big( e^{\delta_t} - \delta_t - 1 \Big), \qquad
    \delta_t = \log \pi_0(y_t \mid x, y_{<t}) - \log \pi_\theta(y_t \mid x, y_{<t})

with the starting weights :math:`\pi_0`.  No term is negative, and for tokens drawn from :math:`\pi_\theta` the mean of
each is the Kullback-Leibler divergence :math:`KL(\pi_\theta \| \pi_0)` of that token (Schulman, 2020, "Approximating KL
Divergence", estimator k3), as in trl's GRPO.  Greedy answers are no draws: there d is a penalty with the same zero.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.finetune.tasks.batching import left_padded
from zokernel.readable import readable_bytes
from zokernel.without_adapter import without_adapter

logger = logging.getLogger(__name__)

MAX_LOGITS = 1 << 24  # numbers held at once, 64 MiB in float32


class Start:
    """A copy of the trained tensors as they were when it was made; every other tensor is the model's own.

    Args:
        model: A causal language model of transformers, or a peft wrapper of one.
    """

    def __init__(self, model: nn.Module):
        self._tensors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        size = readable_bytes(sum(tensor.nbytes for tensor in self._tensors.values()))
        logger.info("beta: a copy of the starting weights is kept for the divergence from them: %s.", size)

    @torch.no_grad()
    def log_probabilities(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
        pad_token_id: int | None = None,
    ) -> list[list[float]]:
        """Return the log-probability of every token of some answers under the starting weights.

        Args:
            model: The model; its weights may be perturbed, which changes nothing here.
            prompts: Tokens before each answer.
            answers: Tokens of each answer, its end included.
            temperature: What the logits are divided by.
            pad_token_id: Any token.
        """
        pairs = list(dict.fromkeys((tuple(p), tuple(a)) for p, a in zip(prompts, answers)))
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        bare: Any = getattr(model, "module", model)
        words = bare.get_input_embeddings().weight.shape[0]
        values_by_pair: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float]] = {}
        rows = max(1, MAX_LOGITS // (words * max(1, max(len(answer) for _, answer in pairs))))
        for begin in range(0, len(pairs), rows):
            chunk = pairs[begin : begin + rows]
            values = self._of_rows(bare, chunk, temperature, pad_token_id or 0)
            values_by_pair |= dict(zip(chunk, values))
        return [values_by_pair[tuple(p), tuple(a)] for p, a in zip(prompts, answers)]

    def _of_rows(
        self, bare: Any, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], temperature: float, pad: int
    ) -> list[list[float]]:
        """Return the log-probabilities of answers from one forward pass over left-padded prompts and answers."""
        device = next(bare.parameters()).device
        rows = [(*p, *a) for p, a in pairs]
        length, most = max(map(len, rows)), max(len(a) for _, a in pairs)
        ids = left_padded(rows, length, pad).to(device)
        mask = left_padded([[1] * len(row) for row in rows], length, 0).to(device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        accepted = inspect.signature(without_adapter(bare).forward).parameters
        if "position_ids" in accepted and not _has_virtual_tokens(bare):
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = most + 1
        self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        logits = torch.func.functional_call(bare, self._tensors, (), inputs).logits[:, -most - 1 : -1]
        scores = logits.float() / temperature
        chosen = scores.gather(-1, ids[:, -most:, None]).squeeze(-1) - scores.logsumexp(-1)
        return [row[most - len(answer) :] for row, (_, answer) in zip(chosen.tolist(), pairs)]


def _has_virtual_tokens(bare: Any) -> bool:
    return any(getattr(config, "is_prompt_learning", False) for config in getattr(bare, "peft_config", {}).values())


def divergence(log_probabilities: Sequence[float], start: Sequence[float]) -> float:
    r"""Return d of one answer: the mean of :math:`e^{\delta_t} - \delta_t - 1`.

    Args:
        log_probabilities: Of its tokens under the weights that wrote it.
        start: Of its tokens under the starting weights.

    Example:
        >>> divergence([-1.0, -2.0], [-1.0, -2.0]), round(divergence([-1.0], [-2.0]), 6)
        (0.0, 0.367879)
    """
    if not log_probabilities:
        return 0.0
    # No chosen token reaches this bound, which keeps the exponential within a float.
    deltas = [min(before - now, 700.0) for now, before in zip(log_probabilities, start)]
    return sum(math.expm1(delta) - delta for delta in deltas) / len(deltas)


def tokens_of(prompts: Tensor, mask: Tensor) -> list[list[int]]:
    """Return the tokens of rows that are padded on the left: (R, T) and ones where there is a token.

    Example:
        >>> tokens_of(torch.tensor([[0, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]]))
        [[5], [6, 7]]
    """
    return [
        [token for token, is_token in zip(row, row_mask) if is_token]
        for row, row_mask in zip(prompts.tolist(), mask.tolist())
    ]
