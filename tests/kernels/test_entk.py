"""The exact tangent kernel: every method against dense autograd and against curvlinops, and its structure."""

from __future__ import annotations

import logging

import pytest
import torch
from cases import CASES, build, dense_jacobian, mlp, tiny_gpt2, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zokernel.dynamics import belief_change
from zokernel.errors import RunError, UsageError
from zokernel.kernels import (
    checks,
    entk,
    error_curves,
    fidelity,
    head_kernel,
    jacobian,
    jacobian_features,
    kernel_moments,
    layer_contributions,
    sample_nzk,
    zo_entk,
)
from zokernel.kernels.jacobians import inner_products
from zokernel.kernels.model import FunctionalModel
from zokernel.kernels.projections import METHODS
from zokernel.theory import expected_nzk


def reference(case):
    return dense_jacobian(case, case.x_o) @ dense_jacobian(case, case.x_u).T


@pytest.mark.parametrize("name", CASES)
def test_every_method_agrees_with_dense_autograd(name):
    case = build(name)
    expected = reference(case)
    for method in case.methods:
        kernel = entk(case.model, case.x_o, case.x_u, outputs=case.outputs, params=case.params, method=method)
        kernel = kernel if kernel.ndim == 2 else kernel.flatten(2, 3).flatten(0, 1)
        error = (kernel - expected).abs().max() / expected.abs().max()
        assert error < 1e-9, (method, float(error))


def test_the_auto_method_is_exact_too():
    case = build("tied GPT-2")
    torch.testing.assert_close(entk(case.model, case.x_o, case.x_u), reference(case), rtol=1e-9, atol=1e-9)


class Counted(nn.Module):
    """A network that counts its forward passes."""

    def __init__(self, net):
        super().__init__()
        self.net, self.forwards = net, 0

    def forward(self, *args, **kwargs):
        self.forwards += 1
        return self.net(*args, **kwargs)


@pytest.mark.parametrize("method", ["auto", "contraction", "ntk_vp"])
def test_shapes_cost_one_forward_at_most(method):
    """Contraction pulls back once per example; a stream pulls back x_u and pushes the whole of x_o once per chunk."""
    net, x_o, x_u = Counted(mlp()), torch.randn(3, 5), torch.randn(2, 5)
    entk(net, x_o, x_u, method=method, check=False)
    num_forwards = 2 + 2 if method == "ntk_vp" else 3 + 2
    assert net.forwards <= num_forwards + 1
    model = FunctionalModel(net)
    entk(model, x_o, x_u, method=method, check=False)
    net.forwards = 0
    entk(model, x_o, x_u, method=method, check=False)
    assert net.forwards == num_forwards
    net.forwards = 0
    entk(net, x_o, x_u, method=method)  # the probe: alone, in company, one adjoint pair; the shapes follow from it
    assert net.forwards <= num_forwards + 5


def test_shapes_of_projections_and_moments_cost_one_forward_at_most():
    net, x_o, x_u = Counted(mlp()), torch.randn(3, 5), torch.randn(2, 5)
    zo_entk(net, x_o, x_u, num_perturbations=4, method="finite_difference", check=False)
    assert net.forwards <= 2 * 4 + 1
    net.forwards = 0
    kernel_moments(net, x_o, x_u, check=False)
    assert net.forwards <= 3 + 2 + 1
    net.forwards = 0
    jacobian(net, x_o, check=False)
    assert net.forwards <= 3 + 1


def test_one_output_per_example_without_an_axis_for_it():
    """A model that returns (N,) has one output per example, however many examples there are."""
    torch.manual_seed(0)
    squeezed = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
    x_o, x_u = torch.randn(3, 5), torch.randn(2, 5)
    for method in ("contraction", "ntk_vp"):
        kernel = entk(squeezed, x_o, x_u, method=method)
        assert kernel.shape == (3, 1, 2, 1)
        torch.testing.assert_close(kernel, entk(squeezed[:3], x_o, x_u))


@pytest.mark.parametrize("tied", [True, False])
def test_the_batch_encoding_of_a_tokenizer_is_a_mapping(tied):
    from transformers import BatchEncoding

    torch.manual_seed(0)
    model = tiny_gpt2(tie_word_embeddings=tied).double()
    x_o, x_u = tokens([1, 2, 3, 2], [4, 5]), tokens([2, 4, 5])
    for method in ("contraction", "ntk_vp", "lm_head"):
        plain = entk(model, x_o, x_u, method=method)
        assert torch.equal(entk(model, BatchEncoding(x_o), BatchEncoding(x_u), method=method), plain), method
    options = {"num_perturbations": 2, "method": "finite_difference"}
    encoded = zo_entk(model, BatchEncoding(x_u), tokens([1, 2, 3]), **options)
    assert torch.equal(encoded, zo_entk(model, x_u, tokens([1, 2, 3]), **options))
    changes = [belief_change(model, o, u, [1], 1e-3) for o, u in ((x_o, x_u), map(BatchEncoding, (x_o, x_u)))]
    assert torch.equal(changes[0].actual_zeroth_order, changes[1].actual_zeroth_order)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_the_default_dtype_of_torch_changes_no_kernel(default):
    case = build("tied GPT-2")
    model, x_o, x_u = case.model.float(), case.x_o, case.x_u
    net, x = mlp(), torch.randn(2, 5)

    def everything():
        yield from (entk(model, x_o, x_u, method=method) for method in case.methods)
        yield from (zo_entk(model, x_o, x_u, num_perturbations=3, method=m) for m in METHODS)
        table = fidelity(net, x[:1], x[1:], num_perturbations=[1, 4], replicates=2)
        curves = error_curves(net, x, x[:1], max_perturbations=5)
        features = jacobian_features(net, x)
        change = belief_change(net, x, x[:1], [1], 1e-2, num_perturbations=2)
        estimate = sample_nzk(features.features[:, 0], num_samples=50)
        yield from (table.errors, torch.tensor(table["predicted"], dtype=torch.float64), curves.errors_SNP)
        yield from (curves.predicted([2]), *curves.band(), features.features, features.theta, *estimate)
        yield from (change.A, change.G, change.first_order, change.zeroth_order, change.actual_zeroth_order)
        yield expected_nzk(features.features[:, 0], distribution="rademacher")

    expected = list(everything())
    torch.set_default_dtype(default)
    try:
        actual = list(everything())
    finally:
        torch.set_default_dtype(torch.float32)
    for left, right in zip(actual, expected, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def test_curvlinops_agrees():
    curvlinops = pytest.importorskip("curvlinops")
    net, x_o, x_u = mlp().double(), torch.randn(2, 5).double(), torch.randn(3, 5).double()
    params = list(net.parameters())

    def operator(x):
        return curvlinops.JacobianLinearOperator(net, params, [(x, torch.zeros(len(x), 3))], num_data=len(x))

    jac_o, jac_u = (operator(x) @ torch.eye(sum(p.numel() for p in params)).double() for x in (x_o, x_u))
    expected = (torch.as_tensor(jac_o) @ torch.as_tensor(jac_u).T).reshape(2, 3, 3, 3)
    torch.testing.assert_close(entk(net, x_o, x_u), expected.to(torch.float64), rtol=1e-9, atol=1e-9)


def test_llama_head_is_exact_up_to_its_float32_norms():
    from cases import last_logits, tiny_llama

    torch.manual_seed(0)
    model = tiny_llama().double()
    x_o, x_u = tokens([1, 2, 3]), tokens([4, 5, 6, 7])

    def rows(x):
        grads = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in last_logits(model, x)[0]]
        return torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads])

    expected = rows(x_o) @ rows(x_u).T
    for method in ("contraction", "ntk_vp", "lm_head"):
        torch.testing.assert_close(entk(model, x_o, x_u, method=method), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_factored_norms_and_products_equal_the_dense_ones(tied):
    torch.manual_seed(1)
    model = FunctionalModel(tiny_gpt2(tie_word_embeddings=tied).double())
    kernel = head_kernel(model, tokens([1, 2, 3, 2]), tokens([2, 4, 5]))
    dense = kernel.dense()
    a, b = torch.randn(23, 4).double(), torch.randn(23, 4).double()
    assert kernel.squared_norm() == pytest.approx(dense.square().sum().item(), rel=1e-12)
    assert kernel.trace() == pytest.approx(dense.trace().item(), rel=1e-12)
    torch.testing.assert_close(kernel.matvec(b), dense @ b)
    torch.testing.assert_close(kernel.bilinear(a, b), torch.einsum("vp,vw,wp->p", a, dense, b))


def test_moments_equal_those_of_dense_jacobians():
    case = build("conv with GroupNorm")
    jac_o, jac_u = dense_jacobian(case, case.x_o), dense_jacobian(case, case.x_u)
    moments = kernel_moments(case.model, case.x_o, case.x_u)
    assert moments.norm_o_sq == pytest.approx(jac_o.square().sum().item())
    assert moments.norm_u_sq == pytest.approx(jac_u.square().sum().item())
    assert moments.kernel_sq == pytest.approx((jac_o @ jac_u.T).square().sum().item())
    assert moments.diagonal == pytest.approx((jac_o.square().sum(0) @ jac_u.square().sum(0)).item())
    assert moments.dim == jac_o.shape[1]


def test_layers_add_up_to_the_kernel():
    case = build("mlp, batches")
    shares = layer_contributions(case.model, case.x_o, case.x_u)
    assert list(shares) == ["0", "2"]
    torch.testing.assert_close(sum(shares.values()), entk(case.model, case.x_o, case.x_u))


@settings(max_examples=15, deadline=None)
@given(chunk=st.integers(1, 9), seed=st.integers(0, 100), shape=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_chunking_never_changes_the_kernel(chunk, seed, shape):
    torch.manual_seed(seed)
    net, x_o, x_u = mlp().double(), torch.randn(shape[0], 5).double(), torch.randn(shape[1], 5).double()
    whole = entk(net, x_o, x_u)
    for method in ("contraction", "ntk_vp"):
        torch.testing.assert_close(entk(net, x_o, x_u, method=method, chunk_size=chunk), whole)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10))
def test_structure(seed, scale):
    """Symmetric and positive for equal inputs, transposed when they swap, quadratic in the scale of the logits."""
    torch.manual_seed(seed)
    net, x = mlp().double(), torch.randn(2, 5).double()
    kernel = entk(net, x, x).reshape(6, 6)
    torch.testing.assert_close(kernel, kernel.T)
    assert torch.linalg.eigvalsh(kernel).min() > -1e-9
    other = torch.randn(1, 5).double()
    torch.testing.assert_close(entk(net, x, other).flatten(0, 1)[:, 0], entk(net, other, x).flatten(2, 3)[0].T)
    scaled = FunctionalModel(
        lambda p, v: scale * torch.func.functional_call(net, p, (v,)), params=dict(net.named_parameters())
    )
    torch.testing.assert_close(entk(scaled, x, x), scale**2 * entk(net, x, x))


def test_shapes():
    net = mlp()
    assert entk(net, torch.randn(1, 5), torch.randn(1, 5)).shape == (3, 3)
    assert entk(net, torch.randn(2, 5), torch.randn(1, 5)).shape == (2, 3, 1, 3)
    assert entk(net, torch.randn(5), torch.randn(5), outputs=[2, 0]).shape == (2, 2)
    assert jacobian(net, torch.randn(4, 5), outputs=[1]).shape == (4, 1, 66)


def test_memory_is_logged_in_advance_and_refused_when_it_does_not_fit(caplog, monkeypatch):
    net, x = mlp(), torch.randn(1, 5)
    with caplog.at_level(logging.INFO, logger="zokernel"):
        entk(net, x, x)
    assert any("eNTK block 3 x 3 by contraction" in message for message in caplog.messages)
    monkeypatch.setattr(checks, "available_bytes", lambda: 100)
    with pytest.raises(RunError, match=r"needs .* but only 100 B are available: restrict outputs="):
        entk(net, x, x, method="contraction")


def test_unknown_method_names_the_choices():
    with pytest.raises(UsageError, match="choose one of auto, contraction, ntk_vp, lm_head"):
        entk(nn.Linear(2, 2), torch.ones(1, 2), torch.ones(1, 2), method="exact")


def test_the_weights_are_left_alone():
    case = build("LoRA only")
    before = {name: p.clone() for name, p in case.model.named_parameters()}
    entk(case.model, case.x_o, case.x_u)
    assert all(torch.equal(before[name], p) for name, p in case.model.named_parameters())


def test_inner_products_of_long_rows_keep_their_precision():
    """Sums of 3e7 positive terms: one float32 product loses more than 1e-4 here, pieces in float64 do not."""
    row = torch.rand(1, 30_000_000, generator=torch.Generator().manual_seed(0))
    expected = row.square().sum(dtype=torch.float64)
    assert abs(inner_products(row, row)[0, 0] / expected - 1) < 1e-5
