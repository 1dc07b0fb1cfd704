"""Use an installed zokernel as its users do: ``python scripts/check_install.py core|EXTRA ...``.

Run by ``scripts/test_wheel.sh`` in an environment that has the wheel and one extra.  Needs no network.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--precision", "fp32", "--report_to", "none"]
LABELS = ["--template", "{sentence} It was", "--label_words", "bad", "good"]


def zokernel(*words: str, fails: bool = False) -> str:
    """Run the installed command; return what it printed.

    Args:
        words: Its arguments.
        fails: Whether it must fail, in one sentence without a traceback.

    Returns:
        Standard output and standard error.
    """
    command = [str(Path(sys.executable).with_name("zokernel")), *words]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    printed = finished.stdout + finished.stderr
    assert (finished.returncode != 0) == fails, f"{' '.join(command)}: exit code {finished.returncode}\n{printed}"
    assert "Traceback" not in printed, printed
    return printed


def tiny_model(folder: Path) -> Path:
    """Save a tiny random Llama with a tokenizer and a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from zokernel.experiments.kerzoo.jobs import tiny_tokenizer

    tokenizer = tiny_tokenizer(["bad", "good"], {"eos_token": "</s>", "pad_token": "<pad>"})
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids)).save_pretrained(folder)
    return folder


def reviews(folder: Path) -> Path:
    """Write sixteen labelled sentences."""
    rows = [{"sentence": f"A {word} film, number {i}.", "label": i % 2} for i, word in enumerate(["dull", "fine"] * 8)]
    path = folder / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check_core() -> None:
    """Imports, help, a training loop, its journal, and what is said where an extra is missing."""
    import torch

    import zokernel as zk

    here = Path(zk.__file__).resolve()
    assert "site-packages" in here.parts, f"imported from {here}, not from an installed wheel"
    assert zk.__version__ == importlib.metadata.version("zokernel")
    assert (here.parent / "py.typed").is_file()
    for name in ("directions", "estimators", "perturb", "optim", "journal", "kernels", "theory", "dynamics", "data"):
        importlib.import_module(f"zokernel.{name}")
    assert "transformers" not in sys.modules
    assert "finetune" in zokernel("--help")
    assert zk.__version__ in zokernel("--version")
    assert "smollm2" in zokernel("fetch")
    if importlib.util.find_spec("transformers") is None:
        printed = zokernel("finetune", "--train_file", "none.jsonl", "--output_dir", "run", fails=True)
        assert "pip install 'zokernel[finetune]'" in printed, printed

    torch.manual_seed(0)
    x = torch.randn(256, 10)
    y = (x.sum(1) > 0).long()
    model = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    optimizer = zk.optim.MeZO(model, lr=1e-2, eps=1e-3, num_perturbations=4)
    for _ in range(500):
        loss = optimizer.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
    assert loss < 0.45, f"the loss is {loss:.3f}; it begins at 0.69"
    assert optimizer.num_forwards == 4000


def check_finetune() -> None:
    """A run on a file of rows, predictions of it, and the replay of its journal."""
    model, rows = tiny_model(Path("model")), reviews(Path())
    task = ["--train_file", str(rows), *LABELS]
    zokernel("finetune", "--model_name_or_path", str(model), *task, *TRAIN, "--output_dir", "run")
    assert json.loads(Path("run/metrics.json").read_text())
    assert Path("run/loss.png").stat().st_size > 0
    recipes = importlib.resources.files("zokernel.finetune.settings") / "recipes"
    assert any(path.name == "mezo-opt.yaml" for path in recipes.iterdir())
    zokernel("predict", "--model", "run", "--file", str(rows), "--output_file", "answers.csv")
    assert len(Path("answers.csv").read_text().splitlines()) == 17
    zokernel("replay", "--base", str(model), "--journal", "run", "--output_dir", "rebuilt")
    zokernel("finetune", "--model_name_or_path", str(model), *task, *TRAIN, "--lora", "true", "--output_dir", "lora")


def check_report() -> None:
    """An experiment of the papers with its figures, and the page that explains it."""
    zokernel("reproduce", "nzk/linear_d2", "--scale", "smoke", "--output_dir", "runs")
    zokernel("report", "runs/nzk/linear_d2")
    assert "holds" in zokernel("claims")
    assert list(Path("runs").rglob("*.png"))
    assert list(Path("runs").rglob("*.html"))


def check_quantized() -> None:
    """Adapters on bases of four and eight bits."""
    model, rows = tiny_model(Path("model")), reviews(Path())
    for name, flags in {"four": ["--load_in_4bit", "true"], "eight": ["--quantization", "torchao:int8"]}.items():
        task = ["--train_file", str(rows), *LABELS, *TRAIN, "--lora", "true", *flags]
        zokernel("finetune", "--model_name_or_path", str(model), *task, "--output_dir", name)


def check_trl() -> None:
    """A trainer of trl with forward passes only."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from zokernel.finetune import zeroth_order

    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}] * 8
    settings = SFTConfig("run", max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False)
    trainer = zeroth_order(SFTTrainer, method="mezo")(
        model=str(tiny_model(Path("model"))), args=settings, train_dataset=Dataset.from_list(rows)
    )
    assert trainer.train().global_step == 2


def check_reasoning() -> None:
    """A task of reasoning-gym as the reward."""
    model = tiny_model(Path("model"))
    sizes = ["--max_train_samples", "8", "--max_eval_samples", "2", "--max_test_samples", "2", "--max_new_tokens", "4"]
    reward = ["--objective", "reward", "--reward_function", "reasoning_gym:chain_sum", "--method", "es"]
    zokernel(
        "finetune", "--model_name_or_path", str(model), *reward, *sizes, *TRAIN, "--lora", "true", "--output_dir", "run"
    )


def check_onnx() -> None:
    """Losses from an engine that has no gradients."""
    import onnxruntime
    import torch

    import zokernel as zk

    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 1), torch.randn(16, 3)
    y = x.sum(1, keepdim=True)
    weights = dict(model.named_parameters())

    class Loss(torch.nn.Module):
        def forward(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return ((torch.nn.functional.linear(x, weight, bias) - y) ** 2).mean()

    torch.onnx.export(Loss(), tuple(weights.values()), "loss.onnx", input_names=list(weights), verbose=False)
    session = onnxruntime.InferenceSession("loss.onnx", providers=["CPUExecutionProvider"])
    optimizer = zk.optim.MeZO(model, lr=5e-2, eps=1e-3)
    losses = []
    for _ in range(100):
        losses_at = {}
        for point in optimizer.ask():
            feed = {name: weight.detach().numpy() for name, weight in optimizer.weights_at(point).items()}
            losses_at[point] = float(session.run(None, feed)[0])
        losses.append(optimizer.tell(losses_at))
    assert losses[-1] < 0.05 * losses[0], losses


CHECKS = {
    "core": check_core,
    "finetune": check_finetune,
    "report": check_report,
    "quantized": check_quantized,
    "trl": check_trl,
    "reasoning": check_reasoning,
    "onnx": check_onnx,
}


def main() -> None:
    """Check what was asked for, each in an empty folder."""
    for name in sys.argv[1:] or ["core"]:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            CHECKS[name]()
            os.chdir("/")
        print(f"{name}: works on Python {sys.version.split()[0]} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
