"""Each method against its definition written out with materialised directions, and the scales it relies on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zokernel.directions import Dense, LowRank, Subspace
from zokernel.directions.families.masks import kth_magnitude, mask_of_small, unpack_bits
from zokernel.errors import RunError, UsageError
from zokernel.optim import (
    FZOO,
    LOZO,
    SGD,
    ForwardDifference,
    ForwardGradient,
    HiZOO,
    MeZO,
    SparseMeZO,
    SubZero,
    ZOAdam,
    ZOAdaMM,
    ZOSign,
    decay_groups,
    get_method,
)

SHAPE = (6, 5)
START = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(SHAPE)
TARGET = torch.sin(torch.arange(30, dtype=torch.float64)).reshape(SHAPE)


def loss_at(w):
    return float(torch.cosh(w - TARGET).sum() + 0.1 * w.sum() ** 2)


def weight():
    return nn.Parameter(START.clone())


def train(optimizer_class, steps, **options):
    w = weight()
    optimizer = optimizer_class([("w", w)], **options)
    for _ in range(steps):
        optimizer.step(lambda: loss_at(w.detach()))
    return optimizer, w.detach()


def two_point(w, z, eps):
    return (loss_at(w + eps * z) - loss_at(w - eps * z)) / (2 * eps)


def test_hizoo_is_its_definition():
    eps, lr, alpha = 1e-3, 0.002, 0.01
    w, h, law = START.clone(), torch.ones(SHAPE), Dense("gaussian")
    for step in range(6):
        z = law({"w": h}, seed=0, step=step, index=0)["w"]
        scaled = (z * h.rsqrt()).double()
        ends = loss_at(w), loss_at(w + eps * scaled), loss_at(w - eps * scaled)
        w = w - lr * (ends[1] - ends[2]) / (2 * eps) * scaled
        h = h * (1 - alpha + alpha * abs(ends[1] + ends[2] - 2 * ends[0]) / (2 * eps**2) * z**2)
    optimizer, weights = train(HiZOO, 6, lr=lr, eps=eps, hessian_smooth=alpha)
    assert torch.allclose(weights, w, atol=1e-7)
    assert torch.allclose(optimizer.curvature["w"], h, rtol=1e-4)
    assert optimizer.effective_lr() == pytest.approx(lr * float((1 / h).mean()), rel=1e-4)
    assert optimizer.curvature["w"].dtype == torch.float32


def test_hizoo_refuses_directions_that_cannot_tell_coordinates_apart():
    with pytest.raises(UsageError, match="gaussian"):
        HiZOO([weight()], lr=0.1, distribution="rademacher")


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"normalize": True, "polyak_share": 0.001}], ids=str)
def test_forward_differences_are_their_definition(options):
    eps, lr, beta, count = 1e-3, 0.01, 0.7, 3
    w, law, squares, centres, bounded = START.clone(), Dense("rademacher"), [], [], []
    for step in range(5):
        z = [law({"w": w}, seed=0, step=step, index=p)["w"] for p in range(count)]
        centres.append(float(loss_at(w)))
        slopes = [(loss_at(w + eps * z_p) - centres[-1]) / eps for z_p in z]
        squares.append(sum(slope**2 for slope in slopes) / count)
        weights = [beta ** (step - k) for k in range(step + 1)]
        square, loss = (sum(a * b for a, b in zip(weights, v, strict=True)) / sum(weights) for v in (squares, centres))
        free, bound = lr / math.sqrt(square), options.get("polyak_share", math.inf) * loss / square
        bounded.append(bound < free)
        scale = min(free, bound) if options else lr
        w = w - scale / count * sum(slope * z_p for slope, z_p in zip(slopes, z, strict=True))
    optimizer, actual = train(
        ForwardDifference, 5, lr=lr, **{"eps": eps, "num_perturbations": count, "beta": beta} | options
    )
    assert torch.allclose(actual, w, atol=1e-8)
    assert optimizer.effective_lr() == pytest.approx(scale, rel=1e-6)
    assert set(bounded) == ({False, True} if "polyak_share" in options else {False}), "both sides of the bound"


@pytest.mark.parametrize("share", [math.inf, 0.01])
def test_a_normalised_step_does_not_depend_on_the_scale_of_the_loss(share):
    def final_weights(scale):
        w = weight()
        options = {"num_perturbations": 2, "normalize": True, "polyak_share": share}
        optimizer = ForwardDifference([("w", w)], lr=0.01, **options)
        for _ in range(5):
            optimizer.step(lambda: scale * loss_at(w.detach()))
        return w.detach()

    weights = [final_weights(1.0), final_weights(1000.0)]
    # To Polyak's step the scale matters through the losses' rounding only.
    assert torch.allclose(weights[0], weights[1], atol=1e-8)
    assert not torch.equal(weights[0], START)


def test_a_whole_polyak_step_halves_the_way_to_the_minimum_of_a_parabola():
    w = torch.nn.Parameter(torch.full((1,), 3.0, dtype=torch.float64))
    options = {"num_perturbations": 1, "eps": 1e-6, "normalize": True, "beta": 0.0, "polyak_share": 1.0}
    optimizer = ForwardDifference([w], lr=1e3, **options)
    for expected in (3.0, 1.5, 0.75):
        assert w.item() == pytest.approx(expected, rel=1e-4)
        optimizer.step(lambda: w.square().sum())


def test_steps_are_normalised_by_what_they_can_be():
    with pytest.raises(UsageError, match="beta"):
        ForwardDifference([weight()], beta=1.0)
    with pytest.raises(UsageError, match="polyak_share"):
        ForwardDifference([weight()], polyak_share=0.0)
    with pytest.raises(UsageError, match=r"^polyak_share bounds a normalised step: set normalize to true, or leave"):
        ForwardDifference([weight()], polyak_share=0.35)
    assert len(ForwardDifference([weight()], polyak_share=math.inf).updates) == 1, "an infinite bound is none"
    w = weight()
    optimizer = ForwardDifference([("w", w)], lr=0.01, normalize=True, polyak_share=0.1, perturb="in_place:copy")
    with pytest.raises(UsageError, match="least value is zero"):
        optimizer.step(lambda: loss_at(w.detach()) - 1e6)
    assert torch.equal(w.detach(), START.to(w.dtype))


def test_lozo_momentum_lives_in_the_factors_and_crosses_a_refresh():
    eps, lr, beta, rank, refresh = 1e-3, 0.002, 0.7, 2, 3
    law, w, average, right = LowRank(rank=rank, refresh=refresh), START.clone(), None, None
    for step in range(8):
        u = law.left("w", SHAPE, seed=0, step=step, index=0).double()
        v = law.right("w", SHAPE, seed=0, step=step).double().T
        c = two_point(w, u @ v.T / math.sqrt(rank), eps)
        fresh = c * u / math.sqrt(rank)
        if average is None:
            average = fresh
        else:
            projected = average if step % refresh else average @ (right.T @ v) / SHAPE[1]
            average = beta * projected + (1 - beta) * fresh
        right, w = v, w - lr * average @ v.T
    optimizer, weights = train(LOZO, 8, lr=lr, eps=eps, momentum=beta, rank=rank, refresh=refresh)
    assert torch.allclose(weights, w, atol=1e-6)
    state = optimizer.state[optimizer.named_params["w"]]["average"]
    assert state.shape == (SHAPE[0], rank)


def test_a_step_of_subzero_and_lozo_stays_in_the_stated_rank():
    for method, rank in ((SubZero, 2), (LOZO, 1)):
        _, weights = train(method, 1, lr=0.01, rank=rank)
        assert torch.linalg.matrix_rank(weights - START, tol=1e-5) == rank


@pytest.mark.parametrize("family", [Dense("gaussian"), Subspace(rank=4, refresh=1), LowRank(rank=4, refresh=1)])
def test_scales_and_means_of_low_rank_directions(family):
    """E|z|^2 = m n and E (g.z) z = g over n draws: |z| < 4.5 against the sample's own standard errors."""
    params, n = {"w": torch.zeros(12, 10)}, 1500
    g = torch.sin(torch.arange(120.0)).reshape(12, 10)
    draws = torch.stack([family(params, seed=0, step=t, index=0)["w"] for t in range(n)])
    squares = draws.square().sum((1, 2))
    assert abs(squares.mean() - 120) < 4.5 * squares.std() / n**0.5
    estimates = (draws * g).sum((1, 2), keepdim=True) * draws
    scores = (estimates.mean(0) - g) / (estimates.std(0) / n**0.5)
    assert scores.abs().max() < 4.5
    # No unconditional variance reduction: the second moment is at least that of dense directions, (d + 2) |g|^2.
    second = estimates.square().sum((1, 2))
    assert second.mean() > 122 * g.square().sum() - 4.5 * second.std() / n**0.5
    if isinstance(family, LowRank):
        # The published directions lack the 1/sqrt(r): their squared norm is r times as large.
        published = (draws * family.rank**0.5).square().sum((1, 2))
        assert abs(published.mean() / 120 - 4) < 4.5 * 4 * squares.std() / 120 / n**0.5


def test_sparse_mezo_moves_the_small_weights_only():
    optimizer, weights = train(SparseMeZO, 4, lr=0.01, density=0.4)
    changed = weights != START
    assert changed.sum() == 12
    assert START[changed].abs().max() < START[~changed].abs().min()
    saved = optimizer.state_dict()
    other = SparseMeZO([("w", nn.Parameter(weights.flip(0).clone()))], lr=0.01, density=0.4)
    other.load_state_dict(saved)
    assert torch.equal(other.directions.mask("w", SHAPE), optimizer.directions.mask("w", SHAPE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [0, 1, 7, 500, 999, 1000])
def test_threshold_of_small_weights_is_exact(k, dtype):
    values = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-2).to(dtype)
    values[::50] = 0.0
    expected = values.abs().kthvalue(k).values if k else torch.tensor(-1.0, dtype=dtype)
    assert torch.equal(kth_magnitude(values, k), expected)
    mask = unpack_bits(mask_of_small(values, k / 1000))[:1000]
    assert torch.equal(mask, values.abs() <= expected)


def test_fzoo_is_its_definition():
    eps, lr, n = 1e-3, 0.05, 5
    w, law = START.clone(), Dense("rademacher")
    for step in range(4):
        zs = [law({"w": w}, seed=0, step=step, index=i)["w"] for i in range(n)]
        losses = torch.tensor([loss_at(w + eps * z) for z in zs], dtype=torch.float64)
        centre, sigma = loss_at(w), losses.std(correction=0)
        w = w - lr * sum((loss - centre) / (n * sigma) * z for loss, z in zip(losses, zs, strict=True))
    optimizer, weights = train(FZOO, 4, lr=lr, eps=eps, num_perturbations=n)
    assert torch.allclose(weights, w, atol=1e-8)
    assert optimizer.effective_lr() == pytest.approx(lr * eps / float(sigma), rel=1e-3)
    assert math.isnan(FZOO([weight()], lr=0.1).effective_lr())


@pytest.mark.parametrize("method", [ZOAdam, ZOAdaMM])
def test_adam_is_torchs_on_the_same_estimates(method):
    eps, lr, law = 1e-3, 0.01, Dense("gaussian")
    w = weight()
    reference = torch.optim.Adam([w], lr=lr, amsgrad=method is ZOAdaMM)
    for step in range(8):
        z = law({"w": w.detach()}, seed=0, step=step, index=0)["w"]
        w.grad = two_point(w.detach(), z, eps) * z
        reference.step()
    _, weights = train(method, 8, lr=lr, eps=eps, distribution="gaussian")
    # torch keeps these moments in float64, the method in fp32.
    assert torch.allclose(weights, w.detach(), atol=1e-5)


def test_momentum_is_torchs_on_the_same_estimates():
    eps, lr, law = 1e-3, 0.002, Dense("rademacher")
    w = weight()
    reference = torch.optim.SGD([w], lr=lr, momentum=0.8)
    for step in range(8):
        z = law({"w": w.detach()}, seed=0, step=step, index=0)["w"]
        w.grad = two_point(w.detach(), z, eps) * z
        reference.step()
    optimizer, weights = train(MeZO, 8, lr=lr, eps=eps, momentum=0.8)
    assert torch.allclose(weights, w.detach(), atol=1e-6)
    assert optimizer.effective_lr() == pytest.approx(lr / 0.2)


def test_both_signs():
    law = Dense("gaussian")
    zs = [law({"w": START}, seed=0, step=0, index=i)["w"] for i in range(3)]
    cs = [two_point(START, z, 1e-3) for z in zs]
    _, estimate = train(ZOSign, 1, lr=0.1, num_perturbations=3, distribution="gaussian")
    exact = START - 0.1 * torch.sign(sum(c * z for c, z in zip(cs, zs, strict=True)))
    assert torch.allclose(estimate, exact)
    _, projection = train(ZOSign, 1, lr=0.1, num_perturbations=3, distribution="gaussian", sign_of="projection")
    assert torch.allclose(
        projection, START - 0.1 * sum(math.copysign(1, c) * z for c, z in zip(cs, zs, strict=True)) / 3
    )


def test_forward_gradient_is_the_exact_directional_derivative():
    w = weight()
    optimizer = ForwardGradient([("w", w)], lr=0.01)
    loss = lambda: torch.cosh(w - TARGET).sum() + 0.1 * w.sum() ** 2  # noqa: E731
    z = Dense("rademacher")({"w": w.detach()}, seed=0, step=0, index=0)["w"]
    gradient = torch.autograd.grad(loss(), w)[0]
    optimizer.step(loss)
    assert optimizer.last_estimate.coefficients[0] == pytest.approx(float((gradient * z).sum()), rel=1e-12)
    with pytest.raises(UsageError, match="tensor"):
        optimizer.step(lambda: 1.0)
    with pytest.raises(RunError, match="depend"):
        optimizer.step(lambda: torch.tensor(1.0))


def test_the_number_of_directions_can_grow():
    w = weight()
    optimizer = MeZO([w], lr=1e-4, num_perturbations=4, sample_schedule="linear", total_steps=8)
    counts = []
    for _ in range(9):
        counts.append(optimizer.forwards_per_step // 2)
        optimizer.step(lambda: loss_at(w.detach()))
    assert counts == [1, 1, 1, 1, 2, 2, 3, 3, 4]


def test_directions_are_keyed_by_name_not_by_order():
    def final_weights(order):
        params = {name: nn.Parameter(torch.zeros(4)) for name in ("a", "b")}
        optimizer = MeZO([(name, params[name]) for name in order], lr=0.1)
        optimizer.step(lambda: float(params["a"].detach().sum() + 2 * params["b"].detach().sum()))
        return params

    left, right = final_weights("ab"), final_weights("ba")
    assert torch.equal(left["a"], right["a"])
    assert torch.equal(left["b"], right["b"])


def test_decay_goes_by_module_type():
    class RootMeanSquareNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 1))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias_net = nn.Linear(3, 3)
            self.embed = nn.Embedding(5, 3)
            self.norm = RootMeanSquareNorm()
            self.group = nn.GroupNorm(1, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

    decaying, resting = decay_groups(Net(), 0.1)
    assert [n for n, _ in decaying["params"]] == ["bias_net.weight", "embed.weight"]
    assert [n for n, _ in resting["params"]] == ["bias_net.bias", "norm.scale", "group.weight", "group.bias"]
    assert (decaying["weight_decay"], resting["weight_decay"]) == (0.1, 0.0)
    optimizer = MeZO([decaying, resting], lr=0.5)
    assert list(optimizer.named_params)[:2] == ["bias_net.weight", "embed.weight"]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: MeZO([], lr=0.1), "nothing to train"),
        (lambda: MeZO(nn.Linear(2, 2).requires_grad_(False), lr=0.1), "nothing to train"),
        (lambda: MeZO(torch.ones(3), lr=0.1), "single tensor"),
        (lambda: MeZO([torch.ones(3, dtype=torch.int8)], lr=0.1), "perturbed"),
        (lambda: MeZO([weight()], lr=-1.0), "lr"),
        (lambda: MeZO([weight()], lr=math.nan), "lr"),
        (lambda: MeZO([weight()], lr=0.1, weight_decay=-1), "weight_decay"),
        (lambda: MeZO([weight()], lr=0.1, momentum=1.0), "momentum"),
        (lambda: MeZO([weight()], lr=0.1, distribution="cauchy"), "cauchy"),
        (lambda: MeZO([weight()], lr=0.1, perturb="undo"), "undo"),
        (lambda: MeZO([{"params": [("a", weight())]}, {"params": [("a", weight())]}], lr=0.1), "named 'a'"),
        (lambda: MeZO([weight()], lr=0.1).load_state_dict(SGD([weight()]).state_dict()), "zeroth-order"),
        (lambda: ZOSign([weight()], sign_of="loss"), "sign_of"),
        (lambda: ZOAdam([weight()], beta1=1.0), "beta1"),
        (lambda: HiZOO([weight()], hessian_smooth=1.0), "hessian_smooth"),
        (lambda: get_method("mezzo"), "choose one of"),
        (lambda: SGD([weight()]).step(lambda: 1.0), "gradient"),
    ],
)
def test_errors_say_what_to_do(call, match):
    with pytest.raises(UsageError, match=match):
        call()


def test_equal_losses_in_the_first_step_are_warned_about(caplog):
    """As when the closure works on a copy of the weights."""
    weight, copy = torch.nn.Parameter(torch.ones(3)), torch.ones(3)
    MeZO([weight], lr=0.1).step(lambda: copy.square().sum())
    assert "may not see the weights" in caplog.text
    caplog.clear()
    MeZO([weight], lr=0.1).step(lambda: weight.square().sum())
    assert not caplog.text


@pytest.mark.parametrize("perturb", ["in_place", "in_place:copy"])
def test_the_windows_of_hizoo_change_nothing(monkeypatch, perturb):
    """Directions belong to positions, so it does not matter how many of them are held at a time."""
    ends = []
    for window in (7, 1 << 21):
        monkeypatch.setattr("zokernel.directions.families.preconditioned.WINDOW", window)
        w = nn.Parameter(torch.linspace(-1, 1, 60).view(6, 10))
        optimizer = HiZOO([("w", w)], lr=0.01, num_perturbations=2, hessian_smooth=0.1, perturb=perturb)
        for _ in range(4):
            optimizer.step(lambda w=w: (w - 0.5).pow(4).sum())
        ends.append(w.detach().clone())
    assert torch.equal(*ends)
