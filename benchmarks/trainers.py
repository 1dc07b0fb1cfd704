"""Trainers of transformers and trl with forward passes only, on real weights: held-out loss before and after.

    python benchmarks/trainers.py dpo token --seeds 1 --results trainers.jsonl
    python benchmarks/trainers.py --results trainers.jsonl --table

Every job takes the best of two or three rates after a third of the steps, by rows that neither train nor report.
Finished runs are lines of the results and are not repeated.  `t5` and `bert` are folders of models, given by flags.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from same_settings import require_same_settings

from zokernel.data import load_rows, resolve_model_path
from zokernel.experiments.kept_runs import KeptRuns
from zokernel.finetune import zeroth_order

WORDS = ("negative", "positive")
TRAIN, CHOOSE, HELD_OUT = slice(0, 1000), slice(0, 64), slice(64, 184)
Row = dict[str, Any]


def classified(row: Row, tokenizer: Any) -> Row:
    return {**tokenizer(row["sentence"], truncation=True, max_length=40), "labels": row["label"]}


def tagged(row: Row, tokenizer: Any) -> Row:
    """The tag of a token follows from its text: 1 for a capital, 2 for digits and marks, 0 for the rest."""
    encoded = tokenizer(row["sentence"], truncation=True, max_length=40, return_offsets_mapping=True)
    texts = [row["sentence"][begin:end].strip() for begin, end in encoded.pop("offset_mapping")]
    tags = [-100 if not text else 1 if text[0].isupper() else 0 if text[0].isalpha() else 2 for text in texts]
    return {**encoded, "labels": tags}


def causal(row: Row, tokenizer: Any) -> Row:
    return dict(tokenizer(row["sentence"] + (tokenizer.eos_token or ""), truncation=True, max_length=40))


def number_span(row: Row, tokenizer: Any) -> Row | None:
    """A question whose answer is a span: the first number of the review."""
    match = re.search(r"\d+", row["sentence"])
    encoded = tokenizer("Which number?", row["sentence"], truncation=True, max_length=48)
    if match is None:
        return None
    begin, end = (encoded.char_to_token(place, sequence_index=1) for place in (match.start(), match.end() - 1))
    return None if begin is None or end is None else {**encoded, "start_positions": begin, "end_positions": end}


def review_type(row: Row, tokenizer: Any) -> Row:
    prompt = tokenizer(f"Is this review negative or positive? {row['sentence']}", truncation=True, max_length=48)
    return {**prompt, "labels": tokenizer(text_target=f"It is {WORDS[row['label']]}.").input_ids}


def preference(row: Row) -> Row:
    prompt = f"Review: {row['sentence']}\nSentiment:"
    return {"prompt": prompt, "chosen": f" {WORDS[row['label']]}", "rejected": f" {WORDS[1 - row['label']]}"}


def answered(row: Row) -> Row:
    """A preference for an answer, whichever it is, to none: that is learned sooner than the answer itself."""
    return {**preference(row), "rejected": " unclear"}


def completion(row: Row) -> Row:
    pair = preference(row)
    return {"prompt": pair["prompt"], "completion": pair["chosen"]}


def unpaired(row: Row) -> Row:
    pair, is_chosen = answered(row), len(row["sentence"]) % 2 == 0
    return {"prompt": pair["prompt"], "completion": pair["chosen" if is_chosen else "rejected"], "label": is_chosen}


@dataclass(frozen=True)
class Job:
    """What a user would bring: a trainer, its arguments, a model with a head, rows and a collator."""

    trainer: type
    arguments: type
    model: str
    head: type
    rows: Callable[..., Row | None]
    rates: tuple[float, ...]
    steps: int = 45
    collator: Callable[[Any], Any] | None = None
    options: dict[str, Any] | None = None
    lora: str | None = None
    batch: int = 8

    @property
    def eps(self) -> float:
        """The radius of its directions."""
        return 1e-2 if self.lora else 1e-3


def plain(model: str, head: type, rows: Callable[..., Row | None], collator: Any, **options: Any) -> Job:
    return Job(transformers.Trainer, transformers.TrainingArguments, model, head, rows, collator=collator, **options)


T, LORA = transformers, (1e-2, 3e-2)
JOBS = {
    "classification": plain(
        "smollm2", T.AutoModelForSequenceClassification, classified, T.DataCollatorWithPadding, rates=(2e-4, 6e-4)
    ),
    "token": plain(
        "bert",
        T.AutoModelForTokenClassification,
        tagged,
        T.DataCollatorForTokenClassification,
        rates=(1e-3, 3e-3, 1e-2),
        steps=1000,
        options={"num_labels": 3},
        batch=16,
    ),
    "question answering": plain(
        "bert",
        T.AutoModelForQuestionAnswering,
        number_span,
        T.DataCollatorWithPadding,
        rates=(1e-3, 3e-3, 1e-2),
        steps=1000,
        batch=16,
    ),
    "causal": plain(
        "smollm2",
        T.AutoModelForCausalLM,
        causal,
        lambda tokenizer: T.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        rates=(2e-4, 6e-4),
    ),
    "masked": plain(
        "bert",
        T.AutoModelForMaskedLM,
        causal,
        T.DataCollatorForLanguageModeling,
        rates=(1e-3, 3e-3, 1e-2),
        steps=240,
        batch=8,
    ),
    "seq2seq": Job(
        T.Seq2SeqTrainer,
        T.Seq2SeqTrainingArguments,
        "t5",
        T.AutoModelForSeq2SeqLM,
        review_type,
        rates=(2e-4, 6e-4),
        collator=T.DataCollatorForSeq2Seq,
    ),
    "sft": Job(trl.SFTTrainer, trl.SFTConfig, "smollm2", T.AutoModelForCausalLM, completion, LORA, lora="CAUSAL_LM"),
    "dpo": Job(
        *(trl.DPOTrainer, trl.DPOConfig, "smollm2", T.AutoModelForCausalLM, answered, LORA),
        lora="CAUSAL_LM",
        steps=24,
    ),
    "kto": Job(
        *(trl.KTOTrainer, trl.KTOConfig, "smollm2", T.AutoModelForCausalLM, unpaired, LORA),
        lora="CAUSAL_LM",
        steps=24,
    ),
    "reward": Job(
        trl.RewardTrainer,
        trl.RewardConfig,
        "smollm2",
        T.AutoModelForSequenceClassification,
        preference,
        LORA,
        options={"num_labels": 1},
        lora="SEQ_CLS",
    ),
}


def splits(job: Job, tokenizer: Any) -> tuple[datasets.Dataset, datasets.Dataset, datasets.Dataset]:
    datasets_of_splits = []
    for split, part in (("train", TRAIN), ("validation", CHOOSE), ("validation", HELD_OUT)):
        rare = job.rows is number_span  # few reviews have a number
        split, part = ("test", TRAIN) if rare and part == HELD_OUT else (split, part)
        rows = load_rows("movie-reviews", split)
        rows = [row for row in rows if re.search(r"\d", row["sentence"])] if rare else rows
        encoded = [job.rows(row, tokenizer) if job.collator else job.rows(row) for row in rows[part]]
        datasets_of_splits.append(datasets.Dataset.from_list([row for row in encoded if row is not None]))
    return tuple(datasets_of_splits)


def make_trainer(job: Job, folders: dict[str, str], rate: float, seed: int, steps: int, folder: str) -> tuple[Any, ...]:
    path = resolve_model_path(folders.get(job.model, job.model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    train, choose, held_out = splits(job, tokenizer)
    torch.manual_seed(seed)  # of new heads and adapters
    model = job.head.from_pretrained(path, dtype="float32", **(job.options or {}))
    model.config.pad_token_id = tokenizer.pad_token_id
    extra = {} if job.collator else {"max_length": 64, "bf16": True}
    arguments = job.arguments(
        output_dir=folder,
        learning_rate=rate,
        lr_scheduler_type="linear",
        max_steps=steps,
        per_device_train_batch_size=job.batch,
        per_device_eval_batch_size=8,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=steps,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        **extra,
    )
    keywords: dict[str, Any] = {"data_collator": job.collator(tokenizer)} if job.collator else {}
    if job.lora:
        keywords["peft_config"] = peft.LoraConfig(r=8, lora_alpha=16, task_type=job.lora)
    normalised = zeroth_order(
        job.trainer,
        method="forward_difference",
        method_args=["normalize=true"],
        num_perturbations=4,
        eps=job.eps,
    )
    trainer = normalised(
        model=model, args=arguments, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer, **keywords
    )
    return trainer, choose, held_out


def losses(trainer: Any, rows: datasets.Dataset) -> list[float]:
    """Mean loss of every eight rows, masks drawn alike each time."""
    means = []
    for begin in range(0, len(rows), 8):
        torch.manual_seed(begin)
        means.append(trainer.evaluate(rows.select(range(begin, min(begin + 8, len(rows)))))["eval_loss"])
    return means


def run(name: str, folders: dict[str, str], rate: float, seed: int, share: float) -> dict[str, Any]:
    """Train with a share of the steps; all of them report the held-out rows, fewer those that choose the rate."""
    job = JOBS[name]
    with tempfile.TemporaryDirectory() as folder:
        trainer, choose, held_out = make_trainer(job, folders, rate, seed, round(share * job.steps), folder)
        rows = held_out if share == 1 else choose
        before = losses(trainer, rows)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        after = losses(trainer, rows)
    changes = [after_loss - before_loss for before_loss, after_loss in zip(before, after, strict=True)]
    return {
        **{"job": name, "rate": rate, "seed": seed, "share": share},
        **{"forwards": trainer.run_log.forwards, "seconds": seconds, "rows": len(rows)},
        **{"before": statistics.mean(before), "after": statistics.mean(after), "change": statistics.mean(changes)},
        "standard_error": statistics.stdev(changes) / len(changes) ** 0.5,
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| job | rate | seed | forwards | held-out loss | paired change |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['job']} | {row['rate']:g} | {row['seed']} | {row['forwards']} "
        f"| {row['before']:.4f} to {row['after']:.4f} | {row['change']:+.4f} +- {1.96 * row['standard_error']:.4f} |"
        for row in results
        if row["share"] == 1
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", default=[], choices=[*JOBS, []])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--results", type=Path, default=Path("trainers.jsonl"))
    parser.add_argument("--bert", default="bert", help="folder of a masked model with a fast tokenizer")
    parser.add_argument("--t5", default="t5", help="folder of a T5 model")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    runs = KeptRuns(args.results)

    def once(name: str, rate: float, seed: int, share: float) -> dict[str, Any]:
        job, folders = JOBS[name], {"bert": args.bert, "t5": args.t5}
        shared = {"model": folders.get(job.model, job.model), "steps": round(share * job.steps)}
        shared |= {"eps": job.eps, "batch": job.batch}
        require_same_settings(runs, {"job": name, "share": share}, **shared)
        row = runs.find(job=name, rate=rate, seed=seed, share=share)
        if row is None:
            row = runs.add(run(name, folders, rate, seed, share) | shared)
            print(row, flush=True)
        return row

    if not args.table:
        for name in args.jobs or JOBS:
            sweep = [once(name, rate, 0, 1 / 3) for rate in JOBS[name].rates]
            best = min(sweep, key=lambda row: row["change"])
            for seed in args.seeds:
                once(name, best["rate"], seed, 1)
    print(table(runs.rows))


if __name__ == "__main__":
    main()
