"""Teach a model to answer in JSON by a reward function, without any answers, and with forward passes only.

python examples/rewards.py --model smollm2 --steps 20
"""

import argparse
import json
from pathlib import Path

from zokernel.finetune import DataArguments, ModelArguments, ZOConfig, finetune

NAMES = ["Ada", "Bo", "Chen", "Dina", "Emil", "Fay", "Gus", "Hana", "Ivo", "Jia", "Kofi", "Lena", "Milo", "Nora"]
TOWNS = ["Oslo", "Rome", "Lima", "Kyoto", "Accra", "Quito", "Turin", "Basel"]
PROMPT = "{} is {} years old and lives in {}.\nAs a JSON object with the keys name, age, town:\n"


def score(completions: list, **columns: list) -> list[float]:
    """Return 1 for text that begins with a JSON object of these keys, 0.5 for one of others (as trl calls it)."""
    scores = []
    for completion in completions:
        try:
            value, _ = json.JSONDecoder().raw_decode(completion[0]["content"].lstrip())
        except ValueError:
            value = None
        right = isinstance(value, dict) and value.keys() == {"name", "age", "town"}
        scores.append(1.0 if right else 0.5 if isinstance(value, dict) else 0.0)
    return scores


def main(model: str = "smollm2", steps: int = 20, output_dir: str = "runs/rewards", method: str = "es") -> dict:
    prompts = [PROMPT.format(name, 20 + n, town) for n, name in enumerate(NAMES) for town in TOWNS]
    data = Path(f"{output_dir}-prompts.jsonl")
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": prompt}]}) + "\n" for prompt in prompts))
    metrics = finetune(
        ModelArguments(model_name_or_path=model, lora=True),
        DataArguments(train_file=str(data), reward_function=[f"{__file__}:score"], max_new_tokens=40),
        ZOConfig(
            output_dir=output_dir,
            objective="reward",
            method=method,
            num_perturbations=4,  # 8 members, which answer the prompts of a step in one generate
            eps=3e-2,
            learning_rate=5e-2,
            max_steps=steps,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=16,
        ),
    )
    print(f"reward {metrics['before']['reward']:.3f} -> {metrics['after']['reward']:.3f}")
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for flag, default in {"model": "smollm2", "steps": 20, "output_dir": "runs/rewards", "method": "es"}.items():
        parser.add_argument(f"--{flag}", default=default, type=type(default))
    main(**vars(parser.parse_args()))
