"""Reward functions: found, called as trl's GRPO calls them, and refused in one sentence that names the row."""

from __future__ import annotations

import asyncio
import sys

import numpy as np
import pytest
import torch

from zokernel.errors import RunError, UsageError
from zokernel.finetune.rewards.functions import Reward, load_reward, load_rewards

ROWS = [{"prompt": "Capital of Norway?", "answer": "Oslo"}, {"prompt": "And of Italy?", "answer": ["Rome", "Roma"]}]
PROMPTS = [row["prompt"] for row in ROWS]


def as_chat(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("reward", "completions", "expected"),
    [
        ("exact_match", [" Oslo\n", "Roma"], [1.0, 1.0]),
        ("exact_match", ["Oslo.", "rome"], [0.0, 0.0]),
        ("exact_match:prompt2", ["a", "b"], [1.0, 0.0]),
        ("json", ['{"a": 1}', "[1, 2"], [1.0, 0.0]),
        ("json", [" 3 ", "NaN"], [1.0, 0.0]),
        ("json:name, age", ['{"age": 1, "name": 2, "more": 3}', '["name", "age"]'], [1.0, 0.0]),
        ("json:name", ['{"name": null}', "[" * 100_000], [1.0, 0.0]),
        (r"regex:^\d+:\d+$", ["12:30", "12.30"], [1.0, 0.0]),
        ("regex:b", ["abc", "ac"], [1.0, 0.0]),
        ("length:10", ["x" * 10, "x" * 13], [1.0, 0.7]),
        ("length:10", ["", "x" * 25], [0.0, 0.0]),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_built_in_rewards(reward, completions, expected, chat):
    rows = [row | {"prompt2": "a"} for row in ROWS]
    answers = [as_chat(text) for text in completions] if chat else completions
    assert load_reward(reward)(PROMPTS, answers, rows) == pytest.approx(expected)


FILE = """
from helper import BONUS
def by_keywords(prompts, completions, answer, **kwargs):
    assert sorted(kwargs) == ["completion_ids", "level"], kwargs
    return [len(p) + len(c) + len(a) + BONUS for p, c, a in zip(prompts, completions, answer)]
def only_completions(completions):
    return [float(len(c)) for c in completions]
async def later(completions, **kwargs):
    return [0.5 for _ in completions]
def tokens(completions, completion_ids):
    return [len(ids) for ids in completion_ids]
def no_completions(prompts):
    return [0.0 for _ in prompts]
class Judge:
    def __call__(self, completions, **kwargs):
        return [2.0] * len(completions)
judge = Judge()
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "helper.py").write_text("BONUS = 100\n")
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def test_functions_of_a_file_are_called_as_trl_calls_them(file):
    rows = [{"prompt": "ab", "answer": "c", "level": 1}, {"prompt": "a", "answer": "def"}]
    arguments = (["ab", "a"], ["xy", ""], rows, [[5, 6], []])
    assert load_reward(f"{file}:by_keywords")(*arguments) == [2 + 2 + 1 + 100, 1 + 0 + 3 + 100]
    assert load_reward(f"{file}:only_completions")(*arguments) == [2.0, 0.0]
    assert load_reward(f"{file}:later")(*arguments) == [0.5, 0.5]
    assert load_reward(f"{file}:tokens")(*arguments) == [2.0, 0.0]
    assert load_reward(f"{file}:judge")(*arguments) == [2.0, 2.0]
    assert str(file.parent) not in sys.path


def test_an_asynchronous_reward_is_waited_for_in_a_running_loop_too(file):
    reward = load_reward(f"{file}:later")
    rows = [{"prompt": "a"}, {"prompt": "b"}]

    async def notebook():
        return reward(["a", "b"], ["x", "yy"], rows)

    assert asyncio.run(notebook()) == reward(["a", "b"], ["x", "yy"], rows) == [0.5, 0.5]


def test_several_rewards_are_weighted_and_fingerprinted_by_their_code(file):
    rewards = load_rewards([f"{file}:only_completions", "json"], [0.5, -2.0])
    assert rewards(PROMPTS, ["abc", "{}"], ROWS) == [[3.0, 0.0], [2.0, 1.0]]
    assert rewards.total([2.0, 1.0]) == -1.0
    before = rewards.fingerprint
    assert load_rewards([f"{file}:only_completions", "json"]).fingerprint == before
    file.write_text(FILE.replace("float(len(c))", "2.0 * len(c)"))
    changed = load_rewards([f"{file}:only_completions", "json"], [0.5, -2.0])
    assert changed.fingerprint != before
    assert changed(PROMPTS, ["abc", "{}"], ROWS)[0] == [6.0, 0.0]


JUDGE = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    if row["completion"] == "crash":
        sys.exit("no such thing")
    print(len(row["prompt"]) + 0.5 * (row["completion"] == row["answer"]))
"""


def test_a_command_reads_json_lines_and_answers_with_numbers(tmp_path):
    script = tmp_path / "judge.py"
    script.write_text(JUDGE)
    reward = load_reward(f"command:{sys.executable} {script}")
    rows = [{"prompt": "abc", "answer": "Ærø\n1"}, {"prompt": "a", "answer": "b"}]
    assert reward(["abc", "a"], ["Ærø\n1", "c"], rows) == [3.5, 1.0]
    with pytest.raises(RunError, match=r"exit code 1: no such thing.*on a completion of the row .*\"b\""):
        reward(["abc", "a"], ["x", "crash"], rows)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([0.0, None], "returned None for a completion of the row .*Italy"),
        ([0.0, float("nan")], "returned nan for a completion of the row .*Italy"),
        ([float("inf"), 0.0], "returned inf for a completion of the row .*Norway"),
        ([0.0, "1"], "returned '1' for a completion of the row .*Italy"),
        ([0.0], "returned 1 number for 2 completions.*Norway"),
        ([0.0] * 3, "returned 3 numbers for 2 completions"),
        (0.5, "returned a float: let it return a list"),
        (None, "returned a NoneType"),
    ],
)
def test_invalid_rewards_are_refused_with_their_row(result, message):
    with pytest.raises(RunError, match=message) as error:
        Reward("mine", lambda completions: result)(PROMPTS, ["a", "b"], ROWS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("result", [np.array([1, 2]), torch.tensor([1.0, 2.0]), (True, 2), [np.float32(1), 2]])
def test_numbers_of_any_kind_are_taken(result):
    assert Reward("mine", lambda completions: result)(PROMPTS, ["a", "b"], ROWS) == [1.0, 2.0]


async def leaves_later(completions, answer):
    return leaves(completions, answer)


def leaves(completions, answer):
    return [1.0 if a != ["Rome", "Roma"] else sys.exit(3) for a in answer]


@pytest.mark.parametrize("function", [leaves, leaves_later])
def test_a_reward_that_calls_sys_exit_fails_as_one_that_raises(function):
    match = (
        r"^The reward mine raised SystemExit \(3\) on a completion of the row .*Italy.*: mend it and repeat the comm"
    )
    with pytest.raises(RunError, match=match):
        Reward("mine", function)(PROMPTS, ["a", "b"], ROWS)
    with pytest.raises(RunError, match=r"raised SystemExit \(SystemExit\) on a completion"):
        Reward("mine", lambda completions: sys.exit())(PROMPTS[:1], ["a"], ROWS[:1])


def test_the_row_on_which_a_reward_raises_is_found():
    def picky(completions, answer):
        return [1.0 / len(a) for a in answer if a != ["Rome", "Roma"] or 1 / 0]

    with pytest.raises(RunError, match=r"mine raised ZeroDivisionError \(division by zero\) .*Italy"):
        Reward("mine", picky)(PROMPTS, ["a", "b"], ROWS)

    def only_together(completions):
        if len(completions) > 1:
            raise ValueError("two")
        return [1.0]

    with pytest.raises(RunError, match=r"on 2 completions together, and on none of them alone.*Norway"):
        Reward("mine", only_together)(PROMPTS, ["a", "b"], ROWS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine.py:f", "no file mine.py"),
        ("{file}:missing", r"has no function 'missing' \(it has by_keywords, .*tokens"),
        ("{file}:Judge", "has no function 'Judge'"),
        ("{file}:no_completions", "takes no completions"),
        ("{file}", "There is no reward .*: write file.py:name"),
        ("jsn", "There is no reward 'jsn': .* exact_match, json, regex, length, reasoning_gym:task, command"),
        ("regex", "needs a pattern"),
        ("regex:(", "does not read"),
        ("length", "needs a number of characters"),
        ("length:0", "needs a number of characters"),
        ("command:", "no program ''"),
        ("command:no-such-program --x", "no program 'no-such-program'"),
        ('command:"', "is not a command"),
    ],
)
def test_rewards_that_do_not_exist_are_refused(text, message, file):
    with pytest.raises(UsageError, match=message):
        load_reward(text.format(file=file))


def test_a_file_that_cannot_be_loaded_and_weights_that_do_not_fit(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    with pytest.raises(UsageError, match=r"broken.py could not be loaded: SyntaxError"):
        load_reward(f"{broken}:f")
    leaving = tmp_path / "leaving.py"
    leaving.write_text("import sys\nsys.exit('no judge is there')\n")
    with pytest.raises(UsageError, match=r"leaving.py could not be loaded: SystemExit \(no judge is there\)"):
        load_reward(f"{leaving}:f")
    with pytest.raises(UsageError, match="2 reward functions and 1 --reward_weights"):
        load_rewards(["json", "json:a"], [1.0])
    with pytest.raises(UsageError, match="finite"):
        load_rewards(["json"], [float("nan")])
    with pytest.raises(UsageError, match="needs a --reward_function"):
        load_rewards([])


def test_columns_that_a_reward_reads_are_required(file):
    with pytest.raises(UsageError, match=r"by_keywords reads the column 'answer', and the rows have prompt, level"):
        load_rewards([f"{file}:by_keywords"]).check_columns([{"prompt": "a", "level": 1}])
    with pytest.raises(UsageError, match=r"exact_match:Answers reads the column 'Answers'.*: did you mean 'answer'\?$"):
        load_rewards(["exact_match:Answers"]).check_columns(ROWS)
    with pytest.raises(UsageError, match=r"exact_match:gold reads the column 'gold'"):
        load_rewards(["exact_match:gold"]).check_columns(ROWS)
    load_rewards([f"{file}:by_keywords", "exact_match", f"{file}:tokens"]).check_columns(ROWS)
