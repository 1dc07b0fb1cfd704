"""Closures that call backward are refused, however the losses are taken; other errors and gradients are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zokernel.errors import UsageError
from zokernel.optim import GRZO, SGD, ForwardGradient, MeZO, get_method

MESSAGE = (
    "The closure must not call backward, because a zeroth-order step takes losses alone: return the loss, and leave "
    "out loss.backward() and zero_grad()."
)
OTHER_WAYS = {"grzo": GRZO, "forward_gradient": ForwardGradient}
INPUTS = torch.linspace(-1, 1, 15).view(5, 3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def weights_of(net: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize(
    "way", ["in_place", "in_place:copy", "in_place:grid", "in_forward", "grzo", "forward_gradient"]
)
def test_a_closure_as_torchs_optimizers_want_it_is_refused(way, with_gradients):
    net = network()
    by_example = way == "grzo"
    optimizer = OTHER_WAYS[way](net) if way in OTHER_WAYS else MeZO(net, perturb=way)
    before = weights_of(net)

    def closure():
        optimizer.zero_grad()
        with torch.set_grad_enabled(with_gradients):
            losses = net(INPUTS).square().mean(1)
            losses.mean().backward()
        return losses if by_example else losses.mean()

    with pytest.raises(UsageError) as caught:
        optimizer.step(closure)
    assert str(caught.value) == MESSAGE
    if not with_gradients:
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert "does not require grad" in str(caught.value.__cause__)
    assert optimizer.step_count == 0
    assert torch.allclose(weights_of(net), before, rtol=0, atol=1e-6)


def test_gradients_that_were_there_before_are_added_to_and_refused():
    net = network()
    net(INPUTS).square().mean().backward()
    optimizer = MeZO(net)

    def closure(backward):
        with torch.enable_grad():
            loss = net(INPUTS).square().mean()
            if backward:
                loss.backward()
        return loss

    assert optimizer.step(lambda: closure(backward=False)) == pytest.approx(
        float(closure(backward=False).detach()), rel=1e-2
    )
    with pytest.raises(UsageError, match="must not call backward"):
        optimizer.step(lambda: closure(backward=True))


def test_a_loss_made_of_derivatives_runs_under_enable_grad_and_is_told_so():
    net, inputs = network(), INPUTS.clone().requires_grad_()
    optimizer = MeZO(net, lr=0.05)

    def slope(enabled):
        with torch.set_grad_enabled(enabled):
            (derivative,) = torch.autograd.grad(net(inputs).sum(), inputs)
        return (derivative - 1).square().mean()

    losses = [optimizer.step(lambda: slope(True)) for _ in range(100)]
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(UsageError, match=r"calls torch\.autograd\.grad, .* under torch\.enable_grad\(\)") as caught:
        optimizer.step(lambda: slope(False))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_other_errors_of_a_closure_stay_as_they_are():
    net = network()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        MeZO(net).step(lambda: net(torch.ones(2, 7)).mean())
    assert not isinstance(caught.value, UsageError)


def test_methods_with_gradients_take_torchs_closures():
    for method in (SGD, get_method("adamw")):
        net = network()
        optimizer = method(net, lr=1e-2)

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = net(INPUTS).square().mean()
            loss.backward()
            return loss

        losses = [optimizer.step(closure) for _ in range(30)]
        assert losses[-1] < 0.9 * losses[0]


def test_other_errors_of_autograd_stay_as_they_are():
    """A closure that takes gradients rightly, under enable_grad, and asks for one of a vector."""
    weight = nn.Parameter(torch.ones(3))

    def closure():
        with torch.enable_grad():
            inputs = torch.ones(3, requires_grad=True)
            torch.autograd.grad(inputs * weight, inputs)

    with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar outputs"):
        MeZO([weight], lr=0.1).step(closure)
