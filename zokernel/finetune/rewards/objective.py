r"""The negative mean reward as the loss of a batch of prompts, if asked for with a penalty on leaving the start.

.. math:: L(\theta) = -\frac{1}{B S} \sum_{b=1}^{B} \sum_{s=1}^{S}
    \Big( \sum_f w_f\, r_f(y_{bs}) - \beta\, d(y_{bs}) \Big), \qquad y_{bs} \sim \pi_\theta(\cdot \mid x_b)

for B prompts with S samples each, and the divergence d from the starting weights of
:mod:`zokernel.finetune.rewards.start`.  It has no gradient to follow, and needs none.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zokernel.data.tables import Row
from zokernel.errors import UsageError
from zokernel.finetune.models.scales import trains_scales
from zokernel.finetune.monitor.progress import PENALISED, REWARD
from zokernel.finetune.rewards.functions import Rewards
from zokernel.finetune.rewards.generate import Answer, Sampling, generate
from zokernel.finetune.rewards.start import Start, divergence, tokens_of

logger = logging.getLogger(__name__)

SLOW = 10.0  # seconds of rewards from which it is said that they take longer than the answers
TRIAL_TOKENS = 2  # tokens of an answer with which is tried whether layers take several copies of the weights


@dataclass
class RewardObjective:
    """Loss and metrics of prompts; see :class:`zokernel.finetune.scoring.objective.Objective` for the methods.

    Args:
        rewards: The reward functions and their weights.
        tokenizer: The model's tokenizer.
        max_new_tokens: Longest answer.
        samples: S, answers to each prompt of a step.
        temperature: Of the answers of a step; evaluations take the most likely tokens.
        ends: Tokens that end an answer.
        max_rows: Bound on the rows of one ``generate``, where the weights are the same for all of them.
        beta: Weight of the divergence from the starting weights.
        start: The starting weights; None if ``beta`` is 0.

    Attributes:
        seed: Seed of the run, which the sampled answers depend on.
        step: Step of the run, likewise.
    """

    rewards: Rewards
    tokenizer: Any
    max_new_tokens: int = 50
    samples: int = 1
    temperature: float = 0.0
    ends: Sequence[int] = ()
    max_rows: int = 1 << 30
    beta: float = 0.0
    start: Start | None = None
    seed: int = field(default=0, init=False)
    step: int = field(default=0, init=False)
    _generation_seconds: float = field(default=0.0, init=False, repr=False)
    _has_warned: bool = field(default=False, init=False, repr=False)

    objective = "reward"
    can_stack = False  # there is no gradient, which first-order methods ask here

    @property
    def quantity(self) -> str:
        """What a step raises, in words: it is minus the loss."""
        return REWARD if self.start is None else PENALISED

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return the loss of a batch at the weights as they are, a scalar."""
        return -self._totals(self._score(model, batch)).mean()

    def stacked(self, model: nn.Module, batch: dict[str, Any], copies: int) -> Tensor:
        """Return the loss of the batch for every copy of the weights, (copies,); ``batch`` is not repeated."""
        return -self._totals(self._score(model, batch, copies=copies, whole=True)).view(copies, -1).mean(1)

    def weight(self, batch: dict[str, Any]) -> float:
        """Return how many prompts the loss of a batch is a mean over."""
        return float(len(batch["labels"]))

    def example_terms(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return each prompt's loss and the number 1: (B, 2)."""
        losses = -self._totals(self._score(model, batch, whole=True)).view(-1, self.samples).mean(1)
        return torch.stack([losses, torch.ones_like(losses)], 1)

    def try_copies(self, model: nn.Module, batch: dict[str, Any], copies: int) -> Tensor:
        """Write the first tokens of as many copies of a batch, and return zeros: (copies,).

        Raises:
            UsageError: If the model's layers have no form for copies with weights of their own.
        """
        if trains_scales(model):
            raise UsageError("rows of one batch cannot have scales of their own")
        self._sample_answers(
            model,
            batch,
            range(len(batch["labels"])),
            samples=1,
            sampling=Sampling(),
            copies=copies,
            max_new_tokens=TRIAL_TOKENS,
        )
        return torch.zeros(copies)

    def evaluate(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of greedy answers, and as ``terms`` what is known of each.

        These are its negative loss, its rewards, its divergence if that is penalised, and 1 if nothing was written.
        """
        values = self._score(model, batch, greedy=True)
        terms = torch.cat([self._totals(values)[:, None], values], 1).float().to(batch["labels"].device)
        return -terms[:, 0].mean(), {"terms": terms}

    def total_loss(self, prediction: Any) -> float:
        """Return the loss over a data set from the ``terms`` of its prompts."""
        return float(self.terms(prediction)[:, 0].mean())

    def terms(self, prediction: Any) -> Tensor:
        """Return each prompt's loss and the number 1: (N, 2) float64."""
        losses = -torch.as_tensor(prediction.predictions).double()[:, 0]
        return torch.stack([losses, torch.ones_like(losses)], 1)

    def metrics(self, prediction: Any) -> dict[str, float]:
        """Return the mean reward with its standard error, and what else is known of the answers.

        That is the pass rate where all rewards are 0 or 1, the share of ``empty_answers``, and ``kl``, the mean
        divergence from the starting weights, if it is penalised.
        """
        terms = torch.as_tensor(prediction.predictions).double()
        values = terms[:, 1 : 1 + len(self.rewards.functions)]
        total = self._rewards(values)
        error = float(total.std()) / math.sqrt(len(total)) if len(total) > 1 else 0.0
        results = {"reward": float(total.mean()), "reward_error": error}
        if bool(((values == 0) | (values == 1)).all()):
            results["pass_rate"] = float((values == 1).all(1).double().mean())
        if self.start is not None:
            results["kl"] = float(terms[:, -2].mean())
        return results | {"empty_answers": float(terms[:, -1].mean())}

    def generate(self, model: nn.Module, batch: dict[str, Any]) -> list[str]:
        """Return the greedy answers, one per prompt."""
        answers = self._sample_answers(model, batch, range(len(batch["labels"])), samples=1, sampling=Sampling())
        return [self._text(answer) for answer in answers]

    def _rewards(self, values: Tensor) -> Tensor:
        """Return the weighted sums of the rewards of answers: (N, F) to (N,) float64."""
        return torch.tensor([self.rewards.total(row) for row in values.tolist()], dtype=torch.float64)

    def _totals(self, values: Tensor) -> Tensor:
        """Return the negative losses of answers from what :meth:`_score` returns."""
        rewards = self._rewards(values[:, : len(self.rewards.functions)])
        return rewards if self.start is None else rewards - self.beta * values[:, -2]

    def _score(
        self, model: nn.Module, batch: dict[str, Any], *, copies: int = 1, whole: bool = False, greedy: bool = False
    ) -> Tensor:
        """Return the rewards of all answers, and what else is known of them, copy after copy, prompt after prompt.

        One column for each function, one for the divergence if that is penalised, and one that is 1 where nothing was
        written: (K B S, F + 1) or (K B S, F + 2) float64.
        """
        samples = 1 if greedy else self.samples
        sampling = Sampling() if greedy else Sampling(self.temperature, self.seed, self.step)
        count = len(batch["labels"])
        answers: list[Answer] = []
        at_once = count if whole else max(1, self.max_rows // samples)
        start = time.perf_counter()
        for begin in range(0, count, at_once):
            places = range(begin, min(count, begin + at_once))
            answers += self._sample_answers(model, batch, places, samples=samples, sampling=sampling, copies=copies)
        self._generation_seconds += time.perf_counter() - start
        rows: list[Row] = [row for row in batch["rows"] for _ in range(samples)] * copies
        prompts = [row["prompt"] for row in rows]
        texts = list(map(self._text, answers))
        completions: list[Any] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts)
        ]
        values = self.rewards(prompts, completions, rows, [answer.tokens for answer in answers])
        self._warn_if_slow()
        if self.start is not None:
            ids = [ids for ids in tokens_of(batch["prompts"], batch["prompts_mask"]) for _ in range(samples)] * copies
            divergences = self._divergences(model, ids, answers, sampling.temperature)
            values = [[*row, divergence] for row, divergence in zip(values, divergences)]
        values = [[*row, float(not text.strip())] for row, text in zip(values, texts)]
        return torch.tensor(values, dtype=torch.float64)

    def _warn_if_slow(self) -> None:
        """Say once that the rewards take longer than writing the answers, and which of them."""
        seconds = self.rewards.seconds
        total = sum(seconds.values())
        if self._has_warned or total < max(SLOW, self._generation_seconds):
            return
        self._has_warned, slowest = True, max(seconds, key=lambda name: seconds[name])
        logger.warning(
            "Rewards have taken %.1f s so far and generation %.1f s; %s takes most of it: a faster function, or one "
            "that works on all completions together, makes the run faster.",
            total,
            self._generation_seconds,
            slowest,
        )

    def _divergences(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], answers: Sequence[Answer], temperature: float
    ) -> list[float]:
        """Return how far each answer is from the starting weights."""
        assert self.start is not None
        at_start = self.start.log_probabilities(
            model,
            prompts,
            [[*answer.tokens, *answer.end] for answer in answers],
            temperature=temperature or 1.0,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return [divergence(answer.log_probabilities, before) for answer, before in zip(answers, at_start)]

    def _sample_answers(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        places: range,
        *,
        samples: int,
        sampling: Sampling,
        copies: int = 1,
        max_new_tokens: int | None = None,
    ) -> list[Answer]:
        """Return the answers to some prompts of a batch, copy after copy, prompt after prompt."""
        mask = batch["prompts_mask"][places.start : places.stop]
        longest = int(mask.sum(1).max())
        begin = mask.shape[1] - longest
        prompts = batch["prompts"][places.start : places.stop, begin:]
        numbers = [int(number) * samples for number in batch["labels"][places.start : places.stop]]
        return generate(
            model,
            prompts.repeat_interleave(samples, 0),
            mask[:, begin:].repeat_interleave(samples, 0),
            rows=[number + sample for number in numbers for sample in range(samples)],
            copies=copies,
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            ends=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
            sampling=sampling,
            log_probabilities=self.start is not None,
        )

    def _text(self, answer: Answer) -> str:
        text: str = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        return text
