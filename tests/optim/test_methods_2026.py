"""1.5-SPSA, RLOO, R-AdaZO and ConMeZO against their definitions written out with materialised directions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from zokernel.directions import Dense
from zokernel.directions.families.cone import Cone
from zokernel.errors import UsageError
from zokernel.estimators import TwoPointCurvature
from zokernel.optim import RLOO, SPSA15, ConMeZO, MeZO, RAdaZO, ZerothOrder, ZOAdam
from zokernel.optim.updates import CurvatureWeights
from zokernel.optim.updates.curvature_weights import curvature_weight

SHAPE = (6, 5)
START = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(SHAPE)
TARGET = torch.sin(torch.arange(30, dtype=torch.float64)).reshape(SHAPE)


def loss_at(w):
    return float(torch.cosh(w - TARGET).sum() + 0.1 * w.sum() ** 2)


def train(optimizer_class, steps, **options):
    w = nn.Parameter(START.clone())
    optimizer = optimizer_class([("w", w)], **options)
    for _ in range(steps):
        optimizer.step(lambda: loss_at(w.detach()))
    return optimizer, w.detach()


def slope(w, z, eps):
    return (loss_at(w + eps * z) - loss_at(w - eps * z)) / (2 * eps)


def draws(step, count, law="rademacher"):
    return [Dense(law)({"w": START}, seed=0, step=step, index=p)["w"] for p in range(count)]


# ---------------------------------------------------------------- 1.5-SPSA


@pytest.mark.parametrize(
    ("curvature", "power", "weight"),
    [(0.0, 0.1, 1.0), (0.99, 0.1, 1.0), (1.0, 0.1, 1.0), (1024.0, 0.1, 0.5), (-1024.0, 0.1, 0.5), (1e10, 0.1, 0.1)],
)
def test_weights_of_directions_fall_with_the_curvature(curvature, power, weight):
    assert curvature_weight(curvature, power) == pytest.approx(weight, rel=1e-12)
    assert curvature_weight(curvature, 0.0) == 1.0
    assert curvature_weight(4.0, 1.0) == 0.25


def test_spsa_1_5_is_its_definition():
    eps, lr, count = 1e-3, 0.01, 4
    w = START.clone()
    for step in range(5):
        zs, means = draws(step, count), []
        move = torch.zeros(SHAPE, dtype=torch.float64)
        for z in zs:
            above, below = loss_at(w + eps * z), loss_at(w - eps * z)
            means.append(1 / max(1.0, abs((above - 2 * loss_at(w) + below) / eps**2) ** 0.1))
            move += means[-1] * (above - below) * z / (2 * count)
        w = w - lr / eps * move
    optimizer, weights = train(SPSA15, 5, lr=lr, eps=eps, num_perturbations=count)
    assert torch.allclose(weights, w, atol=1e-8)
    assert optimizer.effective_lr() == pytest.approx(lr * sum(means) / count, rel=1e-4)
    assert max(means) < 0.75, "the curvature along these directions is about 50"
    assert optimizer.forwards_per_step == 2 * count + 1
    assert math.isnan(SPSA15([nn.Parameter(START.clone())]).effective_lr())


def test_published_spsa_1_5_takes_160_directions_with_eps_equal_to_the_rate():
    optimizer = SPSA15([nn.Parameter(START.clone())])
    assert optimizer.forwards_per_step == 321
    assert optimizer.param_groups[0]["lr"] == optimizer.estimator.eps == 5e-4


def test_without_power_the_weights_are_one():
    _, mezo = train(MeZO, 4, lr=0.01, num_perturbations=3)
    _, weights = train(SPSA15, 4, lr=0.01, eps=1e-3, num_perturbations=3, power=0.0)
    assert torch.allclose(weights, mezo, atol=1e-12)


def test_weights_need_a_curvature_and_a_power_in_range():
    w = nn.Parameter(START.clone())
    optimizer = ZerothOrder([("w", w)], lr=0.01, update=CurvatureWeights(), perturb="in_place:copy")
    with pytest.raises(UsageError, match="two_point_curvature"):
        optimizer.step(lambda: loss_at(w.detach()))
    assert torch.equal(w.detach(), START)
    with pytest.raises(UsageError, match="power"):
        SPSA15([nn.Parameter(START.clone())], power=-0.1)
    by_text = ZerothOrder([w], lr=0.01, estimator="two_point_curvature(1e-3, 2)", update="curvature_weights(0.2)")
    assert isinstance(by_text.estimator, TwoPointCurvature)
    assert by_text.updates[0] == CurvatureWeights(0.2)


# ---------------------------------------------------------------- RLOO


def test_rloo_is_its_definition():
    eps, lr, count = 1e-3, 0.01, 4
    w = START.clone()
    for step in range(5):
        zs = draws(step, count)
        losses = [loss_at(w + eps * z) for z in zs]
        move = torch.zeros(SHAPE, dtype=torch.float64)
        for p, z in enumerate(zs):
            other_losses = [loss for q, loss in enumerate(losses) if q != p]
            move += (losses[p] - sum(other_losses) / (count - 1)) * z
        w = w - lr / (count * eps) * move
    optimizer, weights = train(RLOO, 5, lr=lr, eps=eps, num_perturbations=count)
    assert torch.allclose(weights, w, atol=1e-8)
    assert optimizer.forwards_per_step == count
    assert optimizer.effective_lr() == lr


# ---------------------------------------------------------------- R-AdaZO


def test_r_adazo_is_its_definition():
    eps, lr, b1, b2, delta = 1e-3, 0.01, 0.8, 0.95, 1e-8
    w, m, v = START.clone(), torch.zeros(SHAPE), torch.zeros(SHAPE)
    for step in range(1, 9):
        (z,) = draws(step - 1, 1, "gaussian")
        m = b1 * m + (1 - b1) * slope(w, z, eps) * z
        corrected = m / (1 - b1**step)
        v = b2 * v + (1 - b2) * corrected**2
        w = w - lr * corrected / ((v / (1 - b2**step)).sqrt() + delta)
    options = {"beta1": b1, "beta2": b2, "delta": delta, "distribution": "gaussian"}
    optimizer, weights = train(RAdaZO, 8, lr=lr, eps=eps, **options)
    assert torch.allclose(weights, w, atol=1e-5)
    assert optimizer.effective_lr() == lr


def test_the_first_step_of_r_adazo_is_adams_and_without_momentum_all_are():
    for steps, beta1 in ((1, 0.9), (6, 0.0)):
        _, adam = train(ZOAdam, steps, lr=0.01, beta1=beta1)
        _, weights = train(RAdaZO, steps, lr=0.01, beta1=beta1)
        assert torch.allclose(weights, adam, atol=1e-7)


def test_on_pure_noise_r_adazo_moves_farther_than_adam_by_the_noise_that_its_momentum_averages():
    """Root mean squares over 20,000 coordinates and the last 20 of 400 steps; the ratio is 4.36 at beta1 = 0.9."""
    w = {name: nn.Parameter(torch.zeros(20_000)) for name in ("adam", "refined")}
    classes = {"adam": ZOAdam, "refined": RAdaZO}
    optimizers = {n: classes[n]([("w", w[n])], lr=1.0, beta2=0.99, distribution="gaussian") for n in w}
    squares = dict.fromkeys(w, 0.0)
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0))
    for step in range(400):
        for name, optimizer in optimizers.items():
            before, sign = w[name].detach().clone(), itertools.cycle((1, -1))
            optimizer.step(lambda sign=sign, step=step: 1e-3 * float(noise[step].sign()) * next(sign))
            if step >= 380:
                squares[name] += float((w[name].detach() - before).square().mean())
    ratio = math.sqrt(squares["refined"] / squares["adam"])
    # 1 - beta2 = 1e-2 against a momentum of 19 steps: v wanders by a few percent.
    assert ratio == pytest.approx(math.sqrt(1.9 / 0.1), rel=0.1)


# ---------------------------------------------------------------- ConMeZO


@pytest.mark.parametrize("perturb", ["in_place", "in_place:grid", "in_place:copy"])
def test_conmezo_is_its_definition(perturb):
    eps, lr, angle, beta, count = 1e-3, 0.004, 1.2, 0.8, 2
    w, m = START.clone(), torch.zeros(SHAPE, dtype=torch.float64)
    for step in range(8):
        axis = m / m.norm() * math.sqrt(30) if step else m
        zs = [math.cos(angle) * axis + math.sin(angle) * u for u in draws(step, count)]
        estimate = sum(slope(w, z, eps) * z for z in zs) / count
        w, m = w - lr * estimate, beta * m + (1 - beta) * estimate
    weight = nn.Parameter(START.clone().float() if perturb == "in_place:grid" else START.clone())
    options = {"eps": eps, "angle": angle, "beta": beta, "num_perturbations": count, "perturb": perturb}
    optimizer = ConMeZO([("w", weight)], lr=lr, **options)
    for _ in range(8):
        optimizer.step(lambda: loss_at(weight.detach().double()))
    # fp32 weights round a perturbation of 1e-3 by 1e-7, which changes slopes of about 10 by 1e-3.
    tolerance = 1e-3 if perturb == "in_place:grid" else 1e-5
    assert torch.allclose(weight.detach().double(), w, atol=tolerance)
    cone = optimizer.directions
    assert torch.allclose(cone.axis["w"].double() * cone.length, m, atol=tolerance * 20)
    assert float(cone.axis["w"].norm()) == pytest.approx(math.sqrt(30), rel=1e-5)
    assert optimizer.effective_lr() == pytest.approx(lr)
    assert optimizer.moves_along_directions


def test_a_cone_of_a_right_angle_is_mezo():
    _, mezo = train(MeZO, 6, lr=0.005)
    _, weights = train(ConMeZO, 6, lr=0.005, angle=math.pi / 2)
    assert torch.allclose(weights, mezo, atol=1e-12)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
def test_directions_in_a_cone_have_their_second_moment(distribution):
    """E z z^T = sin^2 I + cos^2 a a^T over 4,000 draws of two tensors: 78 moments, |z| < 4.5; and the mean estimate."""
    params, angle, n = {"a": torch.zeros(4, 2), "b": torch.zeros(4)}, 1.0, 4000
    cone = Cone(Dense(distribution), angle)
    cone.prepare(params)
    assert cone.gain() == pytest.approx(math.sin(angle) ** 2)
    cone.turn({0: 1.5, 1: -0.5}, 0.0, seed=3, step=0, names=list(params))
    assert cone.gain() == pytest.approx(1.0)
    axis = torch.cat([cone.axis[name].reshape(-1) for name in params]).double()
    assert float(axis.norm()) == pytest.approx(math.sqrt(12), rel=1e-6)
    z = torch.stack([torch.cat([t.reshape(-1) for t in draw.values()]) for draw in _draws(cone, params, n)]).double()
    products = z[:, :, None] * z[:, None, :]
    exact = math.sin(angle) ** 2 * torch.eye(12) + math.cos(angle) ** 2 * axis.outer(axis)
    error, spread = products.mean(0) - exact, products.std(0) / math.sqrt(n)
    # The squares of Rademacher directions vary only through the axis, and are checked where they vary.
    assert (error.abs() <= 4.5 * spread + 1e-6).all()
    gradient = torch.linspace(-1, 2, 12, dtype=torch.float64)
    estimates = (z @ gradient)[:, None] * z
    mean = math.sin(angle) ** 2 * gradient + math.cos(angle) ** 2 * (axis @ gradient) * axis
    scores = (estimates.mean(0) - mean) / (estimates.std(0) / math.sqrt(n))
    assert scores.abs().max() < 4.5


def _draws(cone, params, count):
    return (cone(params, seed=5, step=step, index=0) for step in range(count))


def test_at_one_rate_conmezo_moves_farther_along_the_gradient_than_mezo():
    """On a linear loss the mean of slope^2 / |g|^2 is the gain: one for MeZO, more in a cone; 8 seeds, 100 steps."""

    def gains(method, **options):
        means = []
        for seed in range(8):
            w = nn.Parameter(torch.zeros(500))
            optimizer = method([("w", w)], lr=0.0, seed=seed, perturb="in_place:copy", **options)
            slopes = []
            for _ in range(150):
                optimizer.step(lambda w=w: float(w.detach().sum(dtype=torch.float64)))
                slopes.append(optimizer.last_estimate.coefficients[0])
            means.append(sum(c**2 for c in slopes[50:]) / 100 / 500)
        gain = torch.tensor(means, dtype=torch.float64)
        return float(gain.mean()), float(gain.std()) / math.sqrt(8)

    mean, error = gains(MeZO)
    assert abs(mean - 1) < 4.5 * error
    mean, error = gains(ConMeZO, beta=0.9)
    assert mean - 1 > 4.5 * error
    assert mean == pytest.approx(1.87, abs=4.5 * error)  # simulated: 1.8 to 1.9 in 1,000 to 4,000 dimensions


def test_sweeps_of_a_cone_add_the_directions_that_it_returns():
    params = {"a": torch.zeros(7, 3), "b": torch.zeros(5)}
    cone = Cone(Dense("gaussian"), 0.9)
    cone.prepare(params)
    for turned in (False, True):
        if turned:
            cone.turn({0: 1.0}, 0.5, seed=0, step=0, names=list(params))
        weights = {name: torch.ones_like(tensor) for name, tensor in params.items()}
        scales = {"a": [0.5, -2.0], "b": [0.25, 1.0]}
        cone.add_(weights, scales, seed=1, step=4, index=[0, 3], decay=0.75)
        first, second = (cone(params, seed=1, step=4, index=i) for i in (0, 3))
        for name, (left, right) in scales.items():
            exact = 0.75 + left * first[name] + right * second[name]
            assert torch.allclose(weights[name], exact, atol=1e-5)


def test_a_momentum_that_has_vanished_leaves_plain_directions():
    w = nn.Parameter(torch.ones(4))
    optimizer = ConMeZO([("w", w)], lr=0.1, beta=0.0)
    optimizer.step(lambda: 3.0)
    assert optimizer.directions.length == 0.0
    optimizer.step(lambda: float(w.detach().sum()))
    assert optimizer.directions.length > 0
    assert torch.isfinite(w).all()


def test_resting_parameters_keep_their_axis():
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))
    optimizer = ConMeZO([("a", a), ("b", b)], lr=0.01, beta=0.5)
    loss = lambda: float((a.detach() ** 2).sum() + (b.detach() ** 2).sum())  # noqa: E731
    optimizer.step(loss)
    b.requires_grad_(False)
    axis = optimizer.directions.axis["b"].clone()
    optimizer.step(loss)
    assert torch.equal(optimizer.directions.axis["b"], axis)
    assert float(optimizer.directions.axis["a"].norm()) == pytest.approx(2.0, rel=1e-5)
    assert torch.isfinite(b).all()


@pytest.mark.parametrize(
    ("options", "match"), [({"angle": 0.0}, "angle"), ({"angle": 1.6}, "angle"), ({"beta": 1.0}, "beta")]
)
def test_invalid_settings_of_a_cone_are_refused(options, match):
    with pytest.raises(UsageError, match=match):
        ConMeZO([nn.Parameter(torch.ones(3))], **options)
