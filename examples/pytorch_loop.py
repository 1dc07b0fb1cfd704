"""Train a digit classifier with forward passes only, in a plain PyTorch loop on full MNIST."""

import torch
from torch import nn

import zokernel as zk


def main(steps: int = 1500) -> float:
    torch.manual_seed(0)
    train_images, train_labels, test_images, test_labels = map(torch.from_numpy, zk.data.load_mnist())
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = zk.optim.MeZO(model, lr=2e-3, eps=1e-3, num_perturbations=8, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = torch.randint(len(train_images), (256,))
        x, y = train_images[batch].float() / 255, train_labels[batch].long()
        loss = optimizer.step(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}: loss {loss:.3f}, {optimizer.num_forwards} forwards")
    with torch.no_grad():
        accuracy = (model(test_images.float() / 255).argmax(1) == test_labels).float().mean().item()
    print(f"test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
