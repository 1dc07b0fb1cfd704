"""Train the head of an image classifier with forward passes only: ``zeroth_order(Trainer)`` in place of ``Trainer``.

python examples/image_classifier.py --model facebook/dinov2-small

The backbone rests, so its features are computed once.  The new head starts at zero and sees them standardised: a rate
must suit the steepest direction of the loss, and raw features differ by far in size.
"""

import argparse
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
def features_of(network, head, images: Dataset) -> torch.Tensor:
    """Return what the backbone hands to the head, a row per image."""
    features = []
    hook = head.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    for n in range(0, len(images), 50):
        network(pixel_values=torch.stack([images[k]["pixel_values"] for k in range(n, min(n + 50, len(images)))]))
    hook.remove()
    return torch.cat(features)


class Probe(torch.nn.Module):
    """A head on standardised features."""

    def __init__(self, head, features):
        super().__init__()
        self.standardise = torch.nn.BatchNorm1d(head.in_features, affine=False, momentum=None)
        self.head = head
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        self.standardise(features)  # in training mode: takes their means and variances, which steps leave alone

    def forward(self, features, labels):
        """Return the mean cross entropy and the logits of a batch."""
        logits = self.head(self.standardise(features))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    @torch.no_grad()
    def fold(self):
        """Give the head the weights that do the same with the raw features."""
        self.head.weight /= (self.standardise.running_var + self.standardise.eps).sqrt()
        self.head.bias -= self.head.weight @ self.standardise.running_mean


def main(
    model: str = "facebook/dinov2-small",
    steps: int = 3000,
    output_dir: str = "runs/images",
    learning_rate: float = 1e-2,
    seed: int = 0,
    size: int = 56,
    images: int = 4000,
) -> dict:
    train_images, train_labels, test_images, test_labels = load_mnist()
    network = AutoModelForImageClassification.from_pretrained(
        resolve_model_path(model), num_labels=10, ignore_mismatched_sizes=True
    ).eval()
    head = next(module for module in reversed(list(network.modules())) if isinstance(module, torch.nn.Linear))
    train = Digits(train_images[:images], train_labels[:images], size)
    held_out = Digits(test_images[:1000], test_labels[:1000], size)
    features = {split: features_of(network, head, split) for split in (train, held_out)}
    rows = {
        split: [{"features": row, "labels": int(label)} for row, label in zip(found, split.labels)]
        for split, found in features.items()
    }
    probe = Probe(head, features[train])

    trainer = zeroth_order(Trainer, method="mezo", num_perturbations=16, eps=1e-3)(
        model=probe,
        args=TrainingArguments(
            output_dir=output_dir,
            learning_rate=learning_rate,
            max_steps=steps,
            per_device_train_batch_size=256,
            per_device_eval_batch_size=250,
            save_strategy="no",
            seed=seed,
            report_to="none",
        ),
        train_dataset=rows[train],
        eval_dataset=rows[held_out],
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    before, began = trainer.evaluate(), time.perf_counter()
    trainer.train()
    seconds, after = time.perf_counter() - began, trainer.evaluate()
    probe.cpu().fold()
    network.save_pretrained(output_dir)
    for name in ("accuracy", "loss"):
        print(f"{name} {before[f'eval_{name}']:.3f} -> {after[f'eval_{name}']:.3f}")
    print(f"{trainer.run_log.forwards} forward passes of the head in {seconds:.0f} s")
    return {"before": before, "after": after, "seconds": seconds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("model", "facebook/dinov2-small"), ("steps", 3000), ("output_dir", "runs/images")):
        parser.add_argument(f"--{name}", default=default, type=type(default))
    main(**vars(parser.parse_args()))
