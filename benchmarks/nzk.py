"""How long the NZK takes: the published code (one vector at a time), vectorised sampling, and the closed form.

Run: python benchmarks/nzk.py.  Each line is measured in this run; the published code is timed on a subset and scaled.
"""

from __future__ import annotations

import time

import torch

from zokernel.dynamics import Evolution
from zokernel.experiments.nzk.problems import Problem, image_network_problem, linear_problem, stand_in_images
from zokernel.kernels import sample_nzk
from zokernel.theory import expected_nzk, process_moments

SAMPLES, SUBSET, STEPS = 10_000, 40, 16_000


def one_at_a_time(features: torch.Tensor, count: int) -> torch.Tensor:
    """Sample the shared kernel as the public code does: repeat z for every row, keep every matrix, average last."""
    n, dim = features.shape
    kernels = []
    for _ in range(count):
        z = torch.randn(1, dim, dtype=features.dtype)
        rows = z.repeat(n, 1)
        first = (rows * features).sum(1, keepdim=True).T
        third = (rows * rows).sum(1, keepdim=True)
        kernels.append(third * (first.T @ first))
    return torch.stack(kernels).mean(0)


def timed(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(name: str, problem: Problem) -> float:
    x = problem.features
    public = timed(lambda: one_at_a_time(x, SUBSET))[0] * SAMPLES / SUBSET
    sampled, estimate = timed(lambda: sample_nzk(x, num_samples=SAMPLES))
    closed, exact = timed(lambda: expected_nzk(x))
    z = ((estimate.mean - exact) / estimate.standard_error).square().mean().sqrt()

    def curves():
        first = Evolution(problem.f0, problem.y, problem.kernel, problem.lr)
        zeroth = Evolution(problem.f0, problem.y, exact, problem.lr)
        process = first.at(problem.lr, moments=process_moments("gaussian", problem.dim, "zo_sgd"))
        steps = torch.arange(STEPS)
        return first.mean_loss(steps), zeroth.mean_loss(steps), process.expected_loss(steps)

    evolution = timed(curves)[0]

    def iterate():
        f, step = problem.f0.clone(), problem.lr / len(problem.y)
        for _ in range(SUBSET):
            f = f - step * exact @ (f - problem.y)

    public_curves = 2 * timed(iterate)[0] * STEPS / SUBSET
    total = sampled + closed + evolution
    print(
        f"{name:<14} n={len(x):<4} d={x.shape[1]:<4} public kernel {public:8.2f} s (scaled from {SUBSET} samples), "
        f"vectorised {sampled:6.3f} s ({public / sampled:,.0f}x), closed form {1e3 * closed:6.2f} ms "
        f"({public / closed:,.0f}x), z rms {float(z):.2f}; three {STEPS:,}-step curves {evolution:6.3f} s "
        f"(iterating two: {public_curves:.2f} s); kernels and curves {total:.3f} s"
    )
    return total


def main():
    images, labels = stand_in_images(28, 150, (3, 5))
    problems = {
        "linear d=2": linear_problem(2, 1 / 20),
        "linear d=30": linear_problem(30, 0.0),
        "network d=711": image_network_problem(images, labels, per_class=100),
    }
    worst = max(measure(name, problem) for name, problem in problems.items())
    print(f"slowest kernels and curves: {worst:.2f} s (goal: under 2 s)")


if __name__ == "__main__":
    main()
