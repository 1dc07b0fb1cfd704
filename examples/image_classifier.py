"""Train the head of an image classifier with forward passes only: ``zeroth_order(Trainer)`` in place of ``Trainer``.

python examples/image_classifier.py --model facebook/dinov2-small --steps 300

Zeroth-order steps refine a classifier that already knows something.  A new head knows nothing, so it starts from the
features of 500 images.  Their mean is taken off meanwhile: along it the loss is so steep that only tiny steps would do.
"""

import argparse
import resource
import time

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from zokernel.data import load_mnist, resolve_model_path
from zokernel.finetune import zeroth_order

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet


class Digits(Dataset):
    """MNIST as colour images of another size, normalised as the backbone expects."""

    def __init__(self, images, labels, size: int):
        self.images, self.labels, self.size = torch.from_numpy(images), labels, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, n: int) -> dict:
        grey = torch.nn.functional.interpolate(self.images[n][None, None] / 255, (self.size, self.size))[0]
        return {"pixel_values": (grey - MEAN[:, None, None]) / STD[:, None, None], "labels": int(self.labels[n])}


@torch.no_grad()
def start_head(model, head, examples: Dataset) -> torch.Tensor:
    """Set the head by linear discriminant analysis of centred features, and return their mean."""
    found, labels = [], torch.tensor([example["labels"] for example in examples])
    hook = head.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    for n in range(0, len(examples), 50):
        model(pixel_values=torch.stack([examples[k]["pixel_values"] for k in range(n, min(n + 50, len(examples)))]))
    hook.remove()
    mean = torch.cat(found).mean(0)
    features = torch.cat(found) - mean
    means = torch.stack([features[labels == label].mean(0) for label in range(model.config.num_labels)])
    spread = torch.cov((features - means[labels]).T)
    head.weight.copy_(torch.linalg.solve(spread + spread.diagonal().mean() * torch.eye(len(spread)), means.T).T)
    head.bias.copy_(-(head.weight * means).sum(1) / 2)
    return mean


def main(
    model: str = "facebook/dinov2-small", steps: int = 300, size: int = 56, test: int = 1000, output_dir="runs/images"
) -> dict:
    train_images, train_labels, test_images, test_labels = load_mnist()
    train, held_out = Digits(train_images, train_labels, size), Digits(test_images[:test], test_labels[:test], size)
    network = AutoModelForImageClassification.from_pretrained(
        resolve_model_path(model), num_labels=10, ignore_mismatched_sizes=True
    ).eval()
    head = next(module for module in reversed(list(network.modules())) if isinstance(module, torch.nn.Linear))
    mean = start_head(network, head, torch.utils.data.Subset(train, range(500)))
    network.requires_grad_(False)
    head.requires_grad_(True)
    centring = head.register_forward_pre_hook(lambda module, args: (args[0] - mean.to(args[0].device),))

    trainer = zeroth_order(Trainer, method="mezo", num_perturbations=4, eps=1e-3)(
        model=network,
        args=TrainingArguments(
            output_dir=output_dir,
            learning_rate=1e-2,
            max_steps=steps,
            per_device_train_batch_size=32,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    before, began = trainer.evaluate(), time.perf_counter()
    trainer.train()
    seconds, after = time.perf_counter() - began, trainer.evaluate()
    centring.remove()
    head.bias.data -= head.weight.data @ mean.to(head.weight.device)  # the saved model needs no hook
    trainer.save_model(output_dir)
    for name in ("accuracy", "loss"):
        print(f"{name} {before[f'eval_{name}']:.3f} -> {after[f'eval_{name}']:.3f}")
    print(f"{seconds:.0f} s, peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    return {"before": before, "after": after, "seconds": seconds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="facebook/dinov2-small")
    parser.add_argument("--steps", default=300, type=int)
    parser.add_argument("--output_dir", default="runs/images")
    main(**vars(parser.parse_args()))
