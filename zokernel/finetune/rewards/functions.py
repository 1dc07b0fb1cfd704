"""Reward functions as trl's GRPO takes them: how they are found, called, and held to their word.

A reward is ``function(prompts, completions, **columns) -> list[float]``.  Prompts and completions are texts, or lists
of messages where the prompt is a chat; the columns are those of the rows, as lists, and ``completion_ids`` are tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from zokernel.errors import RunError, UsageError, first_line
from zokernel.finetune.rewards.built_in import BUILT_IN
from zokernel.finetune.rewards.reasoning import KIND as REASONING
from zokernel.finetune.rewards.reasoning import scorer
from zokernel.finetune.tasks.columns import close_column
from zokernel.readable import plural
from zokernel.secrets import hide_in_words

COMMAND = "command"
_MAKERS = BUILT_IN | {REASONING: scorer}
_RESERVED = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True)
class Reward:
    """One reward function.

    Attributes:
        name: What messages and reports call it.
        function: ``function(prompts=, completions=, completion_ids=, **columns)`` returns a number per completion.
        source: What its numbers depend on, as far as is known: the text of its file, or its name.
    """

    name: str
    function: Callable[..., Any]
    source: str = ""

    def needs(self) -> list[str]:
        """Return the columns without which the function cannot be called."""
        if hasattr(self.function, "columns"):
            return list(self.function.columns)
        return [
            name
            for name, parameter in _parameters(self.function).items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            and name not in _RESERVED
        ]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        rows: Sequence[Mapping[str, Any]],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[float]:
        """Return the reward of every completion.

        Args:
            prompts: A text or a list of messages for each completion.
            completions: What was written: texts, or lists of one message.
            rows: The row of each; its columns are handed to the function.
            completion_ids: Tokens of each.

        Raises:
            RunError: If the function raises, or returns anything else than one finite number per completion; the row
                is named.
        """
        arguments = {"prompts": list(prompts), "completions": list(completions)}
        arguments["completion_ids"] = [list(ids) for ids in completion_ids or [[] for _ in completions]]
        names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", *_RESERVED))
        arguments |= {name: [row.get(name) for row in rows] for name in names}
        try:
            returned = self._call(arguments)
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            raise self._failure(arguments, rows, error) from error
        return self._finite_numbers(returned, rows)

    def _call(self, arguments: Mapping[str, Any]) -> Any:
        parameters = _parameters(self.function)
        if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            arguments = {name: value for name, value in arguments.items() if name in parameters}
        returned = self.function(**arguments)
        return _wait_for(returned) if inspect.isawaitable(returned) else returned

    def _failure(
        self, arguments: Mapping[str, list[Any]], rows: Sequence[Mapping[str, Any]], error: Exception | SystemExit
    ) -> RunError:
        """Return what to raise, with the first row that alone makes the function raise."""
        if isinstance(error, RunError):
            return error
        for number, row in enumerate(rows if len(rows) > 1 else ()):
            try:
                self._call({name: values[number : number + 1] for name, values in arguments.items()})
            except (Exception, SystemExit) as alone:
                return self._row_failure(alone, row)
        if len(rows) == 1:
            return self._row_failure(error, rows[0])
        return RunError(
            f"The reward {self.name} raised {type(error).__name__} ({first_line(error)}) on {len(rows)} completions "
            f"together, and on none of them alone; the first is of the row {_shorten(rows[0])}."
        )

    def _row_failure(self, error: Exception | SystemExit, row: Mapping[str, Any]) -> RunError:
        return RunError(
            f"The reward {self.name} raised {type(error).__name__} ({first_line(error)}) on a completion of the row "
            f"{_shorten(row)}: mend it and repeat the command, which continues the run."
        )

    def _finite_numbers(self, returned: Any, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, (list, tuple)):
            raise RunError(
                f"The reward {self.name} returned a {type(returned).__name__}: let it return a list with a number per "
                "completion."
            )
        if len(values) != len(rows):
            raise RunError(
                f"The reward {self.name} returned {plural(len(values), 'number')} for "
                f"{plural(len(rows), 'completion')}, the first of them of the row {_shorten(rows[0])}: let it return "
                "one for each."
            )
        numbers = []
        for value, row in zip(values, rows):
            try:
                number = math.nan if isinstance(value, str) else float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise RunError(
                    f"The reward {self.name} returned {value!r:.60} for a completion of the row {_shorten(row)}: let "
                    "it return a finite number for every completion, such as 0."
                )
            numbers.append(number)
        return numbers


@dataclass(frozen=True)
class Rewards:
    r"""Several rewards and their weights: the reward of a completion is :math:`\sum_f w_f r_f`.

    Attributes:
        functions: The rewards.
        weights: A number for each.
        seconds: How long each has taken so far, by name.

    Example:
        >>> rewards = load_rewards(["json", "length:2"], [1.0, 0.5])
        >>> rewards(["Write JSON."], ["{}"], [{"prompt": "Write JSON."}])
        [[1.0, 1.0]]
        >>> rewards.total([1.0, 1.0])
        1.5
    """

    functions: tuple[Reward, ...]
    weights: tuple[float, ...]
    seconds: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        rows: Sequence[Mapping[str, Any]],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[list[float]]:
        """Return the reward of every function for every completion; see :meth:`Reward.__call__`."""
        by_function = []
        for reward in self.functions:
            start = time.perf_counter()
            by_function.append(reward(prompts, completions, rows, completion_ids))
            self.seconds[reward.name] = self.seconds.get(reward.name, 0.0) + time.perf_counter() - start
        return [list(values) for values in zip(*by_function)]

    def total(self, values: Sequence[float]) -> float:
        """Return the weighted sum of the rewards of one completion."""
        return sum(weight * value for weight, value in zip(self.weights, values))

    def check_columns(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuse rows that lack a column that a function reads.

        Raises:
            UsageError: If there is one, naming the function and the columns there are.
        """
        present = dict.fromkeys(name for row in rows for name in row)
        for reward in self.functions:
            for column in reward.needs():
                if column not in present:
                    close = close_column(column, present)
                    hint = f"did you mean {close!r}?" if close else "add the column, or name another reward."
                    raise UsageError(
                        f"The reward {reward.name} reads the column {column!r}, and the rows have "
                        f"{', '.join(map(str, present))}: {hint}"
                    )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the functions say, as far as is known."""
        return hashlib.sha256(json.dumps([reward.source for reward in self.functions]).encode()).hexdigest()[:16]


def load_rewards(texts: Sequence[str], weights: Sequence[float] | None = None) -> Rewards:
    """Return the rewards that ``--reward_function`` names.

    Args:
        texts: ``file.py:name``; a built-in one with its setting, such as ``json:name,age``; ``reasoning_gym:task``; or
            ``command:...``.
        weights: One number for each; all 1 when not given.

    Raises:
        UsageError: If one does not exist or cannot be loaded, or the weights do not fit.
    """
    if not texts:
        raise UsageError("--objective reward needs a --reward_function, such as file.py:name or json.")
    if weights is not None and len(weights) != len(texts):
        raise UsageError(
            f"There are {len(texts)} reward functions and {len(weights)} --reward_weights: give one for each."
        )
    if weights is not None and not all(map(math.isfinite, weights)):
        raise UsageError(f"--reward_weights must be finite numbers, not {', '.join(map(str, weights))}.")
    return Rewards(tuple(map(load_reward, texts)), tuple(weights or [1.0] * len(texts)))


def load_reward(text: str) -> Reward:
    """Return one reward; see :func:`load_rewards`.

    Example:
        >>> load_reward("regex:^Yes").name
        'regex:^Yes'
    """
    kind, _, rest = text.partition(":")
    if kind in _MAKERS:
        return Reward(text, _MAKERS[kind](rest), text)
    if kind == COMMAND:
        return Reward(hide_in_words([text])[0], _command(rest), text)
    path, _, name = text.rpartition(":")
    if text.lower().endswith(".py") or not path.lower().endswith(".py"):
        names = ", ".join([*BUILT_IN, f"{REASONING}:task", f"{COMMAND}:..."])
        raise UsageError(f"There is no reward {text!r}: write file.py:name, or one of {names}.")
    return _from_file(Path(path).expanduser(), name)


def _from_file(path: Path, name: str) -> Reward:
    """Return a function of a file of Python, which may import what lies beside it."""
    if not path.is_file():
        raise UsageError(f"There is no file {path} with a reward function: check the path.")
    text = path.read_text(encoding="utf-8-sig")
    module = _module(path.resolve(), text)
    function = getattr(module, name, None)
    if not callable(function) or inspect.isclass(function):
        functions = [
            key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")
        ]
        raise UsageError(f"{path} has no function {name!r} (it has {', '.join(functions) or 'none'}).")
    parameters = _parameters(function)
    if "completions" not in parameters and not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        raise UsageError(f"The reward {name} of {path} takes no completions: write def {name}(completions, **columns).")
    return Reward(name, function, text)


@lru_cache(maxsize=16)  # a file may load a model of its own
def _module(path: Path, text: str) -> ModuleType:
    module = ModuleType(f"zokernel_rewards_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}")
    module.__file__ = str(path)
    sys.path.insert(0, str(path.parent))
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    try:
        exec(compile(text, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:  # whatever the file does
        raise UsageError(f"{path} could not be loaded: {type(error).__name__} ({first_line(error)}).") from error
    finally:
        if str(path.parent) in sys.path:
            sys.path.remove(str(path.parent))
    return module


def _command(command: str) -> Callable[..., list[float]]:
    """Return a reward that runs a command once per batch.

    It reads one JSON object per completion on its standard input, with ``prompt``, ``completion`` and the columns, and
    writes one number per line.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        text = hide_in_words([f"{COMMAND}:{command}"])[0]
        raise UsageError(f"The reward {text!r} is not a command ({error}).") from error
    if not words or shutil.which(words[0]) is None:
        raise UsageError(f"There is no program {(words or [''])[0]!r} for the reward command: check its path.")

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        columns.pop("completion_ids", None)
        lines = [
            json.dumps(
                {"prompt": prompt, "completion": completion} | {key: values[n] for key, values in columns.items()},
                default=str,
            )
            for n, (prompt, completion) in enumerate(zip(prompts, completions))
        ]
        process = subprocess.run(words, input="\n".join(lines) + "\n", capture_output=True, text=True, encoding="utf-8")
        if process.returncode:
            reason = (process.stderr.strip().splitlines() or ["nothing was written to its standard error"])[-1]
            raise RuntimeError(f"exit code {process.returncode}: {reason}")
        return [float(line) for line in process.stdout.split()]

    reward.columns = ()  # type: ignore[attr-defined]
    return reward


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _wait_for(value: Awaitable[Any]) -> Any:
    """Return what an awaitable returns, also where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_await(value))
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, _await(value)).result()


async def _await(value: Awaitable[Any]) -> Any:
    return await value


def _shorten(row: Mapping[str, Any]) -> str:
    """Return a row, short enough for a message."""
    text = json.dumps(dict(row), ensure_ascii=False, default=str)
    return text if len(text) <= 200 else f"{text[:200]}..."
