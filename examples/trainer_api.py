"""Fine-tune a language model from Python: tokenize your rows with a template, and let ``ZOTrainer`` do the rest.

python examples/trainer_api.py --model smollm2 --steps 300
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from zokernel.data import load_rows, resolve_model_path
from zokernel.finetune import EncodedDataset, PromptTask, ZOConfig, ZOTrainer, choose_collator, encode


def main(model: str = "smollm2", data: str = "movie-reviews", steps: int = 300, output_dir: str = "runs/api") -> dict:
    path = resolve_model_path(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    network = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()

    task = PromptTask("Movie review: {sentence}\nOverall, the movie was", ("terrible", "great"))
    rows = {split: load_rows(data, split)[:1000] for split in ("train", "validation")}
    encoded = {split: EncodedDataset(encode(task, found, tokenizer)) for split, found in rows.items()}

    trainer = ZOTrainer(
        network,
        ZOConfig(
            output_dir=output_dir,
            method="mezo",
            learning_rate=2e-5,
            max_steps=steps,
            per_device_train_batch_size=4,
            report_to="none",  # or tensorboard, wandb, trackio
        ),
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        data_collator=choose_collator(network, tokenizer.pad_token_id, encoded["validation"]),
        processing_class=tokenizer,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(output_dir)
    print(f"validation loss {metrics['eval_loss']:.3f}, accuracy {metrics['eval_accuracy']:.3f}")
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in (("model", "smollm2"), ("data", "movie-reviews"), ("steps", 300), ("output_dir", "runs/api")):
        parser.add_argument(f"--{name}", default=default, type=type(default))
    main(**vars(parser.parse_args()))
