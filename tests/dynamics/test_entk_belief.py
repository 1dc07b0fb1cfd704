"""One step decomposed as A, K, G: predictions, actual changes, remainders, and agreement with the optimizer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import mlp, tiny_gpt2, tokens

from zokernel.dynamics import belief_change
from zokernel.dynamics.belief import answer_loss, center
from zokernel.errors import UsageError
from zokernel.kernels import FunctionalModel, entk, teacher_forcing, zo_entk


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return mlp().double(), torch.randn(2, 5).double(), torch.randn(1, 5).double()


def test_the_prediction_is_minus_eta_a_k_g(pair):
    net, x_o, x_u = pair
    change = belief_change(net, x_o, x_u, [2], 1e-3, num_perturbations=7, distribution="gaussian", seed=4)
    kernel = entk(net, x_o, x_u)[:, :, 0]
    estimate = zo_entk(net, x_o, x_u, num_perturbations=7, distribution="gaussian", seed=4)[:, :, 0]
    expected = change.G[0]
    for row in range(2):
        torch.testing.assert_close(change.first_order[row], -1e-3 * change.A[row] @ kernel[row] @ expected)
        torch.testing.assert_close(change.zeroth_order[row], -1e-3 * change.A[row] @ estimate[row] @ expected)
    beliefs = FunctionalModel(net).logits(x_u).softmax(-1)[0]
    torch.testing.assert_close(expected, beliefs - torch.eye(3).double()[2])


def test_a_is_an_oblique_projector(pair):
    net, x_o, x_u = pair
    change = belief_change(net, x_o[:1], x_u, [0], 1e-3)
    assert change.A.shape == (1, 3, 3)  # one row or many: the same axes
    torch.testing.assert_close(change.A @ change.A, change.A)
    assert torch.linalg.matrix_norm(change.A, 2) >= 1
    vector = torch.randn(1, 3).double()
    torch.testing.assert_close(change.apply_A(vector)[0], change.A[0] @ vector[0])


def test_remainders_are_second_order(pair):
    """Actual minus predicted, relative to predicted, falls as eta: slope one in log-log, both kinds of step."""
    net, x_o, x_u = pair
    changes = [belief_change(net, x_o, x_u, [1], lr, num_perturbations=3, eps=1e-5) for lr in (1e-2, 1e-3, 1e-4)]
    for name in ("remainder", "zeroth_order_remainder"):
        remainders = [getattr(change, name) for change in changes]
        assert math.log10(remainders[1] / remainders[2]) == pytest.approx(1, abs=0.1), name
        assert remainders[2] < 0.02


def test_the_step_taken_is_mezos(pair):
    from zokernel.optim import MeZO

    net, x_o, x_u = pair
    change = belief_change(net, x_o, x_u, [1], 1e-2, num_perturbations=5, seed=9)
    trained = copy.deepcopy(net)
    optimizer = MeZO(trained, lr=1e-2, num_perturbations=5, distribution="rademacher", seed=9, eps=1e-3)
    optimizer.step(lambda: answer_loss(trained(x_u), torch.tensor([1]), 1))
    expected = trained(x_o).log_softmax(-1) - net(x_o).log_softmax(-1)
    torch.testing.assert_close(change.actual_zeroth_order, expected.detach(), rtol=1e-7, atol=1e-12)


def test_the_gap_follows_the_exact_law():
    """Mean over 200 seeds of the squared relative gap, predicted and taken, by its z-score; P = 5, Rademacher."""
    torch.manual_seed(0)
    net, x = mlp(), torch.rand(2, 5)
    changes = [
        belief_change(net, x[:1], x[1:], [0], 1e-3, num_perturbations=5, seed=seed, check=False) for seed in range(200)
    ]
    means = []
    for gaps in ([change.gap for change in changes], [change.actual_gap for change in changes]):
        squared = torch.tensor(gaps, dtype=torch.float64).square()
        z = (squared.mean() - changes[0].expected_gap ** 2) / (squared.std() / math.sqrt(len(squared)))
        assert abs(z) < 4
        means.append(squared.mean().sqrt().item())
    # By the triangle inequality, remainders r and r' move a gap by at most (1 + gap) (r + r') / (1 - r).
    first = changes[0].remainder
    both = first + max(change.zeroth_order_remainder for change in changes)
    assert both < 0.01
    assert means[1] == pytest.approx(means[0], abs=(1 + means[0]) * both / (1 - first))


def test_whole_sequences_by_teacher_forcing():
    torch.manual_seed(0)
    model = tiny_gpt2().double()
    x_u, y_u = teacher_forcing([[3, 4], [5]], [[6, 7, 8], [9]])
    x_o, y_o = teacher_forcing([[10, 11]], [[12, 13]])
    lr = 1e-5
    change = belief_change(model, x_o, x_u, y_u, lr, num_perturbations=4, eps=1e-5)

    def log_probability(net, batch, labels):
        logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        total = 0.0
        for n, row in enumerate(labels):
            for position, token in zip(batch["positions"][n], row, strict=True):
                if token != -100:
                    total = total + logits[n, position, token]
        return total

    gradient = torch.autograd.grad(-log_probability(model, x_u, y_u) / 2, list(model.parameters()))
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, grad in zip(trained.parameters(), gradient, strict=True):
            parameter -= lr * grad
    expected = log_probability(trained, x_o, y_o) - log_probability(model, x_o, y_o)
    terms = change.of(y_o)
    assert terms["actual_first_order"].item() == pytest.approx(expected.item(), rel=1e-6)
    # What a prediction misses is proportional to the rate: 5.3 and 59 times it, measured at rates of 1e-5 and 1e-6.
    assert terms["first_order"].item() == pytest.approx(expected.item(), rel=10 * lr)
    assert terms["actual_zeroth_order"].item() == pytest.approx(terms["zeroth_order"].item(), rel=100 * lr)


def test_first_order_only_and_candidates():
    torch.manual_seed(0)
    model, x = tiny_gpt2(), tokens([1, 2, 3])
    change = belief_change(model, x, x, [1], 1e-3, num_perturbations=None, outputs=[4, 9])
    assert change.zeroth_order is None
    assert change.gap is None
    assert change.actual_gap is None
    assert change.zeroth_order_remainder is None
    assert change.first_order.shape == (1, 2)
    assert set(change.of([1])) == {"first_order", "actual_first_order"}


def test_refusals(pair):
    net, x_o, x_u = pair
    with pytest.raises(UsageError, match="2 labels do not fit 1 rows"):
        belief_change(net, x_o, x_u, [0, 1], 1e-3)
    big = torch.full((1, 5000), 1 / 5000)
    change = belief_change(net, x_o, x_u, [0], 1e-3)
    object.__setattr__(change, "probabilities_RV", big)
    with pytest.raises(UsageError, match="use apply_A"):
        _ = change.A
    torch.testing.assert_close(center(torch.ones(1, 4), torch.full((1, 4), 0.25)), torch.zeros(1, 4))


def test_no_gap_is_relative_to_a_step_that_changes_nothing():
    layer = torch.nn.Linear(2, 3, bias=False).double()
    east, north = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    change = belief_change(layer, east, north, [2], 1e-3, num_perturbations=7)
    assert change.first_order.abs().max() == 0
    assert change.expected_gap == math.inf
