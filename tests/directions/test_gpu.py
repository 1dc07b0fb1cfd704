"""What must hold on a GPU: the CPU's directions and losses, journals replayed to the bit, every way to perturb."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from recorded_runs import ALL, NOT_ON_A_GRID, network, record_run, same
from torch import nn
from trainers import make_trainer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from zokernel.finetune import replay
from zokernel.finetune.models.memory import PeakMemory
from zokernel.optim import FZOO, LOZO, KerZOO, MeZO, SparseMeZO, SubZero

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

SIZES = {"vocab_size": 304, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
OPTIMIZERS = {"mezo": MeZO, "kerzoo": KerZOO, "fzoo": FZOO, "sparse_mezo": SparseMeZO, "lozo": LOZO}


def build(dtype=torch.float32, device="cuda"):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, tie_word_embeddings=True)).eval()
    return model.to(device, dtype)


def losses_of(model, optimizer, steps=5, *, bf16=False):
    """Train for some steps and return the losses of all of them."""
    device = next(model.parameters()).device
    ids = torch.randint(0, 300, (6, 9), generator=torch.Generator().manual_seed(1)).to(device)

    def closure():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            logits = model(input_ids=ids, use_cache=False).logits[:, -2]
        return nn.functional.cross_entropy(logits.float() if bf16 else logits, ids[:, -1])

    losses = []
    for _ in range(steps):
        optimizer.step(closure)
        losses += optimizer.last_estimate.losses
    return losses


@pytest.mark.parametrize("perturb", ["in_place", "in_place:copy", "in_place:grid"])
@pytest.mark.parametrize("name", ALL)
def test_every_method_is_replayed_bit_for_bit(name, perturb, tmp_path):
    if perturb == "in_place:grid" and name in NOT_ON_A_GRID:
        return
    weights, _, _ = record_run(tmp_path, name, perturb=perturb, device="cuda")
    assert same(replay(network(device="cuda"), tmp_path), weights[-1])


def test_bf16_weights_are_replayed_with_their_stochastic_rounding(tmp_path):
    weights, _, _ = record_run(tmp_path, "mezo", dtype=torch.bfloat16, perturb="in_place:copy", device="cuda")
    assert same(replay(network(torch.bfloat16, device="cuda"), tmp_path), weights[-1])


@pytest.mark.parametrize("method", [*OPTIMIZERS, "subzero"])
def test_a_run_is_the_same_as_on_the_cpu(method):
    # In float64 the two differ by rounding alone.  The bases of SubZero are a QR, which differs in float32's last bit.
    losses, sizes = {}, {"vocab_size": 304, "n_embd": 96, "n_layer": 2, "n_head": 4}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**sizes)).eval().to(device, torch.float64)
        make = OPTIMIZERS.get(method, SubZero)
        losses[device] = losses_of(model, make(model, lr=1e-3, num_perturbations=3))
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-9 if method != "subzero" else 1e-6)
    assert len(set(losses["cuda"])) == len(losses["cuda"])


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_losses_with_in_forward_are_those_in_place(method, bf16):
    model, losses = build(), {}
    for perturb in ("in_place", "in_forward"):
        trained, lr = copy.deepcopy(model), 0.0 if bf16 else 1e-3
        optimizer = OPTIMIZERS[method](trained, lr=lr, num_perturbations=3, eps=1e-2, perturb=perturb)
        losses[perturb] = losses_of(trained, optimizer, bf16=bf16)
    # Under autocast both convert the same sums to bf16; updates would amplify what else rounds.
    assert losses["in_forward"] == pytest.approx(losses["in_place"], rel=2e-3 if bf16 else 1e-5)


def test_a_resumed_run_of_sparse_mezo_has_its_masks_on_the_gpu():
    def start():
        model = build()
        return model, SparseMeZO(model, lr=1e-3)

    (model, optimizer), (resumed_model, resumed) = start(), start()
    losses_of(model, optimizer, steps=2)
    state = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), state)
    state.seek(0)
    weights, saved = torch.load(state, map_location="cpu", weights_only=False)
    resumed_model.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert losses_of(resumed_model, resumed, steps=2) == losses_of(model, optimizer, steps=2)


def test_bf16_weights_train_with_in_forward():
    model = build(torch.bfloat16)
    optimizer = MeZO(model, lr=1e-3, num_perturbations=4, eps=1e-2, perturb="in_forward")
    losses = losses_of(model, optimizer, steps=60)
    assert sum(losses[-80:]) < 0.9 * sum(losses[:80])


def test_compiled_blocks_with_graphs_train_the_same(parts, tmp_path):
    losses = {}
    for name, settings in {"eager": {}, "graphs": {"torch_compile_mode": "reduce-overhead"}}.items():
        torch._dynamo.reset()
        model, tokenizer, data = parts
        trainer = make_trainer((copy.deepcopy(model), tokenizer, data), tmp_path / name, max_steps=8, **settings)
        trainer.train()
        losses[name] = [row["loss"] for row in trainer.run_log.rows]
    # Fused operations round otherwise, and a slope divides that by eps.
    assert losses["graphs"] == pytest.approx(losses["eager"], rel=2e-4)
    assert len(set(losses["graphs"])) == 8


@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
def test_a_step_takes_no_more_memory_than_its_forwards(perturb):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=4))
    model = model.cuda().eval()
    ids = torch.randint(0, 8192, (8, 128), device="cuda")

    def closure():
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    with torch.no_grad():
        closure()
        with PeakMemory() as evaluating:
            closure()
    optimizer = MeZO(model, lr=1e-6, perturb=perturb)
    optimizer.step(closure)
    with PeakMemory() as training:
        optimizer.step(closure)
    # ``in_forward`` holds a copy of one stretch of weights, 32 MiB here, and of some rows of the embedding.
    room = (40 << 20) if perturb == "in_forward" else 0
    assert training.peak_bytes <= 1.05 * evaluating.peak_bytes + room
