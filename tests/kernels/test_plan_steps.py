"""The slope that steps meet, over many batches: the rate of a run rests on it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import mlp
from plan_tasks import small_task

from zokernel.commands.plan import PlanArguments, load_task
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.kernels.plan import make_plan
from zokernel.kernels.plan_walk import FIRST_STEP, FIRST_WALK, measure_growth, reach, rms_slope, start_slopes
from zokernel.kernels.prober import ProbedTask, Prober, StepBatch
from zokernel.kernels.probes import Slopes, least_noise_scale


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
        slopes = start_slopes(prober, 1e-4, len(batches))
    assert (prober.forwards, prober.tokens) == (800, 800 * 6)
    standard_error = (variances.sum().sqrt() / len(batches)).item()
    assert abs(slopes.square().mean() - squares.mean()) < 4 * standard_error < 0.5 * squares.mean()
    measured = rms_slope(slopes)
    assert measured.value == pytest.approx(slopes.square().mean().sqrt().item())
    assert measured.error == pytest.approx((slopes.square().std() / len(slopes) ** 0.5 / (2 * measured.value)).item())


def test_steeper_batches_ask_for_a_smaller_rate():
    alone = small_task(update=8, observe=4)
    with_steps = replace(alone, steps=[random_batch(seed, scale=4.0, size=8) for seed in range(32)])
    settings = {"num_probes": 32, "eps": 1e-3, "counts": (1,), "num_steps": 100_000}
    plan, other = make_plan(alone, **settings), make_plan(with_steps, **settings)
    # Without other batches, the slopes are those of its own batch, along other directions than the probes.
    assert plan.slope.value == pytest.approx(plan.gradient_norm.value, abs=4 * plan.slope.error)
    assert other.slope.value > 1.5 * plan.slope.value
    for each in (plan, other):  # slopes that grow along the walk limit both rates
        analytic = 0.8 * each.reach.value / each.slope.value / math.sqrt(100_000 * math.log(4))
        assert each.run_rate[1].value == pytest.approx(analytic)
    relative = [m.error / m.value for m in (other.run_rate[1], other.reach, other.slope)]
    assert relative[0] == pytest.approx((relative[1] ** 2 + relative[2] ** 2) ** 0.5)


def test_every_walk_takes_its_slopes_in_a_batch_of_its_own_at_the_start_and_far_away():
    """Examples of batches differ by 1,000 in scale, so slopes of one batch say nothing of the others."""
    batches = [random_batch(seed, scale=scale) for seed, scale in enumerate((0.01, 0.1, 1.0, 10.0))]
    task = replace(small_task(), steps=batches)
    with Prober(task) as prober:
        start = start_slopes(prober, 1e-3, len(batches))
        growth = measure_growth(prober, start, 1e-3)
        assert growth.start_W is start
        assert 0 < growth.distance < math.inf
        prober.draw.add_(prober.draw.params, [growth.distance], [FIRST_WALK + 2])
        gradients = [gradient_of(task, batches[2])]
        prober.restore()
        gradients.append(gradient_of(task, batches[2]))
        step = {name: torch.zeros_like(p) for name, p in task.params.items()}
        prober.draw.add_(step, [1.0], [FIRST_STEP + 2])
    direction = torch.cat([part.flatten() for part in step.values()])
    expected = [(gradient @ direction).item() for gradient in gradients]
    assert [growth.slopes_W[2].item(), start[2].item()] == pytest.approx(expected, rel=1e-3)
    assert reach(growth) <= growth.distance


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


@pytest.mark.parametrize("noise_scale", [0.5, 5.0, 50.0, math.inf])
def test_the_least_noise_scale_is_below_the_true_one(noise_scale):
    """Two standard errors leave 2.3 % of plans above it: at most 6 of 60, with 99.8 %."""
    size, dim, num_probes = 8, 200, 64
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(size, dim, generator=generator).double()
    spread -= spread.mean(0)  # the gradients of the batch are the mean and these
    trace = spread.square().sum() / (size - 1)
    mean = torch.randn(dim, generator=generator).double()
    # The population's mean gradient has what of the batch's is no noise: |g|^2 = trace / nu + trace / B.
    norm_sq = trace / noise_scale + trace / size
    gradients = spread + mean * norm_sq.sqrt() / mean.norm()
    above = 0
    for _ in range(60):
        directions = torch.randint(0, 2, (num_probes, dim), generator=generator).double() * 2 - 1
        slopes = Slopes(directions @ gradients.T, directions[:, :1], directions[:, :1])
        least = least_noise_scale(slopes)
        assert least > (0.25 * noise_scale if noise_scale <= 5 else 8 / 3)
        above += least > noise_scale
    assert above <= 6


def test_a_gradient_lost_in_noise_lowers_the_rate():
    """Four examples, each under both labels: their gradients nearly cancel, and the noise scale is not known."""
    torch.manual_seed(0)
    net = mlp((5, 16, 2)).double()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).double()
    task = ProbedTask(
        dict(net.named_parameters()), net, torch.cat([x, x, x[:2]]), torch.tensor([0, 1] * 5), 8, num_tokens=10
    )
    task.labels[4:8] = 1 - task.labels[:4]
    plan = make_plan(task, num_probes=64, counts=(1,), num_steps=1)
    assert not plan.noise_scale.known
    assert plan.run_rate[1].value < plan.learning_rate[1].value / (1 + 1 / 3)
