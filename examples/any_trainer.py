"""A script for transformers' ``Trainer`` that classifies texts, changed in two lines.

python examples/any_trainer.py --model smollm2 --steps 200
"""

import argparse

import datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from zokernel.data import load_rows, resolve_model_path
from zokernel.finetune import zeroth_order  # 1: this import


def main(model: str = "smollm2", data: str = "movie-reviews", steps: int = 200, output_dir: str = "runs/any") -> dict:
    path = resolve_model_path(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    network = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    network.config.pad_token_id = tokenizer.pad_token_id

    rows = {split: datasets.Dataset.from_list(load_rows(data, split)[:1000]) for split in ("train", "validation")}
    encoded = {
        split: found.map(lambda row: tokenizer(row["sentence"], truncation=True, max_length=128))
        for split, found in rows.items()
    }

    def compute_metrics(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = zeroth_order(Trainer, method="mezo")(  # 2: instead of Trainer(
        model=network,
        args=TrainingArguments(
            output_dir=output_dir,
            learning_rate=2e-5,
            max_steps=steps,
            per_device_train_batch_size=16,
            eval_strategy="steps",
            eval_steps=max(1, steps // 4),
            save_strategy="best",
            metric_for_best_model="loss",
            load_best_model_at_end=True,
            report_to="none",
        ),
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(output_dir)
    print(f"validation loss {metrics['eval_loss']:.3f}, accuracy {metrics['eval_accuracy']:.3f}")
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in (("model", "smollm2"), ("data", "movie-reviews"), ("steps", 200), ("output_dir", "runs/any")):
        parser.add_argument(f"--{name}", default=default, type=type(default))
    main(**vars(parser.parse_args()))
