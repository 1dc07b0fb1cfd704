"""Small made-up examples of every published task, in the format of its hub table, for tests and trial runs.

The right answer can be read off the text, so that learning can be seen.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from zokernel.data.tables import Row
from zokernel.finetune.tasks.base import Task
from zokernel.finetune.tasks.prompt import PromptTask, alternatives

_FILLERS = ("a", "the", "one", "some", "this")
_CLUES = "xyzuvw"


def toy_files(folder: Path, name: str, task: Task, *, size: int = 24, seed: int = 0) -> dict[str, str]:
    """Write the three splits of a toy data set as ``.jsonl``.

    Args:
        folder: Where the files go.
        name: A named task, or anything for a task of one's own.
        task: The task.
        size: Rows a split.
        seed: Seed of the rows.

    Returns:
        ``train_file``, ``validation_file`` and ``test_file``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, split in enumerate(("train", "validation", "test")):
        path = folder / f"{split}.jsonl"
        rows = toy_rows(name, task, size=size, seed=3 * seed + number)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[f"{split}_file"] = str(path)
    return files


def toy_rows(name: str, task: Task, *, size: int = 24, seed: int = 0) -> list[Row]:
    """Return rows of a toy data set; see :func:`toy_files`.

    Example:
        >>> from zokernel.finetune.tasks import get_task
        >>> rows = toy_rows("copa", get_task("copa"), size=2)
        >>> sorted(rows[0])
        ['choice1', 'choice2', 'label', 'premise', 'question']
    """
    generator = random.Random(seed)
    if name in _MAKERS:
        return [_MAKERS[name](generator) for _ in range(size)]
    assert isinstance(task, PromptTask), "only the named tasks of these kinds have toy data"
    return [_classification_row(task, generator, number) for number in range(size)]


def _text(generator: random.Random, clue: str = "") -> str:
    words = [generator.choice(_FILLERS) for _ in range(generator.randrange(1, 5))]
    return " ".join([*words, clue]).strip()


def _classification_row(task: PromptTask, generator: random.Random, number: int) -> Row:
    label = number % task.num_classes  # every class equally often
    name = alternatives(task.names()[label])[0]
    columns = [column for column in task.required_columns() if column != task.label_column]
    row: Row = {column: _text(generator, _CLUES[label]) for column in columns}
    return row | {task.label_column: int(name) if name.isdecimal() else name}


def _copa(generator: random.Random) -> Row:
    label = generator.randrange(2)
    choices = [_text(generator, "right" if c == label else "wrong").capitalize() + "." for c in (0, 1)]
    return {
        "premise": _text(generator).capitalize() + ".",
        "choice1": choices[0],
        "choice2": choices[1],
        "question": generator.choice(["cause", "effect"]),
        "label": label,
    }


def _record(generator: random.Random) -> Row:
    entities = [f"{name}{generator.randrange(9)}" for name in ("Ada", "Bob", "Cyd", "Dan")[: generator.randrange(2, 5)]]
    answer = generator.choice(entities)
    return {
        "passage": f"{' and '.join(entities)} met.\n@highlight\n{answer} was right",
        "query": f"{_text(generator).capitalize()} said @placeholder was right",
        "entities": entities,
        "answers": [answer, answer],
    }


def _squad(generator: random.Random) -> Row:
    answer = generator.choice(["Rome", "Oslo", "New York"])
    return {
        "id": str(generator.random()),
        "title": "Cities",
        "context": f"{_text(generator).capitalize()} city is {answer}.",
        "question": "Which city?",
        "answers": {"text": [answer, f"the {answer}"], "answer_start": [0, 0]},
    }


def _drop(generator: random.Random) -> Row:
    number = str(generator.randrange(2, 10))
    return {
        "passage": f"{_text(generator).capitalize()} team won {number} games.",
        "question": "How many games?",
        "answers_spans": {"spans": [number], "types": ["number"]},
    }


_MAKERS: dict[str, Callable[[random.Random], Row]] = {
    "copa": _copa,
    "record": _record,
    "squad": _squad,
    "drop": _drop,
}
