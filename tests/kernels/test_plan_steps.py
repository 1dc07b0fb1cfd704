"""The slope that steps meet, over many batches: the rate of a run rests on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plan_tasks import small_task

from zokernel.commands.plan import PlanArguments, load_task
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.kernels.plan import make_plan
from zokernel.kernels.prober import ProbedTask, Prober, StepBatch, step_slopes
from zokernel.kernels.probes import Steps, jackknife, rms_slope


def random_batch(seed, scale=1.0, size=6):
    generator = torch.Generator().manual_seed(seed)
    inputs = scale * torch.randn(size, 5, generator=generator).double()
    return StepBatch(inputs, torch.randint(0, 2, (size,), generator=generator), num_tokens=size)


def gradient_of(task, batch):
    loss = F.cross_entropy(task.score(batch.inputs), batch.labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(task.params.values()))])


def test_the_slope_is_the_rms_over_batches_not_that_of_one():
    """Rademacher slopes have E c^2 = |g|^2 and Var c^2 = 2 (|g|^4 - sum g_i^4): four standard errors."""
    batches = [random_batch(seed, scale=3.0 if seed % 4 == 0 else 0.5) for seed in range(400)]
    task = replace(small_task(), steps=batches)
    gradients = [gradient_of(task, batch) for batch in batches]
    squares = torch.stack([g.square().sum() for g in gradients])
    variances = torch.stack([2 * (g.square().sum().square() - g.pow(4).sum()) for g in gradients])
    with Prober(task) as prober:
        slopes = step_slopes(prober, 1e-4)
    assert (prober.forwards, prober.tokens) == (800, 800 * 6)
    standard_error = (variances.sum().sqrt() / len(batches)).item()
    assert abs(slopes.square().mean() - squares.mean()) < 4 * standard_error < 0.5 * squares.mean()
    measured = jackknife(Steps(slopes), rms_slope)
    assert measured.value == pytest.approx(slopes.square().mean().sqrt().item())
    # To first order, the error of a root is that of the mean square over twice the root.
    assert measured.error == pytest.approx(
        (slopes.square().std() / len(slopes) ** 0.5 / (2 * measured.value)).item(), rel=0.05
    )


def test_steeper_batches_ask_for_a_smaller_rate():
    alone = small_task(update=8, observe=4)
    with_steps = replace(alone, steps=[random_batch(seed, scale=4.0, size=8) for seed in range(32)])
    settings = {"num_probes": 32, "eps": 1e-3, "counts": (1,), "num_steps": 100_000}
    plan, other = make_plan(alone, **settings), make_plan(with_steps, **settings)
    assert plan.slope == plan.gradient_norm == other.gradient_norm
    assert plan.reach == other.reach
    assert other.slope.value > 1.5 * plan.slope.value
    # Slopes that grow along the walk limit both rates, which are R_2 sqrt(P / (T ln 4)) / (2 s).
    assert other.run_rate[1].value * other.slope.value == pytest.approx(plan.run_rate[1].value * plan.slope.value)
    assert other.forwards == plan.forwards + 2 * 32
    assert other.tokens == plan.tokens + 2 * 32 * 8
    relative = [m.error / m.value for m in (other.run_rate[1], other.reach, other.slope)]
    assert relative[0] == pytest.approx((relative[1] ** 2 + relative[2] ** 2) ** 0.5)


def test_the_command_draws_a_batch_for_every_probe(tiny_lm_path, tiny_reviews_path):
    model = ModelArguments(model_name_or_path=str(tiny_lm_path))
    data = DataArguments(
        train_file=str(tiny_reviews_path / "train.jsonl"), template="{sentence} It was", label_words=["bad", "good"]
    )
    task, exact = load_task(model, data, PlanArguments(update_examples=4, observe_examples=2, num_probes=9, seed=3))
    assert isinstance(task, ProbedTask)
    assert [len(batch.labels) for batch in task.steps] == [4] * 9
    assert len({tuple(batch.inputs["input_ids"].flatten().tolist()) for batch in task.steps}) == 9
    assert all(batch.num_tokens == batch.inputs["attention_mask"].sum() for batch in task.steps)
    assert [batch.num_tokens for batch in exact.steps] == [batch.num_tokens for batch in task.steps]
