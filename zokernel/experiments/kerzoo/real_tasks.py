"""The real tasks that language models are trained on: SST-2, TREC, RTE and sarcastic headlines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zokernel.errors import UsageError
from zokernel.experiments.base import Config
from zokernel.experiments.kept_runs import rows_sha256

DATA: dict[str, dict[str, Any]] = {  # data arguments by task; files are relative to the folder of the data
    "SST-2": {"task": "sst2", "train_file": "sst2/train.tsv", "validation_file": "sst2/dev.tsv"},
    "TREC": {
        "task": "trec",
        "train_file": "trec/train.csv",
        "validation_file": "trec/test.csv",
        "column_names": ["label", "question"],
    },
    "RTE": {"task": "rte", "train_file": "rte/train.tsv", "validation_file": "rte/dev.tsv"},
    "headlines": {
        "train_file": "headlines/train.jsonl",
        "validation_file": "headlines/test.jsonl",
        "template": "Headline: {headline}\nThis headline is",
        "label_column": "kind",
        "labels": ["0", "1"],
        "label_words": ["news", "satire"],
    },
}
OF_THE_PAPER = ("SST-2", "TREC", "RTE")


def tasks(config: Config) -> dict[str, dict[str, Any]]:
    """Return the data arguments of every task, by its name."""
    folder = config.options.get("data_folder")
    if folder is None:
        if config.scale == "full":
            return {"SST-2": {"task": "sst2", "dataset_name": "stanfordnlp/sst2"}}
        return {"movie reviews": {"task": "movie-reviews", "dataset_name": "movie-reviews"}}
    by_name: dict[str, dict[str, Any]] = {}
    for name in config.options.get("tasks", OF_THE_PAPER):
        if name not in DATA:
            raise UsageError(f"There is no task {name!r}: choose from {', '.join(DATA)}.")
        files = {key: str(Path(folder) / DATA[name][key]) for key in ("train_file", "validation_file")}
        by_name[name] = DATA[name] | files
    return by_name


def hashes(data: dict[str, Any]) -> dict[str, str]:
    """Return the hashes of the files of a task, which are those of other rows once a file is another."""
    from zokernel.data import load_table

    columns = data.get("column_names")
    splits = [split for split in ("train_file", "validation_file") if split in data]
    return {split: rows_sha256(load_table(data[split], column_names=columns)) for split in splits}
