"""The real SmolLM2-135M: label-word kernels, the whole vocabulary by factors, and what training sees."""

from __future__ import annotations

import pytest
import torch

from zokernel.kernels import FunctionalModel, checks, entk, jacobian, zo_entk_factors
from zokernel.kernels.jacobians import inner_products


@pytest.mark.smollm2
def test_label_word_kernels_and_full_vocabulary_norms(smollm2_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    model = AutoModelForCausalLM.from_pretrained(smollm2_path).eval()
    x_o, x_u = (
        {key: value for key, value in tokenizer(text, return_tensors="pt").items() if key != "token_type_ids"}
        for text in ("a joy . It was", "a bore . It was")
    )
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" terrible", " great")]
    functional = FunctionalModel(model, outputs=words)
    # nothing of size V x V can be allocated: 49,152 squared floats are 9.7 GB
    monkeypatch.setattr(checks, "available_bytes", lambda: 6 * 10**9)
    factors = zo_entk_factors(model, x_o, x_u, num_perturbations=2, method="finite_difference", check=False)
    assert factors.left.shape == factors.right.shape == (49_152, 2)
    gram = (factors.left.double().T @ factors.left.double()) * (factors.right.double().T @ factors.right.double())
    assert factors.squared_norms([2])[0].item() == pytest.approx(gram.sum().item() / 4)
    small = zo_entk_factors(functional, x_o, x_u, num_perturbations=2, method="finite_difference", check=False)
    torch.testing.assert_close(small.left, factors.left[words])
    # the same projections from the exact Jacobian of the two label words: finite differences agree to a few percent
    jac = jacobian(functional, x_u, check=False)[0]
    from zokernel.directions import Dense

    z = Dense("rademacher")(functional.params, seed=0, step=0, index=1)
    exact = inner_products(jac, torch.cat([part.flatten() for part in z.values()])[None])[:, 0].float()
    torch.testing.assert_close(small.right[:, 1], exact, rtol=0.05, atol=0.02 * exact.abs().max().item())
    kernel = entk(functional, x_u, x_u, method="contraction", check=False)
    # norms summed in float64; one float32 product over 1.3e8 coordinates would be 2% off
    norms = torch.stack([part.square().sum(1, dtype=torch.float64) for part in jac.split(10**7, dim=1)]).sum(0)
    torch.testing.assert_close(kernel.diagonal().double(), norms, rtol=1e-4, atol=0.0)
