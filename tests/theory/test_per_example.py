"""One direction per example: second moments, kernels, lengths and step budgets against Monte Carlo in float64."""

import math

import pytest
import torch

from zokernel.errors import UsageError
from zokernel.theory import (
    best_step,
    curvature_factor,
    curvature_ratio,
    expected_squared_error,
    gradient_outer_product,
    gradient_square,
    kernel_product,
    learning_rate_ratio,
    low_rank_excess,
    low_rank_outer_product,
    per_example_gain,
    sampling_share,
    step_choices,
)
from zokernel.theory.kernel_error import KernelMoments

RUNS = 60_000
ROWS, COLUMNS = 2, 3
DIM = ROWS * COLUMNS


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(*shape, seed):
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def draw(scheme, distribution, size, count, runs=RUNS, seed=1):
    """Directions of every example, (runs, size, count, DIM)."""

    def vectors(number):
        if distribution == "rademacher":
            return signs(runs, number, count, DIM, seed=seed)
        if distribution == "uniform":
            random = torch.rand(runs, number, count, DIM, generator=torch.Generator().manual_seed(seed)).double()
            return (2 * random - 1) * math.sqrt(3)
        flat = normal(runs, number, count, DIM, seed=seed)
        return flat if distribution == "gaussian" else flat / flat.norm(dim=-1, keepdim=True) * math.sqrt(DIM)

    if scheme == "per_example":
        return vectors(size)
    if scheme == "shared":
        return vectors(1).expand(-1, size, -1, -1)
    left = signs(runs, size, count, ROWS, 1, seed=seed + 100)
    right = signs(runs, size, count, 1, COLUMNS, seed=seed + 200)
    return vectors(1) * (left * right).flatten(3)


def steps(directions, gradients):
    """The estimated gradient of every run, (runs, DIM); ``gradients`` (size, DIM) or (runs, size, DIM)."""
    slopes = (directions * gradients.unsqueeze(-2)).sum(-1, keepdim=True)
    return (slopes * directions).mean(2).mean(1)


def worst_z(samples, expected):
    """Largest deviation of the mean over runs from its expectation, in standard errors."""
    error = samples.std(0) / math.sqrt(len(samples))
    return float(((samples.mean(0) - expected).abs() / (error + 1e-12)).max())


CASES = [
    ("per_example", "gaussian"),
    ("per_example", "rademacher"),
    ("per_example", "uniform"),
    ("per_example", "sphere"),
    ("shared", "gaussian"),
    ("shared", "rademacher"),
    ("flipout", "gaussian"),
    ("flipout", "rademacher"),
    ("flipout", "uniform"),
]


@pytest.mark.parametrize(("scheme", "distribution"), CASES)
def test_the_second_moment_of_a_step_and_of_its_kernel(scheme, distribution):
    x, slopes = normal(4, DIM, seed=3), normal(4, seed=4)
    gradients = x * slopes[:, None]
    updates = steps(draw(scheme, distribution, 4, 2), gradients)
    assert worst_z(updates, gradients.mean(0)) < 4.5  # the expectation, hence the expected kernel, is unchanged
    expected = gradient_outer_product(gradients, 2, scheme, distribution)
    assert worst_z(updates[:, :, None] * updates[:, None, :], expected) < 4.5
    outputs = updates @ x.T
    kernel = kernel_product(x @ x.T, torch.outer(slopes, slopes) / 16, 2, scheme, distribution, features=x)
    assert worst_z(outputs[:, :, None] * outputs[:, None, :], kernel) < 4.5
    torch.testing.assert_close(kernel, x @ expected @ x.T)


def test_the_test_would_notice_the_wrong_scheme():
    gradients = normal(4, DIM, seed=3)
    updates = steps(draw("per_example", "gaussian", 4, 2), gradients)
    for scheme, distribution in (("shared", "gaussian"), ("per_example", "rademacher"), ("flipout", "gaussian")):
        wrong = gradient_outer_product(gradients, 2, scheme, distribution)
        assert worst_z(updates[:, :, None] * updates[:, None, :], wrong) > 6


def test_entries_of_the_kernel_of_one_step():
    """Same column: the moments of a shared direction. Different columns: uncorrelated."""
    x = normal(3, DIM, seed=5)
    kernel = x @ x.T
    z = draw("per_example", "gaussian", 3, 1)[:, :, 0]
    sampled = torch.einsum("id,rjd,rje,je->rij", x, z, z, x)
    assert worst_z(sampled, kernel) < 4.5
    same = 2 * torch.outer(kernel[:, 0], kernel[:, 0]) + kernel[0, 0] * kernel
    assert worst_z(sampled[:, :, None, 0] * sampled[:, None, :, 0], same) < 4.5
    other = torch.outer(kernel[:, 0], kernel[:, 1])
    assert worst_z(sampled[:, :, None, 0] * sampled[:, None, :, 1], other) < 4.5
    for j in range(3):  # the error of each column alone is that of any single direction
        column = kernel_product(kernel, torch.diag(torch.eye(3, dtype=torch.float64)[j])).trace()
        moments = KernelMoments.from_jacobians(x, x[j : j + 1])
        assert float(column - moments.kernel_sq) == pytest.approx(expected_squared_error(moments, 1), rel=1e-12)


def test_several_outputs_of_one_example_share_its_directions():
    x, slopes = normal(3, 2, DIM, seed=6), normal(3, 2, seed=7)
    flat = x.reshape(6, DIM)
    changes = steps(draw("per_example", "gaussian", 3, 1), (x * slopes[:, :, None]).sum(1)) @ flat.T
    weights = torch.outer(slopes.flatten(), slopes.flatten()) / 9
    expected = kernel_product(flat @ flat.T, weights, outputs=2)
    assert worst_z(changes[:, :, None] * changes[:, None, :], expected) < 4.5
    assert worst_z(changes[:, :, None] * changes[:, None, :], kernel_product(flat @ flat.T, weights)) > 6


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(
    ("scheme", "distribution"),
    [
        ("shared", "gaussian"),
        ("shared", "rademacher"),
        ("per_example", "gaussian"),
        ("per_example", "rademacher"),
        ("per_example", "sphere"),
        ("flipout", "gaussian"),
        ("flipout", "rademacher"),
    ],
)
def test_the_length_and_the_curvature_of_a_step_on_sampled_batches(scheme, distribution, replacement):
    """Batches of 3 of 5 examples; the length is exact for every scheme, the curvature for Gaussian directions."""
    population, size, count = 5, 3, 2
    gradients = normal(population, DIM, seed=8) + 0.7
    generator = torch.Generator().manual_seed(9)
    if replacement:
        rows = torch.randint(0, population, (RUNS, size), generator=generator)
    else:
        rows = torch.rand(RUNS, population, generator=generator).argsort(1)[:, :size]
    updates = steps(draw(scheme, distribution, size, count), gradients[rows])
    mean = gradients.mean(0)
    centred = gradients - mean
    covariance, square = centred.T @ centred / population, float(mean @ mean)
    noise = float(covariance.trace()) / square
    limit = None if replacement else population
    expected = gradient_square(noise, size, count, DIM, scheme, distribution=distribution, population=limit)
    assert worst_z(updates.square().sum(1, keepdim=True) / square, expected) < 4
    if distribution != "gaussian" or scheme == "flipout":
        return
    factor = normal(DIM, DIM, seed=10)
    hessian = factor @ factor.T
    along, trace = float(mean @ hessian @ mean), float(hessian.trace())
    rank = curvature_ratio(trace, square, along)
    noise_rank = trace * float(covariance.trace()) / float((hessian * covariance).sum())
    factor = curvature_factor(noise, rank, size, count, scheme, noise_rank=noise_rank, population=limit)
    curvature = torch.einsum("rd,de,re->r", updates, hessian, updates)[:, None] / along
    assert worst_z(curvature, factor) < 4
    assert worst_z(curvature, curvature_factor(noise, rank, size, count, scheme, population=limit)) > 6


def test_the_best_rate_and_decrease_on_a_quadratic():
    """A step at the best rate decreases the loss by the promised share of a gradient step's best decrease."""
    gradients = normal(4, DIM, seed=11) + 1
    mean, hessian = gradients.mean(0), torch.diag(torch.arange(1.0, DIM + 1, dtype=torch.float64))
    covariance = (gradients - mean).T @ (gradients - mean) / 4
    square, along, trace = float(mean @ mean), float(mean @ hessian @ mean), float(hessian.trace())
    rank, noise = curvature_ratio(trace, square, along), float(covariance.trace()) / square
    noise_rank = trace * float(covariance.trace()) / float((hessian * covariance).sum())
    factor = curvature_factor(noise, rank, 4, 3, noise_rank=noise_rank, population=4)
    best = square / along
    estimates = steps(draw("per_example", "gaussian", 4, 3), gradients)

    def decrease(rate):
        update = rate * estimates
        return (update @ mean - torch.einsum("rd,de,re->r", update, hessian, update) / 2)[:, None]

    promised = best * square / 2 / factor
    assert worst_z(decrease(best / factor), promised) < 4
    assert worst_z(decrease(best / factor) - decrease(1.5 * best / factor), promised / 4) < 4


@pytest.mark.parametrize("rank", [1, 2])
def test_directions_of_low_rank(rank):
    gradient = normal(ROWS, COLUMNS, seed=12)
    runs = 400_000  # products of four factors have heavy tails
    left, right = normal(runs, ROWS, rank, seed=13), normal(runs, COLUMNS, rank, seed=14)
    z = (left @ right.transpose(1, 2) / math.sqrt(rank)).flatten(1)
    estimates = z * (z @ gradient.flatten())[:, None]
    expected = low_rank_outer_product(gradient, rank)
    assert worst_z(estimates, gradient.flatten()) < 4.5
    assert worst_z(estimates[:, :, None] * estimates[:, None, :], expected) < 4.5
    square = float(gradient.square().sum())
    excess = low_rank_excess([(ROWS, COLUMNS)], rank)
    assert float(expected.trace()) == pytest.approx(square * (DIM + 2 + excess), rel=1e-12)
    assert gradient_square(0.0, 1, 1, DIM, rank_excess=excess) == pytest.approx(float(expected.trace()) / square)
    assert excess == 2 / rank * (ROWS + COLUMNS + 1)


def test_low_rank_of_two_matrices_weighs_their_shares():
    first, second = normal(2, 3, seed=15), 2 * normal(4, 1, seed=16)
    shares = torch.stack([first.square().sum(), second.square().sum()])
    expected = 10 + 2 + low_rank_excess([(2, 3), (4, 1)], 1, (shares / shares.sum()).tolist())
    runs = 400_000
    parts = [
        normal(runs, rows, 1, seed=20 + rows) * normal(runs, 1, columns, seed=30 + rows)
        for rows, columns in ((2, 3), (4, 1))
    ]
    slope = sum((part * grad).sum((1, 2)) for part, grad in zip(parts, (first, second), strict=True))
    length = sum(part.square().sum((1, 2)) for part in parts)
    assert worst_z((slope.square() * length)[:, None] / shares.sum(), expected) < 4


def test_shared_directions_agree_with_the_older_formulas():
    assert gradient_square(0.0, 1, 7, 100, "shared") == pytest.approx((7 + 1 + 100) / 7)
    for count, rank in ((1, 5.0), (8, 200.0)):
        factor = curvature_factor(0.0, rank, 1, count, "shared")
        assert 1 / factor == pytest.approx(learning_rate_ratio(count, rank))
        assert curvature_factor(3.0, rank, 1, count, "shared") == curvature_factor(3.0, rank, 1, count)


def test_gains_are_the_published_ratio_to_leading_order():
    for noise, size, gain in ((5.5, 4, 1.46), (5.5, 16, 3.31), (5.5, 64, 10.69), (14, 16, 2.0), (96, 16, 1.15)):
        assert per_example_gain(noise, size) == pytest.approx((size + noise) / (1 + noise))
        assert per_example_gain(noise, size) == pytest.approx(gain, abs=5e-3)
        dim = 10**9
        exact = gradient_square(noise, size, 1, dim, "shared") / gradient_square(noise, size, 1, dim)
        assert exact == pytest.approx(gain, abs=5e-3)
    assert per_example_gain(1e9, 16) == pytest.approx(1.0)
    assert per_example_gain(50.0, 10, population=10) < 1 < per_example_gain(8.0, 10, population=10)
    assert per_example_gain(9.0, 4, population=10) == pytest.approx(1.0)  # nu = N - 1 is where it turns


def test_the_best_step_is_the_best_of_the_grid():
    for per in ("token", "forward"):
        for noise, rank in ((0.0, 3.0), (5.5, 50.0), (96.0, 1000.0)):
            best = best_step(noise, rank, per=per, per_example_cost=1.1)
            reference = 1 / curvature_factor(noise, rank, 16, 1, "shared") / (2 if per == "forward" else 32)
            values = []
            for scheme in ("shared", "per_example"):
                for size in (1, 2, 4, 8, 16, 32, 64):
                    for count in (1, 2, 4, 8, 16, 32):
                        rows = size if per == "token" else 1
                        cost = min(2 * count, 1 + count) * rows * (1.1 if scheme == "per_example" else 1)
                        values.append(1 / curvature_factor(noise, rank, size, count, scheme) / cost / reference)
            assert best.gain == pytest.approx(max(values), rel=1e-9)
            assert best.batch_size == (1 if per == "token" else 64)  # corners: docs/theory.md says so
            assert best.rate_ratio == 1 / curvature_factor(
                noise, rank, best.batch_size, best.num_perturbations, best.scheme
            )
    inside = best_step(5.5, 100.0, forward_rows=4.0)
    ideal = math.sqrt(4.0 * (5.5 + 6.5 * (1 + 100.0) / inside.num_perturbations))  # 26: the grid has 16 and 32
    assert (inside.scheme, inside.batch_size) == ("per_example", 2 ** round(math.log2(ideal)))
    assert inside.batch_size == 32


def test_choices_know_their_reference_and_their_cost():
    mezo = step_choices(5.5, 100.0, schemes=["shared"], batches=[16], draws=[1])[0]
    assert (mezo.gain, mezo.one_sided, mezo.forwards, mezo.cost) == (1.0, False, 2, 32.0)
    four = step_choices(14.0, 100.0, schemes=["per_example"], batches=[16], draws=[4], per_example_cost=2.0)
    assert [(one.one_sided, one.forwards, one.cost) for one in four] == [(True, 5, 160.0), (False, 8, 256.0)]
    assert max(one.batch_size for one in step_choices(5.0, 9.0, population=10)) == 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampling_share(0), "batch size"),
        (lambda: sampling_share(5, 4), "without replacement"),
        (lambda: per_example_gain(-1.0, 4), "at least 0"),
        (lambda: gradient_square(1.0, 4, 1, 10, "both"), "no scheme"),
        (lambda: gradient_square(1.0, 4, 1, 10, "flipout", distribution="sphere"), "independent coordinates"),
        (lambda: gradient_square(1.0, 4, 1, 10, distribution="rademacher", rank_excess=1.0), "low rank"),
        (lambda: low_rank_excess([], 1), "low rank"),
        (lambda: kernel_product(torch.eye(2), torch.eye(3)), "shape"),
        (lambda: kernel_product(torch.eye(3), torch.eye(3), outputs=2), "divided into examples"),
        (lambda: kernel_product(torch.eye(2), torch.eye(2), distribution="rademacher"), "features="),
        (lambda: kernel_product(torch.eye(2), torch.eye(2), scheme="flipout"), "features="),
        (lambda: kernel_product(torch.eye(2), torch.eye(2), distribution="sphere"), "features="),
        (lambda: curvature_factor(1.0, 0.0, 4), "effective rank r "),
        (lambda: curvature_factor(1.0, 5.0, 4, scheme="flipout"), "no scheme"),
        (lambda: curvature_factor(float("nan"), 5.0, 4), "at least 0"),
        (lambda: best_step(1.0, 5.0, per="second"), "per 'token'"),
        (lambda: best_step(1.0, 5.0, batches=[16], population=8), "to choose from"),
        (lambda: best_step(1.0, 5.0, per_example_cost=0.0), "cost"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(UsageError, match=message):
        call()
