"""Accuracy rows of Tables 1 to 3, 8 to 10 and 16: every setting as a job, at full scale by hub id.

A row is a model, a task and a method.  ``--scale full`` runs the rows of the paper's models; smaller scales run the
same jobs with a tiny random model and synthetic rows, which shows that they work and says nothing about accuracy.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zokernel.experiments.base import Config, Result, Verdict, experiment
from zokernel.experiments.kerzoo.jobs import finetune_job, tiny_setup

logger = logging.getLogger(__name__)

TASKS: dict[str, dict[str, Any]] = {
    "SST-2": {"task": "sst2", "dataset_name": "stanfordnlp/sst2"},
    "RTE": {
        "template": '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        "label_words": ["Yes", "No"],
        "dataset_name": "aps/super_glue",
        "dataset_config": "rte",
    },
    "CB": {
        "template": 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        "label_words": ["Yes", "No", "Maybe"],
        "dataset_name": "aps/super_glue",
        "dataset_config": "cb",
    },
    "BoolQ": {
        "template": "{passage} {question}?\n",
        "label_words": ["No", "Yes"],
        "dataset_name": "aps/super_glue",
        "dataset_config": "boolq",
    },
    "WSC": {
        "template": (
            '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n'
        ),
        "label_words": ["No", "Yes"],
        "dataset_name": "aps/super_glue",
        "dataset_config": "wsc.fixed",
    },
    "WIC": {
        "template": (
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n'
        ),
        "label_words": ["No", "Yes"],
        "dataset_name": "aps/super_glue",
        "dataset_config": "wic",
    },
    "MultiRC": {
        "template": (
            '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n'
        ),
        "label_words": ["No", "Yes"],
        "dataset_name": "aps/super_glue",
        "dataset_config": "multirc",
    },
}
MODELS = {
    "OPT-2.7B": "facebook/opt-2.7b",
    "OPT-6.7B": "facebook/opt-6.7b",
    "OPT-13B": "facebook/opt-13b",
    "LLaMA3-3B": "meta-llama/Llama-3.2-3B",
    "LLaMA3-8B": "meta-llama/Meta-Llama-3-8B",
}
FULL = {"learning_rate": 1e-6, "eps": 1e-3}
LORA = {"learning_rate": 1e-4, "eps": 1e-2}


@dataclass(frozen=True)
class Row:
    """One number of a table.

    Attributes:
        table: Number of the table.
        model: Name of the model in the paper.
        task: Name of the task.
        method: Method of the library.
        lora: Whether an adapter is trained.
        published: Accuracy in per cent.
    """

    table: str
    model: str
    task: str
    method: str
    published: float
    lora: bool = False

    def settings(self, steps: int) -> dict[str, Any]:
        """Return the job's settings (Table 7)."""
        base = (LORA if self.lora else FULL) | {"method": self.method, "max_steps": steps}
        base |= {"lr_scheduler_type": "linear", "per_device_train_batch_size": 16}
        if self.method == "kerzoo":
            base |= {"method_args": ["radius_schedule=literal", f"total_steps={steps}", "averaging=journal"]}
        return base


def _rows(table: str, model: str, tasks: str, **by_method: tuple[bool, str, str]) -> list[Row]:
    rows = []
    for lora, method, numbers in by_method.values():
        for task, number in zip(tasks.split(), numbers.split()):
            rows.append(Row(table, model, task, method, float(number), lora))
    return rows


ROWS: list[Row] = [
    *_rows(
        "2",
        "OPT-2.7B",
        "SST-2 RTE CB BoolQ WSC WIC MultiRC",
        mezo=(False, "mezo", "91.6 63.5 69.6 67.4 62.5 59.8 59.4"),
        hizoo=(False, "hizoo", "90.8 60.6 70.4 68.0 60.2 56.6 54.8"),
        kerzoo=(False, "kerzoo", "92.6 65.3 71.4 67.0 65.4 60.2 62.0"),
        mezo_lora=(True, "mezo", "91.0 63.2 69.6 67.2 64.4 58.2 59.6"),
        hizoo_lora=(True, "hizoo", "90.6 65.2 71.4 67.4 52.6 58.8 59.0"),
        kerzoo_lora=(True, "kerzoo", "92.4 63.9 73.2 67.4 65.4 60.4 62.4"),
    ),
    *_rows(
        "3",
        "OPT-6.7B",
        "SST-2 RTE CB WSC",
        mezo=(False, "mezo", "92.2 69.6 73.2 60.6"),
        hizoo=(False, "hizoo", "90.8 66.3 71.8 62.1"),
        kerzoo=(False, "kerzoo", "94.0 71.9 78.6 65.4"),
        mezo_lora=(True, "mezo", "93.2 67.9 73.2 59.6"),
        hizoo_lora=(True, "hizoo", "90.6 67.2 71.4 62.1"),
        kerzoo_lora=(True, "kerzoo", "93.8 68.6 73.2 62.5"),
    ),
    *_rows(
        "8",
        "LLaMA3-3B",
        "SST-2 RTE CB WSC WIC",
        mezo=(False, "mezo", "89.0 57.8 73.2 65.4 58.2"),
        kerzoo=(False, "kerzoo", "93.0 65.3 76.7 65.4 59.0"),
    ),
    *_rows(
        "9",
        "LLaMA3-8B",
        "SST-2 RTE CB WSC WIC",
        mezo=(False, "mezo", "91.2 61.0 71.4 64.4 59.2"),
        kerzoo=(False, "kerzoo", "93.0 71.8 73.2 65.4 60.4"),
    ),
    *_rows(
        "10",
        "OPT-13B",
        "SST-2 RTE WIC BoolQ",
        mezo=(False, "mezo", "91.4 66.1 62.2 72.1"),
        hizoo=(False, "hizoo", "92.1 69.3 59.4 72.7"),
        kerzoo=(False, "kerzoo", "92.6 72.8 64.1 76.2"),
    ),
    *_rows(
        "16",
        "OPT-13B",
        "SST-2 RTE WIC BoolQ",
        sparse=(False, "sparse_mezo", "92.3 76.9 58.2 76.5"),
        subzero=(False, "subzero", "92.1 74.0 60.8 75.3"),
    ),
]
# What the pipeline has no task for: the paper's numbers stay unchecked here.
UNSUPPORTED = (
    "Table 1 (RoBERTa-large): prompts are scored by causal language models only, not at a mask.",
    "SQuAD and DROP (Tables 2, 3, 10, 16): generation scored by F1.",
)


def select(config: Config) -> list[Row]:
    """Return the rows to run: all at full scale, one a table and method otherwise."""
    tables = config.options.get("tables")
    rows = [row for row in ROWS if tables is None or row.table in tables]
    if config.scale == "full":
        return rows
    kept: dict[Any, Row] = {}
    for row in rows:
        kept.setdefault(row.method if config.scale == "smoke" else (row.table, row.method, row.lora), row)
    return list(kept.values())


@experiment(
    "kerzoo/accuracy", "Tables 2, 3, 8-10 and 16: accuracy, every row as a job (the paper's models at --scale full)"
)
def run(config: Config) -> Result:
    """Run the selected rows."""
    full = config.scale == "full"
    steps = config.pick("steps", smoke=2, cpu=5, full=4000)
    results = []
    for row in select(config):
        model: dict[str, Any] = {"model_name_or_path": MODELS[row.model], "lora": row.lora}
        data = dict(TASKS[row.task])
        settings = row.settings(steps)
        with tempfile.TemporaryDirectory() as temporary:
            if not full:
                tiny, data = tiny_setup(Path(temporary), data)
                model |= tiny
                settings |= {"eval_strategy": "no", "load_best_model_at_end": False, "per_device_train_batch_size": 4}
            else:
                settings |= {"save_strategy": "best"}
            metrics = finetune_job(model=model, data=data, settings=settings | {"seed": config.seed})
        logger.info(
            "Table %s, %s, %s, %s: %.3f", row.table, row.model, row.task, row.method, metrics["after"]["accuracy"]
        )
        results.append(vars(row) | {"accuracy": 100 * metrics["after"]["accuracy"], "steps": metrics["steps"]})
    what = "the paper's models" if full else "a tiny random model, which shows only that the jobs run"
    summary = f"{len(results)} of {len(ROWS)} rows ran end to end on {what}. Not covered: {' '.join(UNSUPPORTED)}"
    beats = [r for r in results if r["method"] == "kerzoo"]
    verdict = Verdict(
        "KerZOO is at least as accurate as MeZO in most settings (Tables 2, 3, 8-10).",
        "not run here",
        f"Needs --scale full and GPUs: {len(beats)} KerZOO rows are configured and ran on {what}."
        if not full
        else "Compare the accuracy column to the published one; one seed a row.",
        id="kerzoo-accuracy",
    )
    return Result(summary, {"rows": results, "unsupported": list(UNSUPPORTED)}, {}, {}, [verdict])
