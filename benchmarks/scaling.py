"""How costs grow with the number of parameters, on random Llama shapes, and what starting the program costs.

    python benchmarks/scaling.py [--sizes 1 10 100] [--threads 2] [--skip start]

Prints the CPU time of one Rademacher sweep, one MeZO step (two forwards of 16 tokens), one journal record and one plan
of 16 probes, and the slope of log time against log parameters: 1 is proportional, 0 does not grow.  Sizes are in
millions of parameters; 1000 takes 4.5 GB of memory and some minutes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from directions import machine, table

from zokernel.directions import Dense
from zokernel.journal import JournalWriter, Step
from zokernel.kernels.plan import make_plan
from zokernel.kernels.prober import ProbedTask
from zokernel.optim import MeZO

# Millions of parameters: (width, layers, vocabulary), the width of the MLP being 8/3 of the model's.
SHAPES = {1: (128, 4, 1024), 10: (320, 6, 4096), 100: (768, 12, 16384), 1000: (2048, 20, 16384)}
TOKENS = 16


def make_model(size: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, vocabulary = SHAPES[size]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the best CPU time of a call after a warm-up, whatever else is running."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def measure(size: int, repeats: int) -> dict[str, float]:
    model = make_model(size)
    weights = dict(model.named_parameters())
    ids = torch.randint(0, SHAPES[size][2], (1, TOKENS))
    steps = iter(range(10**9))

    def closure() -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return torch.nn.functional.cross_entropy(logits, ids[:, 0])

    @torch.no_grad()
    def forwards() -> None:
        closure()
        closure()

    @torch.no_grad()
    def sweep() -> None:
        Dense("rademacher").add_(weights, 1e-6, seed=0, step=next(steps), index=0)

    optimizer = MeZO(model, lr=1e-6)
    costs = {"parameters": float(sum(p.numel() for p in weights.values()))}
    costs["sweep"], costs["two forwards"] = seconds(sweep, repeats), seconds(forwards, repeats)
    costs["step"] = seconds(lambda: optimizer.step(closure), repeats)
    costs["record"] = record_seconds(optimizer)
    costs["plan"] = seconds(lambda: make_plan(plan_task(model, size), num_probes=16), 1)
    return costs


def record_seconds(optimizer: MeZO) -> float:
    """Return the time of one record, from the optimizer's losses to the operating system."""
    with tempfile.TemporaryDirectory() as folder:
        writer = JournalWriter.create(Path(folder) / "journal.zkj", {})
        numbers = iter(range(10**9))
        best = seconds(lambda: writer.append(Step(next(numbers), (1e-6,), tuple(optimizer.record()))), 200)
        writer.close()
    return best


def plan_task(model: torch.nn.Module, size: int) -> ProbedTask:
    """Return a made-up task of two options: three examples to step on and one to observe, of 16 tokens each."""
    batch = torch.randint(0, SHAPES[size][2], (4, TOKENS))

    def score(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1, :2]

    return ProbedTask(dict(model.named_parameters()), score, batch, torch.tensor([0, 1, 0, 1]), 3, batch.numel())


def slope(sizes: list[float], costs: list[float]) -> float:
    """Return the least-squares slope of log cost against log size."""
    x, y = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    return statistics.linear_regression(x, y).slope


def scaling(sizes: list[int], repeats: int) -> str:
    measurements = [measure(size, repeats) for size in sizes]
    parameters = [row["parameters"] for row in measurements]
    rows = []
    for quantity in ("sweep", "two forwards", "step", "record", "plan"):
        costs = [row[quantity] for row in measurements]
        slope_of_last = f"{slope(parameters[-2:], costs[-2:]):.2f}" if len(measurements) > 1 else "-"
        slope_of_all = f"{slope(parameters, costs):.2f}" if len(measurements) > 1 else "-"
        rows.append([quantity, *(f"{1e3 * cost:.3g}" for cost in costs), slope_of_all, slope_of_last])
    return table(["ms", *(f"{p / 1e6:.1f}M" for p in parameters), "slope", "slope of the last two"], rows)


def start(repeats: int) -> str:
    """Time the import of zokernel after torch, and ``zokernel --help``, each in fresh processes."""
    code = "import torch, time; s = time.perf_counter(); import zokernel; print(time.perf_counter() - s)"
    code_alone = "import time; s = time.perf_counter(); import zokernel; print(time.perf_counter() - s)"
    code_with_use = code.replace("; print", "; zokernel.optim.MeZO; print")
    imports, uses, alone_times, helps = [], [], [], []
    for _ in range(repeats):
        imports.append(float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
        uses.append(
            float(subprocess.run([sys.executable, "-c", code_with_use], capture_output=True, check=True).stdout)
        )
        alone_times.append(
            float(subprocess.run([sys.executable, "-c", code_alone], capture_output=True, check=True).stdout)
        )
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "zokernel", "--help"], capture_output=True, check=True)
        helps.append(time.perf_counter() - begin)
    names = ("import zokernel, torch there", "... and use an optimizer", "import zokernel alone", "zokernel --help")
    limits = ("< 0.3", "not asked", "not asked", "< 1")
    rows = [
        [name, limit, f"{statistics.median(times):.3f}", f"{min(times):.3f}"]
        for name, limit, times in zip(names, limits, (imports, uses, alone_times, helps))
    ]
    return table(["s", "asked", "median", "best"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, choices=list(SHAPES), default=[1, 10, 100])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip", nargs="+", choices=("scaling", "start"), default=[])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"Machine: {machine()}.\n")
    if "scaling" not in options.skip:
        print(scaling(options.sizes, options.repeats) + "\n", flush=True)
    if "start" not in options.skip:
        print(start(options.repeats))


if __name__ == "__main__":
    main()
