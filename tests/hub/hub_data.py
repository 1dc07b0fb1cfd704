"""What the hub of the tests holds: a tiny model, and every published task's data in its repository's own layout."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
from hub_server import Hub
from hub_writing import Repo
from models import save_plain_llama

from zokernel.finetune.tasks import TASKS

datasets.disable_progress_bars()
ENTAILED = ["entailment", "not_entailment"]
NLI = ["entailment", "neutral", "contradiction"]
YES = ["False", "True"]

# Task -> its splits' folder or file names, the columns of a row, and the names of its labels.  Rows are made up; the
# text of each says which label it has.
PARQUET = "{folder}{split}-00000-of-00001.parquet"
LAYOUT: dict[str, tuple[str, str, Any]] = {
    "sst2": ("data/", "idx sentence label", ["negative", "positive"]),
    "mr": ("", "text label", ["neg", "pos"]),
    "cr": ("", "text label label_text", ["negative", "positive"]),
    "sst5": ("", "text label label_text", ["very negative", "negative", "neutral", "positive", "very positive"]),
    "cola": ("cola/", "sentence label idx", ["unacceptable", "acceptable"]),
    "subj": ("", "text label label_text", ["objective", "subjective"]),
    "snli": ("plain_text/", "premise hypothesis label", NLI),
    "mnli": ("mnli/", "premise hypothesis label idx", NLI),
    "rte": ("rte/", "premise hypothesis idx label", ENTAILED),
    "qnli": ("qnli/", "question sentence label idx", ENTAILED),
    "mrpc": ("mrpc/", "sentence1 sentence2 label idx", ["not_equivalent", "equivalent"]),
    "qqp": ("qqp/", "question1 question2 label idx", ["not_duplicate", "duplicate"]),
    "trec": ("default/", "text coarse_label fine_label", ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]),
    "cb": ("cb/", "premise hypothesis idx label", ["entailment", "contradiction", "neutral"]),
    "boolq": ("boolq/", "question passage idx label", YES),
    "wsc": ("wsc.fixed/", "text span1_index span2_index span1_text span2_text idx label", YES),
    "wic": ("wic/", "word sentence1 sentence2 start1 start2 end1 end2 idx label", YES),
    "multirc": ("multirc/", "paragraph question answer idx label", YES),
    "copa": ("copa/", "premise choice1 choice2 question idx label", ["choice1", "choice2"]),
    "record": ("record/", "passage query entities entity_spans answers idx", None),
    "squad": ("plain_text/", "id title context question answers", None),
    "drop": ("data/", "section_id query_id passage question answers_spans", None),
}
ROWS = {"train": 12, "validation": 6, "test": 6}
HIDDEN_TEST = {"sst2", "cola", "mnli", "rte", "qnli", "mrpc", "qqp", "cb", "boolq", "wsc", "wic", "multirc", "copa"}


def _value(task: str, column: str, label: int, number: int) -> Any:
    """Return what a row holds in a column."""
    structured: dict[str, Any] = {
        "label": label, "coarse_label": label, "fine_label": label, "idx": number,
        "label_text": (LAYOUT[task][2] or [""])[label] if LAYOUT[task][2] else "",
        "span1_index": 0, "span2_index": 3, "span1_text": "Ada", "span2_text": "She", "word": "bank",
        "start1": 0, "start2": 0, "end1": 4, "end2": 4, "entities": ["Ada", "Bob"],
        "query": "Then @placeholder left", "entity_spans": {"text": ["Ada"], "start": [0], "end": [3]},
        "answers_spans": {"spans": ["7"], "types": ["number"]},
    }  # fmt: skip
    if task == "copa" and column == "question":
        return ("cause", "effect")[number % 2]
    if task == "multirc" and column == "idx":
        return {"paragraph": 0, "question": 0, "answer": number}
    if task == "record" and column in ("answers", "idx"):
        return ["Ada"] if column == "answers" else {"passage": 0, "query": number}
    if column == "answers":
        return {"text": ["Rome"], "answer_start": [0]}
    return structured.get(column, f"{column} says {label}.")


def _table(task: str, split: str) -> datasets.Dataset:
    columns, names = LAYOUT[task][1].split(), LAYOUT[task][2]
    count = len(names) if names else 1
    rows = []
    for number in range(ROWS[split]):
        label = number % count
        row = {column: _value(task, column, label, number) for column in columns}
        if split == "test" and task in HIDDEN_TEST:
            row["label"] = -1
        if task == "snli" and number == 5:
            row["label"] = -1  # annotators did not agree
        rows.append(row)
    table = datasets.Dataset.from_list(rows)
    key = "coarse_label" if task == "trec" else "label"
    if names and key in columns:
        table = table.cast_column(key, datasets.ClassLabel(names=names))
    return table


def _file(table: datasets.Dataset, path: str) -> bytes:
    buffer = io.BytesIO()
    if path.endswith(".parquet"):
        table.to_parquet(buffer)
    else:
        buffer.write("".join(json.dumps(row) + "\n" for row in table).encode())
    return buffer.getvalue()


def _paths(task: str) -> dict[str, str]:
    """Return the path of each split's file in the repository, by the split's name there."""
    folder, splits = LAYOUT[task][0], ["train", "validation", "test"]
    if task in ("cr", "subj"):
        return {"train": "train.jsonl", "test": "test.jsonl"}
    if task == "sst5":
        return {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}
    if task == "mr":
        return {split: f"{split}.parquet" for split in splits}
    if task == "trec":
        return {split: f"default/{split}/0000.parquet" for split in ("train", "test")}
    if task == "mnli":
        kinds = [f"{split}_{kind}" for split in splits[1:] for kind in ("matched", "mismatched")]
        return {split: PARQUET.format(folder=folder, split=split) for split in ("train", *kinds)}
    if task in ("squad", "drop"):
        splits = splits[:2]
    return {split: PARQUET.format(folder=folder, split=split) for split in splits}


def _card(configs: dict[str, dict[str, str]]) -> str:
    lines = ["---", "configs:"]
    for config, paths in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, path in paths.items():
            lines += [f"  - split: {split}", f"    path: {path.replace('00000-of-00001', '*')}"]
    return "\n".join([*lines, "---", "# A data set", ""])


def add_tasks(hub: Hub) -> None:
    """Add the data of all published tasks."""
    configs: dict[str, dict[str, dict[str, str]]] = {}
    for task in LAYOUT:
        source = TASKS[task].source
        assert source is not None
        paths = _paths(task)
        files = {path: _file(_table(task, split.split("_")[0]), path) for split, path in paths.items()}
        if source.revision == "refs/convert/parquet":
            script = {"trec.py": "raise RuntimeError", "README.md": "# TREC\n"}
            hub.add("datasets", source.dataset, script, branches={source.revision: files})
            continue
        configs.setdefault(source.dataset, {})[source.config or "default"] = paths
        sha = source.revision or ""
        repo: Repo = hub.repos.get(("datasets", source.dataset)) or hub.add("datasets", source.dataset, {}, sha=sha)
        repo.files |= files
        if paths["train"].endswith(".parquet") and LAYOUT[task][0]:
            repo.files["README.md"] = _card(configs[source.dataset]).encode()


def tiny_model(folder: Path) -> dict[str, bytes]:
    """Return the files of a tiny causal language model."""
    save_plain_llama(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
