"""Maximise accuracy itself: a loss without a gradient, which forward passes can still descend.

Accuracy moves in steps of one over the batch, so batches are large and perturbations wide.

    python examples/accuracy_objective.py --model smollm2 --steps 200
"""

import argparse

from zokernel.finetune import DataArguments, ModelArguments, ZOConfig, finetune


def main(
    model: str = "smollm2", data: str = "movie-reviews", steps: int = 200, output_dir: str = "runs/accuracy"
) -> dict:
    metrics = finetune(
        ModelArguments(model_name_or_path=model),
        DataArguments(task="movie-reviews", dataset_name=data, max_eval_samples=200),
        ZOConfig(
            output_dir=output_dir,
            objective="accuracy",
            method="mezo",
            learning_rate=2e-5,
            eps=5e-3,
            num_perturbations=2,
            max_steps=steps,
            per_device_train_batch_size=32,
            report_to="none",
        ),
    )
    print(f"accuracy {metrics['before']['accuracy']:.3f} -> {metrics['after']['accuracy']:.3f}")
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="movie-reviews")
    parser.add_argument("--steps", default=200, type=int)
    parser.add_argument("--output_dir", default="runs/accuracy")
    main(**vars(parser.parse_args()))
