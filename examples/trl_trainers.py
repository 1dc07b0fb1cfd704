"""trl's trainers with forward passes only: SFT, DPO, KTO and reward modelling on one file of preferences.

python examples/trl_trainers.py dpo --file preferences.jsonl    # rows with prompt, chosen and rejected
"""

import argparse

import datasets
import peft
import torch
import trl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from zokernel.data import load_table, resolve_model_path
from zokernel.finetune import zeroth_order


def as_completions(rows):
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def as_unpaired(rows):
    return [
        {"prompt": row["prompt"], "completion": row[which], "label": which == "chosen"}
        for row in rows
        for which in ("chosen", "rejected")
    ]


JOBS = {  # trainer, its arguments, what it takes of the rows
    "sft": (trl.SFTTrainer, trl.SFTConfig, as_completions),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, list),
    "kto": (trl.KTOTrainer, trl.KTOConfig, as_unpaired),
    "reward": (trl.RewardTrainer, trl.RewardConfig, list),
}


def main(job: str, file: str, model: str = "smollm2", steps: int = 45, output_dir: str = "runs/trl") -> tuple:
    trainer_class, config, prepare = JOBS[job]
    path = resolve_model_path(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    auto, options = (
        (AutoModelForSequenceClassification, {"num_labels": 1}) if job == "reward" else (AutoModelForCausalLM, {})
    )
    network = auto.from_pretrained(path, dtype="float32", **options)
    network.config.pad_token_id = tokenizer.pad_token_id
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in load_table(file)]
    held_out = max(1, len(rows) // 6)

    forward_only = zeroth_order(
        trainer_class,
        method="forward_difference",
        method_args=["normalize=true"],  # then a rate does not depend on the scale of the loss
        num_perturbations=4,
        eps=1e-2,
    )
    trainer = forward_only(
        model=network,
        args=config(
            output_dir=output_dir,
            learning_rate=3e-2,
            lr_scheduler_type="linear",
            max_steps=steps,
            per_device_train_batch_size=8,
            max_length=128,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),  # which trl's default of bf16 needs to be told
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list(prepare(rows[held_out:])),
        eval_dataset=datasets.Dataset.from_list(prepare(rows[:held_out])),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS" if job == "reward" else "CAUSAL_LM"),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(output_dir)
    print(f"{job}: held-out loss {before:.4f} -> {after:.4f} with {trainer.run_log.forwards} forward passes")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=list(JOBS))
    parser.add_argument("--file", required=True)
    for name, default in (("model", "smollm2"), ("steps", 45), ("output_dir", "runs/trl")):
        parser.add_argument(f"--{name}", default=default, type=type(default))
    main(**vars(parser.parse_args()))
