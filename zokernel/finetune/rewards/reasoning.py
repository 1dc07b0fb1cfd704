"""Tasks of reasoning-gym: their scorers as rewards, and their prompts where none are given.

Reference: Stojanovski et al. (2025), Reasoning Gym: Reasoning Environments for Reinforcement Learning with Verifiable
Rewards, arXiv:2505.24760.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from zokernel.data.tables import Row
from zokernel.errors import MissingDependencyError, UsageError
from zokernel.finetune.rewards.built_in import text_of

logger = logging.getLogger(__name__)

KIND = "reasoning_gym"
SIZES = {"train": 1000, "validation": 100, "test": 200}
"""Prompts of each split, if nobody says how many."""


def scorer(name: str) -> Callable[..., list[float]]:
    """Return the reward of a task: from 0 to 1, as reasoning-gym scores the answer.

    What stands between ``<answer>`` and ``</answer>`` is scored, or all of a completion without them.  Rows need
    ``answer`` and ``metadata`` as reasoning-gym makes them.

    Args:
        name: Name of the task, such as ``countdown``, ``gsm_symbolic`` or ``chain_sum``.

    Raises:
        MissingDependencyError: If reasoning-gym is not installed.
        UsageError: If it has no such task.
    """
    gym = _gym(name)
    from reasoning_gym.utils import extract_answer

    score = gym.get_score_answer_fn(name)

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        answer: Sequence[Any],
        metadata: Sequence[Any],
        **columns: Any,
    ) -> list[float]:
        rewards = []
        for prompt, completion, right, details in zip(prompts, completions, answer, metadata):
            text = text_of(completion)
            extracted = extract_answer(text)
            question = prompt if isinstance(prompt, str) else text_of(prompt[-1:])
            entry = {"question": question, "answer": right}
            entry["metadata"] = json.loads(details) if isinstance(details, str) else details
            rewards.append(float(score(text.strip() if extracted is None else extracted, entry)))
        return rewards

    reward.columns = ("answer", "metadata")  # type: ignore[attr-defined]
    return reward


def find_gym_task(functions: Sequence[str]) -> str:
    """Return the first task of reasoning-gym that ``--reward_function`` names; empty if there is none.

    Example:
        >>> find_gym_task(["length:80", "reasoning_gym:countdown"])
        'countdown'
    """
    prefix = f"{KIND}:"
    return next((text.removeprefix(prefix) for text in functions if text.startswith(prefix)), "")


def make_prompts(
    name: str, *, train: int | None = None, validation: int | None = None, test: int | None = None
) -> dict[str, list[Row]]:
    """Return rows of a task for every split: ``prompt``, ``answer`` and ``metadata``; no prompt is in two splits.

    Tasks with few different prompts may have fewer to train on.

    Args:
        name: Name of the task.
        train: How many prompts to train on.
        validation: How many to choose the best step by.
        test: How many to report.

    Raises:
        MissingDependencyError: If reasoning-gym is not installed.
        UsageError: If it has no such task.
    """
    gym = _gym(name)
    requested = {"test": test, "validation": validation, "train": train}
    sizes = {split: SIZES[split] if size is None else size for split, size in requested.items()}
    # One data set for all: those of neighbouring seeds share most of their entries.
    entries = {entry["question"]: entry for entry in gym.create_dataset(name, size=sum(sizes.values()), seed=0)}
    rows = [{"prompt": question, "answer": e["answer"], "metadata": e["metadata"]} for question, e in entries.items()]
    splits, begin = {}, 0
    for split, size in sizes.items():
        splits[split] = rows[begin : begin + size]
        begin += size
    counts = ", ".join(f"{len(splits[split]):,} {split}" for split in SIZES)
    logger.info("Prompts: made by reasoning-gym's %s, since no data are named (%s, no two the same).", name, counts)
    return splits


def _gym(name: str) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise MissingDependencyError("reasoning-gym", "reasoning", f"The reward {KIND}:{name}") from error
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3) or ["countdown", "gsm_symbolic", "chain_sum"]
        raise UsageError(f"reasoning-gym has no task {name!r}: name one after the colon, such as {', '.join(near)}.")
    return reasoning_gym
