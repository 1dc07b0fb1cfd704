"""Tangent kernels: the paper's LeNet curves and full-vocabulary norms, each next to the naive way, in one run.

python benchmarks/tangent_kernels.py               # LeNet curves and a 50k-vocabulary model of random weights
python benchmarks/tangent_kernels.py --smollm2     # the real SmolLM2-135M as well (fetched on first use)
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from zokernel.experiments.entk.lenet import lenet
from zokernel.experiments.entk.nets import random_prompt, tiny_language_model
from zokernel.kernels import FunctionalModel, entk, forward_mode, head_kernel, zo_entk_factors
from zokernel.kernels.curves import error_curves


def timed(label: str, function, *, repeats: int = 1):
    """Run, print the best time, and return it with the result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        best = min(best, time.perf_counter() - start)
    print(f"  {label:<74} {best:8.3f} s")
    return best, result


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def lenet_curves() -> None:
    print("LeNet (29,624 parameters), error curves P = 1..1000, ten pairs of one x_u, one seed")
    net = lenet()
    images = torch.rand(11, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    x_o, x_u = images[:10], images[10:]
    error_curves(net, x_o, x_u, max_perturbations=2, distribution="gaussian")  # compile the direction generator
    fast, curves = timed("error_curves", lambda: error_curves(net, x_o, x_u, distribution="gaussian"), repeats=2)
    sample, _ = timed(
        "one pair and one direction at a time, P = 50 (finite differences)",
        lambda: zo_entk_factors(net, x_o[:1], x_u, num_perturbations=50, method="finite_difference", check=False),
        repeats=2,
    )
    naive = sample * (1000 / 50) * 10
    print(f"  that for P = 1000 and ten pairs, extrapolated: {naive:.1f} s; ratio {naive / fast:.1f}x")
    print(f"  asked: under 5 s; error at P = 1000: {curves.errors_SNP[0, :, -1].mean():.3f}\n")


def exact_methods() -> None:
    print("Exact K of a random Llama, V = 2,048, hidden 16: three methods")
    model = FunctionalModel(tiny_language_model("llama", vocab_size=2048))
    x_o, x_u = random_prompt(1, vocab_size=2048), random_prompt(2, vocab_size=2048)
    times = {}
    with forward_mode():
        for method in ("contraction", "ntk_vp", "lm_head"):
            times[method], _ = timed(method, lambda m=method: entk(model, x_o, x_u, method=m, check=False))
    print(f"  lm_head against contraction: {times['contraction'] / times['lm_head']:.1f}x, "
          f"against ntk_vp: {times['ntk_vp'] / times['lm_head']:.1f}x\n")  # fmt: skip


def vocabulary(real: bool) -> None:
    name = "SmolLM2-135M" if real else "random Llama"
    if real:
        from transformers import AutoModelForCausalLM

        from zokernel.data import fetch

        model = AutoModelForCausalLM.from_pretrained(fetch("smollm2")).eval()
    else:
        model = tiny_language_model("llama", vocab_size=49_152)
    size = model.config.vocab_size
    print(f"{name}: norm of K_hat over the vocabulary, V = {size:,} (V x V would take {size**2 * 4 / 1e9:.1f} GB)")
    x_o, x_u = random_prompt(1, vocab_size=size), random_prompt(2, vocab_size=size)
    factors = timed(
        "zo_entk_factors, P = 16, finite differences",
        lambda: zo_entk_factors(model, x_o, x_u, num_perturbations=16, method="finite_difference", check=False),
    )[1]
    timed("Frobenius norms for P = 1, 4, 16 by Gram matrices", lambda: factors.squared_norms([1, 4, 16]), repeats=2)
    if not real:
        with forward_mode():
            _, exact = timed("exact K, factored by the head", lambda: head_kernel(FunctionalModel(model), x_o, x_u))
        timed("||K_hat - K|| / ||K|| for P = 1, 4, 16", lambda: factors.relative_errors(exact, [1, 4, 16]))
    print(f"  peak memory of the process so far: {peak_gigabytes():.2f} GB\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", action="store_true", help="also run on the real SmolLM2-135M")
    arguments = parser.parse_args()
    lenet_curves()
    exact_methods()
    vocabulary(real=False)
    if arguments.smollm2:
        vocabulary(real=True)
