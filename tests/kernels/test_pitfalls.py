"""Every pitfall gives its error before the work starts, and the remedy it names works."""

from __future__ import annotations

import logging

import pytest
import torch
from cases import Bag, ids, mlp, tiny_bert, tiny_gpt2, tiny_llama, tokens
from torch import nn
from torch.nn import functional

from zokernel.dynamics import belief_change
from zokernel.errors import RunError, UsageError
from zokernel.kernels import (
    entk,
    error_curves,
    fidelity,
    forward_mode,
    jacobian_features,
    kernel_moments,
    layer_contributions,
    project,
    zo_entk,
)
from zokernel.kernels.model import FunctionalModel


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        heads = self.proj(x).view(len(x), 4, 2, 4).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(heads, heads, heads)
        return self.out(mixed.transpose(1, 2).flatten(2).mean(1))


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.layer(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


class Hidden(nn.Module):
    """Part of the forward pass runs under no_grad."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        with torch.no_grad():
            x = torch.tanh(self.first(x))
        return self.second(x)


FUSED = {
    "scaled_dot_product_attention": (Attention, "fused attention has no forward-mode derivative"),
    "MultiheadAttention": (MultiHead, "fused nn.MultiheadAttention path"),
    "TransformerEncoderLayer": (Encoder, "fused nn.TransformerEncoderLayer path"),
    "LSTM": (Recurrent, "MKL-DNN recurrent kernel"),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_kernels_in_forward_mode(name):
    build, message = FUSED[name]
    torch.manual_seed(0)
    net, x = build().eval(), torch.randn(1, 4, 8)
    with pytest.raises(UsageError, match=message) as error:
        zo_entk(net, x, x, num_perturbations=10_000)
    assert "forward_mode()" in str(error.value)
    assert "finite_difference" in str(error.value)
    with forward_mode():
        exact = zo_entk(net, x, x, num_perturbations=3, distribution="gaussian")
        torch.testing.assert_close(entk(net, x, x, method="ntk_vp"), entk(net, x, x, method="contraction"))
    approximate = zo_entk(net, x, x, num_perturbations=3, distribution="gaussian", method="finite_difference")
    torch.testing.assert_close(approximate, exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_hugging_face_sdpa(build):
    torch.manual_seed(0)
    model, x = build(attn_implementation="sdpa"), tokens([1, 2, 3])
    with pytest.raises(UsageError, match="attn_implementation='eager'"):
        zo_entk(model, x, x, num_perturbations=10_000, outputs=[1, 2])
    with forward_mode():
        exact = zo_entk(model, x, x, num_perturbations=3, outputs=[1, 2])
    model.set_attn_implementation("eager")
    torch.testing.assert_close(zo_entk(model, x, x, num_perturbations=3, outputs=[1, 2]), exact)


def test_batches_of_sdpa_models_need_no_vmap_over_samples():
    torch.manual_seed(0)
    model = tiny_llama(attn_implementation="sdpa")
    batch = tokens([1, 2, 3], [4, 5])
    kernel = entk(model, batch, batch, outputs=[1, 2], method="contraction")
    torch.testing.assert_close(kernel[1, :, 1], entk(model, tokens([4, 5]), tokens([4, 5]), outputs=[1, 2]))


def test_forward_mode_restores_the_backends():
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    with forward_mode():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == before


def test_dropout_in_train_mode():
    net = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.1), nn.Linear(4, 3))
    with pytest.raises(UsageError, match=r"Dropout '1' is in train mode.*call model.eval\(\)"):
        entk(net, torch.randn(1, 5), torch.randn(1, 5))
    entk(net.eval(), torch.randn(1, 5), torch.randn(1, 5))


class AlwaysDropped(nn.Module):
    """Dropout that model.eval() does not switch off."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 64), nn.Linear(64, 3)

    def forward(self, x):
        return self.second(functional.dropout(torch.tanh(self.first(x)), 0.1))


class BatchStatistics(nn.Module):
    """Batch normalisation that no module declares."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.second(functional.batch_norm(hidden, None, None, training=True) if len(x) > 1 else hidden)


def kernels_of(net, x_o, x_u):
    yield from (lambda m=m: entk(net, x_o, x_u, method=m) for m in ("auto", "contraction", "ntk_vp"))
    yield from (
        lambda m=m: zo_entk(net, x_o, x_u, num_perturbations=3, method=m)
        for m in ("jvp", "finite_difference", "jacobian")
    )
    yield lambda: fidelity(net, x_o, x_u, num_perturbations=[2])
    yield lambda: error_curves(net, x_o, x_u[:1], max_perturbations=3)
    yield lambda: kernel_moments(net, x_o, x_u)
    yield lambda: layer_contributions(net, x_o, x_u)
    yield lambda: belief_change(net, x_o, x_u, [0] * len(x_u), 1e-3)
    if len(x_u) > 1:
        yield lambda: jacobian_features(net, x_u)


@pytest.mark.parametrize("count", [1, 2])
def test_a_random_model_is_refused(count):
    torch.manual_seed(0)
    net, x_o, x_u = AlwaysDropped().eval(), torch.randn(2, 5), torch.randn(count, 5)
    for kernel in kernels_of(net, x_o, x_u):
        with pytest.raises(UsageError, match="The model is random") as error:
            kernel()
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="The model is random"):
        entk(net, x_u[:1], x_u[:1])


@pytest.mark.parametrize("count", [1, 2])
def test_a_model_that_couples_examples_is_refused(count):
    torch.manual_seed(0)
    net, x_o, x_u = BatchStatistics().eval(), torch.randn(2, 5), torch.randn(count, 5)
    for kernel in kernels_of(net, x_o, x_u):
        with pytest.raises(UsageError, match="output of one example changes with its neighbours") as error:
            kernel()
    assert "\n" not in str(error.value)


def test_batch_norm_without_running_statistics_is_refused():
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).eval()
    for kernel in kernels_of(net, torch.randn(2, 5), torch.randn(2, 5)):
        with pytest.raises(UsageError, match=r"BatchNorm '1' has no running statistics"):
            kernel()
    instance = nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2), nn.Flatten(), nn.Linear(18, 2)).eval()
    entk(instance, torch.randn(2, 1, 5, 5), torch.randn(1, 1, 5, 5))  # statistics of each example: no coupling


def test_embedding_bags_have_no_forward_mode_and_the_remedies_work():
    torch.manual_seed(0)
    net, x_o, x_u = Bag().double(), ids([1, 2, 2], [3, 8, 0]), ids([2, 5, 6])
    with pytest.raises(UsageError, match=r"nn.EmbeddingBag has no forward-mode derivative") as error:
        entk(net, x_o, x_u, method="ntk_vp")
    assert "forward_mode()" not in str(error.value)  # which does not help here
    for remedy in ("nn.Embedding", "method='contraction'", "method='finite_difference'", "method='jacobian'"):
        assert remedy in str(error.value)
    plain = nn.Sequential(nn.Embedding(9, 3), Mean(), nn.Tanh(), nn.Linear(3, 2)).double()
    plain[0].weight.data, plain[3] = net.bag.weight.data, net.out
    expected = entk(plain, x_o, x_u, method="ntk_vp")
    torch.testing.assert_close(entk(net, x_o, x_u, method="contraction"), expected)
    exact = zo_entk(net, x_o, x_u, num_perturbations=3, method="jacobian")
    approximate = zo_entk(net, x_o, x_u, num_perturbations=3, method="finite_difference", eps=1e-5)
    torch.testing.assert_close(approximate, exact, rtol=1e-6, atol=1e-8)


def test_batch_norm_in_train_mode():
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(UsageError, match=r"BatchNorm '1' is in train mode.*call model.eval\(\)"):
        zo_entk(net, torch.randn(2, 5), torch.randn(2, 5), num_perturbations=3)
    running = net[1].running_mean.clone()
    zo_entk(net.eval(), torch.randn(2, 5), torch.randn(2, 5), num_perturbations=3)
    assert torch.equal(net[1].running_mean, running)


@pytest.mark.parametrize("method", ["contraction", "ntk_vp"])
def test_no_grad_inside_the_forward_pass(method):
    torch.manual_seed(0)
    net, x = Hidden(), torch.randn(1, 5)
    with pytest.raises(UsageError, match=r"Reverse mode disagrees with the model.*no_grad"):
        entk(net, x, x, method=method)
    # what the loss sees is still there: forward mode and finite differences agree
    exact, approximate = (project(net, [x], num_perturbations=4, method=m)[0] for m in ("jvp", "finite_difference"))
    torch.testing.assert_close(exact, approximate, rtol=1e-2, atol=1e-3)


def test_tied_weights_move_together():
    """Perturbing a tied GPT-2 moves embedding and head: projections equal differences of the real, mutated model."""
    torch.manual_seed(0)
    model, x, eps = tiny_gpt2().double(), tokens([1, 2, 3]), 1e-5
    projected = project(model, [x], num_perturbations=1, seed=4)[0][0, :, 0]
    from zokernel.directions import Dense

    logits = []
    for scale in (eps, -2 * eps):
        Dense("rademacher").add_(dict(model.named_parameters()), scale, seed=4, step=0, index=0)
        with torch.no_grad():
            logits.append(model(input_ids=x["input_ids"], use_cache=False).logits[0, -1])
    torch.testing.assert_close(projected, (logits[0] - logits[1]) / (2 * eps), rtol=1e-4, atol=1e-5)


def test_no_trainable_parameter():
    with pytest.raises(UsageError, match="is_trainable=True"):
        entk(mlp().requires_grad_(False), torch.randn(1, 5), torch.randn(1, 5))


def test_quantized_weights():
    net = mlp()
    net[0].weight = nn.Parameter(torch.zeros(7, 5, dtype=torch.int8), requires_grad=False)
    params = dict(net.named_parameters())
    with pytest.raises(UsageError, match=r"stored as torch.int8.*dequantize"):
        FunctionalModel(net, params=params)


def test_a_function_without_parameters():
    with pytest.raises(UsageError, match="pass params="):
        entk(lambda p, x: x, torch.ones(1, 2), torch.ones(1, 2))


def test_nan_logits():
    net = mlp()
    net[0].weight.data[0, 0] = float("nan")
    with pytest.raises(RunError, match="NaN or infinite"):
        zo_entk(net, torch.randn(1, 5), torch.randn(1, 5), num_perturbations=3)


def test_caches_are_off_and_refused():
    model = tiny_llama()
    batch = tokens([1, 2, 3])
    before = FunctionalModel(model).logits(batch)
    entk(model, batch, batch, outputs=[1])
    assert torch.equal(FunctionalModel(model).logits(batch), before)
    with pytest.raises(UsageError, match="past_key_values"):
        entk(model, batch | {"past_key_values": torch.zeros(1)}, batch)


def test_a_masked_model_asks_for_positions():
    with pytest.raises(UsageError, match=r"batch\['positions'\]"):
        entk(tiny_bert(), tokens([1, 2, 3]), tokens([1, 2, 3]))


def test_double_precision_llama_is_noted(caplog):
    with caplog.at_level(logging.WARNING, logger="zokernel"):
        entk(tiny_llama().double(), tokens([1, 2]), tokens([1, 2]), outputs=[1])
    assert any("RMSNorm computes in float32" in message for message in caplog.messages)


def test_a_head_that_is_not_linear_is_refused():
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda module, args, out: torch.tanh(out))
    with pytest.raises(UsageError, match=r"not W h \+ b"):
        entk(model, tokens([1, 2]), tokens([1, 2]), method="lm_head")
    with pytest.raises(UsageError, match="No plain linear head"):
        entk(mlp(), torch.ones(1, 5), torch.ones(1, 5), method="lm_head")
