"""One small run of every command that leaves an output folder: what the tests of reports and documentation look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zokernel.cli import main

SHORT = ["--max_steps", "2", "--precision", "fp32", "--eval_strategy", "no", "--save_strategy", "journal"]


def short(folder: Path, model: Path, data: Path) -> Path:
    """Fine-tune the tiny model for two steps, with a journal only."""
    files = [word for split in ("train", "test") for word in (f"--{split}_file", str(data / f"{split}.jsonl"))]
    words = ["--template", "{sentence} It was", "--label_words", "bad", "good", "--output_dir", str(folder)]
    assert main(["finetune", "--model_name_or_path", str(model), *files, *words, *SHORT]) == 0
    return folder


def finetune(folder: Path, model: Path, data: Path, *flags: str) -> Path:
    """Fine-tune the tiny model for 40 steps."""
    files = [
        word for split in ("train", "validation", "test") for word in (f"--{split}_file", str(data / f"{split}.jsonl"))
    ]
    words = ["--model_name_or_path", str(model), *files, "--label_words", "bad", "good", "--output_dir", str(folder)]
    words += ["--max_steps", "40", "--eval_steps", "20", "--learning_rate", "1e-3", "--precision", "fp32", *flags]
    assert main(["finetune", *words]) == 0
    return folder


def plan(folder: Path, model: Path, data: Path) -> Path:
    """Plan for the tiny model, verified by real gradients."""
    words = ["--model_name_or_path", str(model), "--train_file", str(data / "train.jsonl"), "--num_probes", "64"]
    words += ["--update_examples", "4", "--observe_examples", "2", "--verify", "true", "--verify_draws", "20"]
    assert main(["plan", *words, "--output_file", str(folder / "plan.json")]) == 0
    return folder


def kernel(folder: Path) -> Path:
    """Compare the kernels of a small network for one pair of inputs."""
    (folder / "nets.py").write_text(
        "import torch\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))\n"
    )
    for name, seed in (("o", 1), ("u", 2)):
        np.save(folder / f"{name}.npy", np.random.default_rng(seed).standard_normal((1, 3)).astype(np.float32))
    words = ["--model", f"{folder / 'nets.py'}:build", "--x_o", str(folder / "o.npy"), "--x_u", str(folder / "u.npy")]
    assert main(["kernel", *words, "--output_dir", str(folder)]) == 0
    return folder


def evolve(folder: Path) -> Path:
    """Predict the loss of a linear model."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 4))
    np.savez(folder / "data.npz", features=x, targets=x.sum(1) + 0.1 * rng.normal(size=12))
    words = ["--features", str(folder / "data.npz"), "--simulate", "50", "--steps", "10", "100"]
    assert main(["evolve", *words, "--output_dir", str(folder)]) == 0
    return folder
