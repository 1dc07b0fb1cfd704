"""Rewards that need no code: exact match, valid JSON, a pattern, a length."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from zokernel.errors import UsageError

Function = Callable[..., Any]


def text_of(completion: Any) -> str:
    """Return the text of a completion, which is a text or a list of messages.

    Example:
        >>> text_of("Oslo"), text_of([{"role": "assistant", "content": "Oslo"}])
        ('Oslo', 'Oslo')
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def exact_match(column: str = "answer") -> Function:
    """Return a reward of 1 for a completion that is the answer, spaces around it apart.

    Args:
        column: Column that holds the answer, or a list of answers that all count.

    Example:
        >>> exact_match()(completions=[" Oslo", "Rome"], answer=["Oslo", ["Oslo", "Bergen"]])
        [1.0, 0.0]
    """

    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        rewards = []
        for completion, answer in zip(completions, columns[column]):
            answers = answer if isinstance(answer, (list, tuple)) else [answer]
            rewards.append(float(text_of(completion).strip() in {str(text).strip() for text in answers}))
        return rewards

    return _with_columns(reward, column)


def valid_json(keys: str = "") -> Function:
    """Return a reward of 1 for a completion that is JSON; with keys, an object that has them.

    Args:
        keys: Names with commas between them.

    Example:
        >>> valid_json("name,age")(completions=['{"name": "Ada", "age": 36}', '{"name": "Ada"}', "Ada"])
        [1.0, 0.0, 0.0]
    """
    required = {key.strip() for key in keys.split(",") if key.strip()}

    def holds(text: str) -> bool:
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return False
        return not required or (isinstance(value, dict) and required <= value.keys())

    return _with_columns(lambda completions, **columns: [float(holds(text_of(c))) for c in completions])


def regex(pattern: str = "") -> Function:
    r"""Return a reward of 1 for a completion in which a pattern is found.

    Raises:
        UsageError: If there is no pattern, or it is none of Python's.

    Example:
        >>> regex(r"^<answer>\d+</answer>$")(completions=["<answer>42</answer>", "42"])
        [1.0, 0.0]
    """
    if not pattern:
        raise UsageError("The reward regex needs a pattern after a colon, such as regex:^Yes.")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"The reward regex has a pattern that Python does not read ({error}): {pattern}.") from error
    return _with_columns(lambda completions, **columns: [float(bool(compiled.search(text_of(c)))) for c in completions])


def length(target: str = "") -> Function:
    r"""Return a reward for a length: :math:`\max(0, 1 - |n - N| / N)` for n characters.

    Args:
        target: N, the characters for which the reward is 1.

    Raises:
        UsageError: If it is no whole number of at least 1.

    Example:
        >>> length("4")(completions=["Oslo", "Rome!", "no", "a long answer"])
        [1.0, 0.75, 0.5, 0.0]
    """
    if not target.isdecimal() or int(target) < 1:
        raise UsageError(
            f"The reward length needs a number of characters after a colon, such as length:80, not {target!r}."
        )
    target_length = int(target)
    return _with_columns(
        lambda completions, **columns: [
            max(0.0, 1 - abs(len(text_of(c)) - target_length) / target_length) for c in completions
        ]
    )


BUILT_IN: dict[str, Callable[[str], Function]] = {
    "exact_match": lambda column: exact_match(column or "answer"),
    "json": valid_json,
    "regex": regex,
    "length": length,
}
"""Makers of rewards by name, each called with what follows the colon."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _with_columns(function: Function, *columns: str) -> Function:
    """Return a reward that says which columns it reads."""
    function.columns = columns  # type: ignore[attr-defined]
    return function
