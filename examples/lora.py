"""Train a LoRA adapter with forward passes only, then load it in plain peft.

python examples/lora.py --model smollm2 --steps 300
"""

import argparse

from zokernel.data import resolve_model_path
from zokernel.finetune import DataArguments, ModelArguments, ZOConfig, finetune


def main(model: str = "smollm2", data: str = "movie-reviews", steps: int = 300, output_dir: str = "runs/lora") -> dict:
    metrics = finetune(
        ModelArguments(model_name_or_path=model, lora=True, lora_r=8, lora_alpha=16),
        DataArguments(task="movie-reviews", dataset_name=data, max_eval_samples=200),
        ZOConfig(
            output_dir=output_dir,
            method="mezo",
            learning_rate=1e-3,
            eps=1e-2,
            max_steps=steps,
            per_device_train_batch_size=4,
            report_to="none",
        ),
    )
    print(f"accuracy {metrics['before']['accuracy']:.3f} -> {metrics['after']['accuracy']:.3f}")

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(resolve_model_path(model))
    adapted = PeftModel.from_pretrained(base, output_dir)
    print(f"the adapter has {sum(p.numel() for n, p in adapted.named_parameters() if 'lora' in n):,} parameters")
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in (("model", "smollm2"), ("data", "movie-reviews"), ("steps", 300), ("output_dir", "runs/lora")):
        parser.add_argument(f"--{name}", default=default, type=type(default))
    main(**vars(parser.parse_args()))
