"""Sampling the NZK: shapes, orientation, reproducibility, errors; and the Jacobian features it is built on."""

import contextlib

import pytest
import torch
from cases import Recurrent
from torch import nn

import zokernel as zk
from zokernel.errors import UsageError
from zokernel.kernels import forward_mode, jacobian_features, nzk, sample_nzk
from zokernel.theory import expected_nzk, expected_nzk_factor


def rows(n=4, d=3, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(x_o, x_u, z, zeta, coupling):
    """One sample at a time, straight from the definition."""
    total = torch.zeros(len(x_o), len(x_u), dtype=torch.float64)
    for s in range(len(z)):
        for i in range(len(x_o)):
            for j in range(len(x_u)):
                if coupling == "shared":
                    total[i, j] += (z[s] @ z[s]) * (z[s] @ x_o[i]) * (z[s] @ x_u[j])
                elif coupling == "independent":
                    total[i, j] += (zeta[s] @ x_o[i]) * (zeta[s] @ z[s]) * (z[s] @ x_u[j])
                else:
                    total[i, j] += (z[s] @ x_o[i]) * (z[s] @ x_u[j])
    return total / len(z)


@pytest.mark.parametrize("coupling", ["shared", "independent", "zo_sgd"])
def test_vectorised_estimate_is_the_definition(coupling):
    x_o, x_u, count = rows(), rows(5, seed=1), 20
    generator = torch.Generator().manual_seed(7)
    z = torch.empty(count, 3, dtype=torch.float64).normal_(generator=generator)
    zeta = torch.empty(count, 3, dtype=torch.float64).normal_(generator=generator)
    estimate = nzk(x_o, other=x_u, coupling=coupling, num_samples=count, seed=7)
    torch.testing.assert_close(estimate, naive(x_o, x_u, z, zeta, coupling))


def test_standard_errors_are_those_of_the_mean():
    """The spread of independent estimates equals the reported standard error (80 estimates: 8% uncertainty)."""
    estimates = [sample_nzk(rows(), num_samples=2000, seed=seed) for seed in range(80)]
    spread = torch.stack([estimate.mean for estimate in estimates]).std(0)
    reported = torch.stack([estimate.standard_error for estimate in estimates]).mean(0)
    assert (spread / reported).min() > 0.6
    assert (spread / reported).max() < 1.5


def test_block_size_and_seed(monkeypatch):
    first = nzk(rows(), num_samples=100, seed=1)
    assert torch.equal(first, nzk(rows(), num_samples=100, seed=1))
    assert not torch.equal(first, nzk(rows(), num_samples=100, seed=2))
    monkeypatch.setattr("zokernel.kernels.nzk_matrix.BLOCK_ELEMENTS", 30)
    blocked = sample_nzk(rows(), num_samples=5000, seed=1)  # 500 blocks of 10
    exact = 5 * rows() @ rows().T
    assert ((blocked.mean - exact) / blocked.standard_error).abs().max() < 4.5


def test_the_public_name_stays_a_function():
    import zokernel.kernels.nzk_matrix  # noqa: F401  (importing submodules must not shadow it)

    assert callable(zk.kernels.nzk)
    assert zk.theory.expected_nzk_factor("gaussian", 5, "shared") == 7


def test_several_outputs():
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    kernel = nzk(x, num_samples=50, seed=0)
    assert kernel.shape == (3, 2, 3, 2)
    assert kernel.dtype == torch.float32
    torch.testing.assert_close(kernel.reshape(6, 6), nzk(x.reshape(6, 4), num_samples=50, seed=0))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"coupling": "none"}, "coupling"),
        ({"distribution": "none"}, "There is no distribution"),
        ({"num_samples": 1}, "at least 2"),
        ({"other": torch.eye(2, dtype=torch.float64)}, "same number of parameters"),
        ({"zeta_distribution": "gaussian"}, "second distribution"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(UsageError, match=message):
        nzk(rows(), **kwargs)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[float("nan"), 1.0]]), "finite"),
        (torch.ones(3), "shape"),
        (torch.ones(2, 2, dtype=torch.int64), "floating point"),
    ],
)
def test_bad_features(x, message):
    with pytest.raises(UsageError, match=message):
        nzk(x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_features_are_the_jacobian():
    model, x = network(), rows(5)
    result = jacobian_features(model, x)
    for i in range(5):
        for v in range(2):
            gradients = torch.autograd.grad(model(x)[i, v], list(model.parameters()))
            torch.testing.assert_close(result.features[i, v], torch.cat([g.reshape(-1) for g in gradients]))
    torch.testing.assert_close(result.outputs, model(x).detach())
    assert sum(int(torch.tensor(shape).prod()) for _, shape in result.names) == len(result.theta) == 26


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN, nn.LSTM])
def test_features_of_recurrent_networks(kind):
    """vmap has no rule for their in-place updates: examples are then differentiated one by one."""
    torch.manual_seed(0)
    model, x = Recurrent(kind).double(), torch.randn(3, 5, 4, dtype=torch.float64)
    for context in (contextlib.nullcontext, forward_mode):
        with context():
            features = jacobian_features(model, x).features
        for i in range(3):
            for v in range(2):
                gradients = torch.autograd.grad(model(x)[i, v], list(model.parameters()))
                torch.testing.assert_close(features[i, v], torch.cat([g.reshape(-1) for g in gradients]))


def test_the_linearization_is_tangent_and_the_offset_matters():
    model, x = network(), rows(5)
    result = jacobian_features(model, x)
    direction = torch.randn(26, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = []
    for step in (1e-2, 1e-3):
        torch.nn.utils.vector_to_parameters(result.theta + step * direction, model.parameters())
        errors.append((model(x).detach() - result.predict(result.theta + step * direction)).norm())
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)  # second order
    without = result.initial_predictions(offset=False)
    torch.testing.assert_close(without, result.features @ result.theta)
    assert (without - result.outputs).abs().max() > 0.1


def test_features_options():
    model, x = network(), rows(6)
    whole = jacobian_features(model, x)
    torch.testing.assert_close(jacobian_features(model, x, chunk_size=2).features, whole.features)
    unit = jacobian_features(model, x, normalize=True).features.norm(dim=-1)
    torch.testing.assert_close(unit, torch.ones_like(unit))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(jacobian_features(model, x).features, whole.features[..., -10:])
    weights = {name: parameter.detach() for name, parameter in network().named_parameters()}
    function = jacobian_features(lambda p, v: (v @ p["0.weight"].T).sum(1), x, params={"0.weight": weights["0.weight"]})
    torch.testing.assert_close(function.features, x.repeat(1, 4))


def test_features_errors():
    model, x = network(), rows(4)
    with pytest.raises(UsageError, match=r"needs 1.62 KiB \(allowed: 100 B\)"):
        jacobian_features(model, x, memory_budget=100)
    with pytest.raises(UsageError, match="eval"):
        jacobian_features(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).double(), x)
    with pytest.raises(UsageError, match="not finite"):
        jacobian_features(model, x * float("inf"))
    with pytest.raises(UsageError, match="params="):
        jacobian_features(lambda p, v: v, x)
    with pytest.raises(UsageError, match="trainable"):
        jacobian_features(network().requires_grad_(False), x)
    with pytest.raises(UsageError, match="must return"):
        jacobian_features(nn.Flatten(0), x, params={"w": torch.ones(1)})


def test_network_kernel_scales_by_the_factor():
    """What the published heat maps show: NZK = (N + 2) NTK for a network with N parameters."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    x = jacobian_features(model, rows(6)).features
    estimate = sample_nzk(x, num_samples=100_000)
    exact = expected_nzk_factor("gaussian", x.shape[1]) * x @ x.T
    assert ((estimate.mean - exact) / estimate.standard_error).abs().max() < 4.5


def test_the_exact_kernel_needs_plain_features_and_moments():
    """Samples exist for features of several outputs, and for distributions without a fourth moment."""
    x = rows(3)
    assert nzk(torch.stack([x, x], 1), num_samples=10).shape == (3, 2, 3, 2)
    assert nzk(x, distribution="student_t(3)", num_samples=10).isfinite().all()
    with pytest.raises(UsageError, match="must have shape"):
        expected_nzk(torch.stack([x, x], 1))
    with pytest.raises(UsageError, match="no moment of order 4"):
        expected_nzk(x, distribution="student_t(3)")
    torch.testing.assert_close(expected_nzk(x, distribution="student_t(3)", coupling="zo_sgd"), 3 * x @ x.T)
