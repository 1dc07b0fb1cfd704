"""``--torch_compile``: a few compiled graphs serve all blocks, all shapes and weights that move."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from trainers import make_trainer
from transformers import AutoModelForCausalLM

from zokernel.errors import UsageError
from zokernel.finetune.trainer.compile_blocks import compile_blocks


def train(parts, folder, tiny_lm_path, **settings):
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32).eval()
    trainer = make_trainer((model, *parts[1:]), folder, **{"max_steps": 6, "num_perturbations": 2, **settings})
    trainer.train()
    metrics = trainer.evaluate()
    return [row["loss"] for row in trainer.run_log.rows] + [metrics["eval_loss"]], trainer


@pytest.mark.parametrize("method", ["mezo", "fzoo", "sgd"])
def test_compiled_blocks_train_the_same(parts, tmp_path, tiny_lm_path, method):
    settings = {"method": method} if method == "mezo" else {"method": method, "num_perturbations": None}
    expected, eager = train(parts, tmp_path / "eager", tiny_lm_path, **settings)
    losses, compiled = train(parts, tmp_path / "compiled", tiny_lm_path, torch_compile_backend="aot_eager", **settings)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len(set(losses)) > 3
    blocks = [m for m in compiled.model.modules() if m._compiled_call_impl is not None]
    assert len(blocks) == compiled.model.config.num_hidden_layers
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()


def test_blocks_share_graphs_over_shapes_and_moved_weights(tiny_lm_path):
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32).eval()
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        expected = model(torch.arange(12).view(2, 6) % 7, use_cache=False).logits
        assert compile_blocks(model, backend=counter) == model.config.num_hidden_layers > 1
        for length in (6, 9, 11, 5):
            logits = model(torch.arange(2 * length).view(2, length) % 7, use_cache=False).logits
            for parameter in model.parameters():
                parameter.add_(0.125).sub_(0.125)
            if length == 6:
                torch.testing.assert_close(logits, expected)
    # One graph for the first shape, one for all others.
    assert counter.frame_count == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
def test_the_default_backend(parts, tmp_path, tiny_lm_path):
    expected, _ = train(parts, tmp_path / "eager", tiny_lm_path)
    # One graph for all shapes from the start; a first one for the first shape alone takes as long again to compile.
    with torch._dynamo.config.patch(assume_static_by_default=False):
        losses, _ = train(parts, tmp_path / "compiled", tiny_lm_path, torch_compile=True)
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("perturb", ["in_forward", "stacked"])
def test_perturbing_inside_compiled_blocks_is_refused(parts, tmp_path, tiny_lm_path, perturb):
    with pytest.raises(UsageError, match="compiled graph does not show"):
        train(parts, tmp_path, tiny_lm_path, torch_compile=True, perturb=perturb)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UsageError, match="names no repeated blocks"):
        compile_blocks(torch.nn.Linear(2, 2))
