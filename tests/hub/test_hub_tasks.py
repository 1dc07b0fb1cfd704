"""Every published task finds its data in the repositories of the hub: columns, splits, and the order of the labels."""

from __future__ import annotations

import pytest
from hub_data import LAYOUT, add_tasks
from hub_runs import Run
from hub_server import Hub

from zokernel.finetune.tasks import TASKS

NLI = {"0": "Yes", "1": "Maybe", "2": "No"}
NO_YES = {"0": "No", "1": "Yes"}
SENTIMENT = {"0": "terrible", "1": "great"}
# The answer that goes with each label as the repository numbers it.
ANSWERS = {
    "sst2": SENTIMENT,
    "mr": SENTIMENT,
    "cr": SENTIMENT,
    "sst5": {"0": "terrible", "1": "bad", "2": "okay", "3": "good", "4": "great"},
    "cola": {"0": "incorrect", "1": "correct"},
    "subj": {"0": "objective", "1": "subjective"},
    "snli": NLI,
    "mnli": NLI,
    "rte": {"0": "Yes", "1": "No"},
    "qnli": {"0": "Yes", "1": "No"},
    "mrpc": NO_YES,
    "qqp": NO_YES,
    "trec": {"0": "abbreviation", "1": "entity", "2": "description", "3": "person", "4": "location", "5": "number"},
    "cb": {"0": "Yes", "1": "No", "2": "Maybe"},
    "boolq": NO_YES,
    "wsc": NO_YES,
    "wic": NO_YES,
    "multirc": NO_YES,
    "copa": {"0": "choice1 says 0.", "1": "choice2 says 1."},
    "record": {"0": "Then Ada left"},
    "squad": {"0": "Rome"},
    "drop": {"0": "7"},
}
NO_VALIDATION = {"train": 12, "test": 6}
THREE = {"train": 12, "validation": 6, "test": 6}
TWO = {"train": 12, "validation": 6}
COUNTS = dict.fromkeys(LAYOUT, TWO) | {
    **dict.fromkeys(("mr", "sst5"), THREE),
    **dict.fromkeys(("cr", "subj", "trec"), NO_VALIDATION),
    "snli": {"train": 11, "validation": 5, "test": 5},  # a row of each without a label that annotators agreed on
}


def test_the_tasks_of_the_hub_are_read_with_the_right_labels(hub: Hub, run: Run):
    add_tasks(hub)
    assert set(LAYOUT) == {name for name, task in TASKS.items() if task.source and "/" in task.source.dataset}
    results = dict(zip(LAYOUT, run(hub.endpoint, *LAYOUT), strict=True))
    assert {task: result["answers"] for task, result in results.items()} == ANSWERS
    assert {task: result["counts"] for task, result in results.items()} == COUNTS
    paths = {path for _, path, _ in hub.requests}
    assert not any("trec.py" in path and "resolve/main" in path for path in paths)


@pytest.mark.parametrize("name", sorted(set(LAYOUT) - {"cr"}))
def test_the_data_of_a_task_are_pinned(name: str):
    source = TASKS[name].source
    assert source is not None
    assert source.revision == "refs/convert/parquet" or len(source.revision or "") == 40
