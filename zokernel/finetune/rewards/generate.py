r"""What a population of perturbed models writes: all members, prompts and samples in one batched ``generate``.

Row r of the batch is a sample of a prompt.  The token at position t of its answer is

.. math:: \arg\max_v \; \ell_v / T + G(seed, step, r, t, v)

with the logits :math:`\ell`, the temperature T and Gumbel noise :math:`G`, which is a draw from the softmax at
temperature T (Gumbel, 1954).  The noise is a function of its five arguments.  It does not depend on batches or chunks,
and a continued run draws the same noise.

All members of a step see the same noise.  So an antithetic pair differs by its weights alone, and so do a member and
the mean of the others, or the loss at the unperturbed weights: noise of its own for every member would add its whole
variance, divided by eps squared, to every estimate.

Shapes: K members (copies of the batch), R rows of one copy (prompts times samples), T tokens, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.directions.philox import philox4x32, stream_key
from zokernel.finetune.models.greedy import greedy_settings


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: T; 0 takes the most likely token.
        seed: Seed of the run.
        step: Step of the run.
    """

    temperature: float = 0.0
    seed: int = 0
    step: int = 0


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt.

    Attributes:
        tokens: Its tokens, without the one that ends it.
        end: The token that ended it; empty if none did.
        log_probabilities: Of tokens and end under the weights that wrote them; empty unless requested.
    """

    tokens: list[int]
    end: list[int]
    log_probabilities: list[float]


def gumbel_noise(rows: Sequence[int], position: int, vocabulary: int, sampling: Sampling, device: Any = None) -> Tensor:
    """Return the noise of some rows at one position of their answers, (R, V) float32.

    Args:
        rows: Number of each row in the data set, times the samples of a prompt, plus the number of the sample.
        position: Position in the answer, from 0.
        vocabulary: V.
        sampling: Seed and step.
        device: Where to put it.

    Example:
        >>> both = gumbel_noise([3, 8], 0, 10, Sampling(1.0))
        >>> torch.equal(both[1:], gumbel_noise([8], 0, 10, Sampling(1.0)))
        True
    """
    key = stream_key(sampling.seed, "samples", "generation")
    blocks = torch.arange(-(-vocabulary // 4), device=device)[None]
    row = torch.tensor(list(rows), device=device)[:, None]
    blocks, row = torch.broadcast_tensors(blocks, row)
    words = philox4x32((blocks, torch.full_like(row, position), row, torch.full_like(row, sampling.step)), key)
    uniform = (torch.stack(words, -1).view(len(rows), -1)[:, :vocabulary].double() + 0.5) / 2**32
    return -torch.log(-torch.log(uniform)).float()


class _TokenChooser:
    """Logits processor: adds the noise of each row, the same for every copy of the batch.

    Args:
        rows: Number of each row.
        prompt_length: Tokens of the prompts, padding included.
        sampling: How tokens are chosen.
        keeps_log_probabilities: Whether the log-probabilities of the chosen tokens are kept.

    Attributes:
        log_probabilities: One tensor per position, (K R,).
    """

    def __init__(self, rows: Sequence[int], prompt_length: int, sampling: Sampling, *, keeps_log_probabilities: bool):
        self._rows, self._prompt_length, self._sampling = rows, prompt_length, sampling
        self._keeps_log_probabilities = keeps_log_probabilities
        self.log_probabilities: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scaled, chosen = scores.float(), scores
        if self._sampling.temperature > 0:
            position, width = input_ids.shape[1] - self._prompt_length, scores.shape[-1]
            noise = gumbel_noise(self._rows, position, width, self._sampling, scores.device)
            scaled = scaled / self._sampling.temperature
            chosen = (scaled.view(-1, len(self._rows), width) + noise).view(scores.shape)
        if self._keeps_log_probabilities:
            picked = scaled.gather(-1, chosen.argmax(-1, keepdim=True)).squeeze(-1)
            self.log_probabilities.append(picked - scaled.logsumexp(-1))
        return chosen


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Tensor,
    prompts_mask: Tensor,
    *,
    rows: Sequence[int],
    copies: int = 1,
    max_new_tokens: int,
    ends: Sequence[int],
    pad_token_id: int | None,
    sampling: Sampling,
    log_probabilities: bool = False,
) -> list[Answer]:
    """Return what a causal model writes after each prompt.

    Args:
        model: A causal language model of transformers, or a peft wrapper of one.  Within a
            :class:`~zokernel.perturb.stacked.StackedParameters`, each copy of the rows has weights of its own.
        prompts: (R, T) token ids, padded on the left.
        prompts_mask: (R, T) ones where there is a token.
        rows: Number of each row, which its noise depends on.
        copies: Number of copies of the rows, one after the other.
        max_new_tokens: Length of the longest answer.
        ends: Tokens that end an answer.
        pad_token_id: Any token.
        sampling: How tokens are chosen.
        log_probabilities: Whether to return those of the tokens, under the softmax at the temperature, or at
            temperature 1 where the most likely token is taken.

    Returns:
        K R answers, one copy after the other.
    """
    from transformers import LogitsProcessorList

    bare: Any = getattr(model, "module", model)
    length = prompts.shape[1]
    chooser = _TokenChooser(rows, length, sampling, keeps_log_probabilities=log_probabilities)
    sequences = bare.generate(
        input_ids=prompts.repeat(copies, 1),
        attention_mask=prompts_mask.repeat(copies, 1),
        generation_config=greedy_settings(max_new_tokens, ends, pad_token_id),
        logits_processor=LogitsProcessorList([chooser] if log_probabilities or sampling.temperature > 0 else []),
    )
    stops = set(ends)
    logprobs = (
        torch.stack(chooser.log_probabilities, 1).tolist() if chooser.log_probabilities else [[] for _ in sequences]
    )
    answers = []
    for tokens, values in zip(sequences[:, length:].tolist(), logprobs):
        end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
        answers.append(Answer(tokens[:end], tokens[end : end + 1], values[: end + 1]))
    return answers
