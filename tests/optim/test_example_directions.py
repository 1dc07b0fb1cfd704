"""Directions per example: losses and updates against weights moved one example at a time, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zokernel.directions import Dense, Flipout, LowRank
from zokernel.errors import UsageError
from zokernel.estimators import OneSided, PerExample, TwoPoint
from zokernel.estimators.per_example import MAX_EXAMPLES, index_of
from zokernel.optim import GRZO, MeZO, ZerothOrder
from zokernel.perturb import PerExampleRows
from zokernel.perturb.per_example import Examples

EXAMPLES = 5


class Net(nn.Module):
    """An embedding, norms, layers above and below the size from which changes are kept as factors, and a tied head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(700, 96)
        self.norm = nn.LayerNorm(96)
        self.wide = nn.Linear(96, 700)
        self.narrow = nn.Linear(700, 96, bias=False)

    def forward(self, x):
        hidden = self.norm(self.embed(x))
        hidden = hidden + self.narrow(torch.tanh(self.wide(hidden)))
        return F.linear(hidden, self.embed.weight)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


def tokens(examples=EXAMPLES):
    return torch.randint(0, 700, (examples, 7), generator=torch.Generator().manual_seed(1))


def losses_of(net, x):
    logits = net(x)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none").view(len(x), -1).mean(1)


def perturbed(base, direction, scale):
    return {name: tensor + scale * direction[name] for name, tensor in base.items()}


FAMILIES = {
    "rank1": LowRank(1, refresh=0),
    "rank2": LowRank(2, refresh=0),
    "shared-factor": LowRank(2),
    "flipout": Flipout(),
    "dense": Dense("rademacher"),
}
INNER = {"two-point": TwoPoint(1e-3), "one-sided": OneSided(1e-3, 2)}


@pytest.mark.parametrize("inner", list(INNER))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_losses_and_update_are_those_of_one_example_at_a_time(net, family, inner):
    directions, estimator, x = FAMILIES[family], INNER[inner], tokens()
    base = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = ZerothOrder(
        net, lr=1e-2, directions=directions, estimator=PerExample(estimator), perturb=PerExampleRows(), seed=3
    )
    optimizer.step(lambda: losses_of(net, x))

    expected = []
    for point in estimator.points(seed=3, step=0):
        for example in range(EXAMPLES):
            weights = base
            for direction, offset in point.items():
                z = directions(base, seed=3, step=0, index=index_of(direction, example))
                weights = perturbed(weights, z, offset)
            logits = torch.func.functional_call(net, weights, (x[example : example + 1],))[:, :-1]
            expected.append(float(F.cross_entropy(logits[0].detach(), x[example, 1:])))
    assert optimizer.record() == pytest.approx(expected, rel=1e-7)

    count = EXAMPLES * (2 if inner == "one-sided" else 1)
    assert len(optimizer.last_estimate.coefficients) == count
    weights = base
    for index, coefficient in optimizer.last_estimate.coefficients.items():
        weights = perturbed(weights, directions(base, seed=3, step=0, index=index), -1e-2 * coefficient)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=0, atol=1e-12)


def test_coefficients_are_slopes_over_the_number_of_directions(net):
    x = tokens()
    optimizer = ZerothOrder(
        net, lr=0.0, directions=LowRank(1, refresh=0), estimator=PerExample(TwoPoint(1e-3)), perturb="per_example"
    )
    loss = optimizer.step(lambda: losses_of(net, x))
    above, below = optimizer.record()[:EXAMPLES], optimizer.record()[EXAMPLES:]
    expected = {i: (above[i] - below[i]) / 2e-3 / EXAMPLES for i in range(EXAMPLES)}
    assert optimizer.last_estimate.coefficients == pytest.approx(expected)
    assert loss == pytest.approx((sum(above) + sum(below)) / (2 * EXAMPLES))


def test_whitened_slopes_are_those_that_were_published():
    estimate = PerExample(TwoPoint(0.5), whiten=True).combine([1.0, 4.0, 3.0, 0.0, 0.0, 1.0], seed=0, step=0)
    half_differences = torch.tensor([1.0 - 0.0, 4.0 - 0.0, 3.0 - 1.0]) / 2
    expected = half_differences / (half_differences.std() + 1e-8) / (2 * 0.5 * 3)
    assert list(estimate.coefficients.values()) == pytest.approx(expected.tolist())


def test_expected_estimate_is_the_gradient():
    """On losses linear in the weights: each coordinate's mean over n steps, |z| < 4.5 against its standard error."""
    layer = nn.Linear(3, 1, bias=False).double()
    x = torch.randn(EXAMPLES, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    optimizer = GRZO(layer, lr=0.0, whiten=False)
    samples = []
    for step in range(400):
        optimizer.step(lambda: layer(x)[:, 0])
        zero = {"weight": torch.zeros(1, 3, dtype=torch.float64)}
        for index, coefficient in optimizer.last_estimate.coefficients.items():
            optimizer.directions.add_(zero, coefficient, seed=0, step=step, index=index)
        samples.append(zero["weight"][0])
    estimates = torch.stack(samples)
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - x.mean(0)) / error).abs().max() < 4.5


def test_the_estimate_is_as_long_as_the_theory_predicts():
    r"""E|ghat|^2 = ((d + 1) sum_i |g_i|^2 + |sum_i g_i|^2) / B^2 for Gaussian directions, by 1,000 draws."""
    layer = nn.Linear(40, 1, bias=False).double()
    x = torch.randn(4, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    optimizer = ZerothOrder(
        layer, lr=0.0, directions=Dense("gaussian"), estimator=PerExample(TwoPoint(1e-3)), perturb="per_example"
    )
    squares = []
    for step in range(1000):
        optimizer.step(lambda: layer(x)[:, 0])
        zero = {"weight": torch.zeros(1, 40, dtype=torch.float64)}
        coefficients = optimizer.last_estimate.coefficients
        optimizer.directions.add_(zero, list(coefficients.values()), seed=0, step=step, index=list(coefficients))
        squares.append(zero["weight"].square().sum())
    lengths = torch.stack(squares)
    squared_norms = x.square().sum(1)
    # Of one example (d + 2) |g_i|^2; of two different ones the product of their gradients.
    expected = (42 * squared_norms.sum() + x.sum(0).square().sum() - squared_norms.sum()) / 16
    assert abs(lengths.mean() - expected) / (lengths.std() / len(lengths) ** 0.5) < 4.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_replayed_to_the_same_bits(dtype):
    def start():
        torch.manual_seed(0)
        model = Net().to(dtype)
        return model, GRZO(model, lr=1e-4, seed=5, momentum=0.5)

    model, optimizer = start()
    records = []
    for _ in range(3):
        optimizer.step(lambda: losses_of(model, tokens()).float())
        records.append(optimizer.record())
    assert [len(record) for record in records] == [2 * EXAMPLES] * 3
    restored, replayed = start()
    for record in records:
        replayed.replay(record)
    for actual, expected in zip(restored.parameters(), model.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_batches_of_other_sizes_are_noticed(net):
    optimizer = GRZO(net, lr=0.0, whiten=False)
    for examples in (5, 2, 4, 5, 1):
        optimizer.step(lambda: losses_of(net, tokens(examples)))  # noqa: B023
        assert len(optimizer.record()) == 2 * examples


def test_micro_batches_are_parts_of_one_batch(net):
    x = tokens()
    whole = GRZO(net, lr=0.0, whiten=False, seed=2)
    whole.step(lambda: losses_of(net, x))
    parts = [Examples(2, lambda: losses_of(net, x[:2])), Examples(3, lambda: losses_of(net, x[2:]))]
    in_parts = GRZO(net, lr=0.0, whiten=False, seed=2, perturb=PerExampleRows(lambda: parts))
    in_parts.step(lambda: 0.0)
    assert in_parts.record() == pytest.approx(whole.record(), rel=1e-9)


def test_rows_may_be_dealt_out_unevenly(net):
    """Options have rows of their own: two of the first example, one of the second."""
    x = tokens(3)
    owner = torch.tensor([0, 0, 1])

    def losses():
        return torch.zeros(2, dtype=torch.float64).index_add(0, owner, losses_of(net, x))

    optimizer = GRZO(
        net, lr=0.0, whiten=False, perturb=PerExampleRows(lambda: [Examples(2, losses, rows=owner.tolist())])
    )
    optimizer.step(lambda: 0.0)
    base = {name: p.detach().clone() for name, p in net.named_parameters()}
    expected = []
    for offset in (1e-3, -1e-3):
        for example in range(2):
            z = optimizer.directions(base, seed=0, step=0, index=index_of(0, example))
            group = x[owner == example]
            logits = torch.func.functional_call(net, perturbed(base, z, offset), (group,))[:, :-1].detach()
            row_losses = F.cross_entropy(logits.flatten(0, 1), group[:, 1:].flatten(), reduction="none").view(
                len(group), -1
            )
            expected.append(float(row_losses.mean(1).sum()))
    assert optimizer.record() == pytest.approx(expected, rel=1e-7)


def test_one_loss_is_one_example_and_a_warning():
    layer = nn.Linear(3, 1)
    optimizer = GRZO(layer, lr=0.0, whiten=False)
    with pytest.warns(UserWarning, match='reduction="none"'):
        optimizer.step(lambda: layer(torch.ones(4, 3)).mean())
    assert len(optimizer.last_estimate.coefficients) == 1


def test_mistakes(net):
    with pytest.raises(UsageError, match="belong together"):
        MeZO(net, perturb="per_example")
    with pytest.raises(UsageError, match="belong together"):
        ZerothOrder(net, estimator=PerExample(TwoPoint()), perturb="in_place")
    with pytest.raises(UsageError, match="leave out perturb"):
        GRZO(net, perturb="in_forward")
    with pytest.raises(UsageError, match="one direction per example only"):
        GRZO(net, num_perturbations=2)
    with pytest.raises(UsageError, match="mean over everything but the examples"):
        GRZO(net).step(lambda: net(tokens()).mean(-1))
    with pytest.raises(UsageError, match="cannot be applied to the loss of one example"):
        PerExample(OneSided(1e-3, 8, normalize=True))
    with pytest.raises(UsageError, match="65,536 examples"):
        index_of(0, MAX_EXAMPLES)
