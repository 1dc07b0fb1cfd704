"""A model that is random, or couples the examples of a batch, has no kernel of examples: every function refuses it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zokernel.dynamics import belief_change, kernel_drift
from zokernel.errors import UsageError
from zokernel.kernels import (
    FunctionalModel,
    entk,
    error_curves,
    fidelity,
    head_kernel,
    jacobian,
    jacobian_features,
    kernel_moments,
    layer_contributions,
    project,
    zo_entk,
    zo_entk_factors,
)


class Between(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, function, outputs=3):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 6), nn.Linear(6, outputs), function

    def forward(self, x):
        return self.second(self.function(self.first(x)).tanh())


def forked(x):
    """Noise that is the same in every forward: the state of the generator is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return x + torch.randn(x.shape[1:])


RANDOM = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout that seldom drops": lambda x: F.dropout(x, 1e-3),
    "small noise": lambda x: x + 1e-5 * torch.randn_like(x),
    "random leaks": lambda x: F.rrelu(x, training=True),
    "a dropout module in train mode": nn.Dropout(0.01),
}
COUPLED = {
    "batch norm without statistics": nn.BatchNorm1d(6, track_running_stats=False),
    "batch norm in train mode": nn.BatchNorm1d(6),
    "batch statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "a centred batch": lambda x: x - x.mean(0),
    "a softmax over examples": lambda x: x.softmax(0),
}


def calls(outputs, examples=5):
    torch.manual_seed(0)
    x_o, x_u, y = torch.randn(examples, 4), torch.randn(3, 4), torch.tensor([0, 1, 2])
    kernels = {
        "entk": lambda m: entk(m, x_o, x_u),
        "entk by products": lambda m: entk(m, x_o, x_u, method="ntk_vp"),
        "entk of one example": lambda m: entk(m, x_o[:1], x_u[:1]),
        "zo_entk": lambda m: zo_entk(m, x_o, x_u, num_perturbations=2),
        "zo_entk by differences": lambda m: zo_entk(m, x_o, x_u, num_perturbations=2, method="finite_difference"),
        "zo_entk by the Jacobian": lambda m: zo_entk(m, x_o, x_u, num_perturbations=2, method="jacobian"),
        "factors": lambda m: zo_entk_factors(m, x_o, x_u, num_perturbations=2),
        "fidelity": lambda m: fidelity(m, x_o, x_u, num_perturbations=[2]),
        "moments": lambda m: kernel_moments(m, x_o, x_u),
        "layers": lambda m: layer_contributions(m, x_o, x_u),
        "curves": lambda m: error_curves(m, x_o, x_u[:1], max_perturbations=2),
        "jacobian": lambda m: jacobian(m, x_o),
        "features": lambda m: jacobian_features(m, x_o),
        "projections": lambda m: project(m, [x_o, x_u], num_perturbations=2),
        "belief_change": lambda m: belief_change(m, x_o, x_u, y, 1e-2),
    }
    drift = {"kernel_drift": lambda m: kernel_drift(m, x_o, torch.ones(5), 0.1, [0, 2])}
    return drift if outputs == 1 else kernels


@pytest.mark.parametrize("name", [*calls(3), *calls(1)])
def test_models_without_a_kernel_are_refused(name):
    outputs = 1 if name in calls(1) else 3
    call = calls(outputs)[name]
    for kind, models in (("random", RANDOM), ("examples have no kernel|in train mode|neighbours", COUPLED)):
        for function in models.values():
            with pytest.raises(UsageError, match=f"{kind}|train mode"):
                call(Between(function, outputs))


def test_noise_that_is_always_the_same_is_part_of_the_model():
    """Only its derivative counts, and that is the plain network's: compared with autograd in float64."""
    torch.manual_seed(0)
    net, x = Between(forked).double(), torch.randn(3, 4, dtype=torch.float64)

    def rows(x):
        jacobian_rows = []
        for value in net(x).flatten():
            gradients = torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
            jacobian_rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        return torch.stack(jacobian_rows)

    exact = (rows(x) @ rows(x).T).view(3, 3, 3, 3)
    torch.testing.assert_close(entk(net, x, x), exact, rtol=1e-12, atol=1e-12)
    net.first.eval()
    trained = nn.Sequential(net.first, nn.BatchNorm1d(6).double(), net.second).eval()
    pairs = torch.stack([entk(trained, x[i : i + 1], x[j : j + 1]) for i in range(3) for j in range(3)])
    torch.testing.assert_close(entk(trained, x, x).permute(0, 2, 1, 3).reshape(9, 3, 3), pairs)


def test_the_users_random_state_is_left_alone():
    net, before = Between(torch.relu), torch.get_rng_state()
    entk(net, torch.ones(2, 4), torch.ones(1, 4))
    assert torch.equal(before, torch.get_rng_state())


class Headed(nn.Module):
    """Looks like a language model: hidden states, then a linear head."""

    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, x):
        return self.lm_head(F.dropout(self.body(x), 0.1))


def test_the_head_kernel_of_a_random_model_is_refused():
    with pytest.raises(UsageError, match="random"):
        head_kernel(FunctionalModel(Headed()), torch.ones(1, 4), torch.ones(1, 4))


@pytest.mark.parametrize("name", calls(3))
def test_empty_batches_are_refused(name):
    call = calls(3, examples=0)[name]
    with pytest.raises(UsageError, match="no examples"):
        call(Between(torch.relu))
