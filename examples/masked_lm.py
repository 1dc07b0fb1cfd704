"""Fine-tune a masked language model at the mask, on sixteen examples per class.

python examples/masked_lm.py --model FacebookAI/roberta-base --steps 1000
"""

import argparse

from zokernel.finetune import DataArguments, ModelArguments, ZOConfig, finetune


def main(
    model: str = "FacebookAI/roberta-base",
    data: str = "movie-reviews",
    steps: int = 1000,
    output_dir: str = "runs/masked",
    k_shot: int = 16,
) -> dict:
    metrics = finetune(
        ModelArguments(model_name_or_path=model),  # the configuration says that the model fills masks
        DataArguments(
            task="sst2",  # "{sentence} It was {mask}.", terrible or great
            dataset_name=data,
            protocol="mezo-roberta",
            k_shot=k_shot,
        ),
        ZOConfig(
            output_dir=output_dir,
            method="kerzoo",
            learning_rate=1e-6,
            max_steps=steps,
            per_device_train_batch_size=16,
            data_seed=13,  # which sixteen examples; published results are means over 13, 21, 42, 87, 100
            report_to="none",
        ),
    )
    print(f"accuracy {metrics['before']['accuracy']:.3f} -> {metrics['after']['accuracy']:.3f}")
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="FacebookAI/roberta-base")
    parser.add_argument("--data", default="movie-reviews")
    parser.add_argument("--steps", default=1000, type=int)
    parser.add_argument("--output_dir", default="runs/masked")
    main(**vars(parser.parse_args()))
