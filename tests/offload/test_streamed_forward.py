"""Losses and weights of streamed models are those of models in memory, to the bit, for one pass over the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from zokernel.finetune.models.streamed import StreamingOptions, load_streamed
from zokernel.offload import StreamedForward, streamed_blocks
from zokernel.optim import ZerothOrder
from zokernel.perturb import InForward

FAMILIES: dict[str, Any] = {
    "llama": transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
    ),
    "untied": transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    ),
    # Wide enough for torch to share operations among threads.
    "wide": transformers.LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4
    ),
    "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64),
}


@pytest.fixture(params=list(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(FAMILIES[request.param], tmp_path / "model")


def save(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def streamed(
    folder: Path, *, trains_weights: bool, dtype: torch.dtype = torch.float32, copy: str = "copy", **options: Any
) -> Any:
    return load_streamed(
        transformers.AutoConfig.from_pretrained(folder),
        folder,
        dtype,
        StreamingOptions(folder.parent / copy, trains_weights=trains_weights, **options),
        kind="causal",
        name="the model",
    )


def with_lora(model: Any) -> Any:
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return adapted.eval()


def closure(model: nn.Module) -> Any:
    ids = torch.randint(0, 60, (3, 9), generator=torch.Generator().manual_seed(2))

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    return loss


def train(model: Any, perturb: Any, steps: int = 5, **options: Any) -> tuple[list[list[float]], Any]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = ZerothOrder(
        trained, lr=1e-2, estimator="two_point(1e-2, 3)", perturb=perturb, weight_decay=0.01, **options
    )
    losses = []
    for _ in range(steps):
        optimizer.step(closure(model))
        losses.append(optimizer.record())
    return losses, optimizer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("directions", ["dense('gaussian')", "low_rank(2)"])
def test_full_parameters_are_trained_to_the_same_bits(saved: Path, directions: str) -> None:
    reference = resident(saved)
    expected, _ = train(reference, InForward(), directions=directions)
    model = streamed(saved, trains_weights=True)
    losses, _ = train(model, StreamedForward(streamed_blocks(model), model, model.working_copy), directions=directions)
    assert losses == expected
    assert same(weights(model), weights(reference))
    assert not same(weights(model), weights(resident(saved)))


def test_adapters_are_trained_to_the_same_bits(saved: Path) -> None:
    reference, model = with_lora(resident(saved)), with_lora(streamed(saved, trains_weights=False))
    expected, _ = train(reference, InForward())
    losses, _ = train(model, StreamedForward(streamed_blocks(model), model))
    assert losses == expected
    assert same(weights(model), weights(reference))
    assert not (saved.parent / "copy").exists()  # the base is read where it is


def test_weights_of_another_type_are_converted_once(saved: Path) -> None:
    reference, model = (
        with_lora(resident(saved, torch.bfloat16)),
        with_lora(streamed(saved, trains_weights=False, dtype=torch.bfloat16)),
    )
    assert train(reference, InForward(), 2)[0] == train(model, StreamedForward(streamed_blocks(model), model), 2)[0]
    assert (saved.parent / "copy").is_dir()


def test_bf16_weights_are_trained_to_the_same_bits(saved: Path) -> None:
    reference, model = resident(saved, torch.bfloat16), streamed(saved, trains_weights=True, dtype=torch.bfloat16)
    expected, _ = train(reference, InForward())
    losses, _ = train(model, StreamedForward(streamed_blocks(model), model, model.working_copy))
    assert losses == expected
    assert same(weights(model), weights(reference))


def test_all_points_of_a_step_share_one_pass(tmp_path: Path) -> None:
    saved = save(FAMILIES["llama"], tmp_path / "model")
    model = with_lora(streamed(saved, trains_weights=False))
    blocks = streamed_blocks(model)
    assert blocks is not None
    _, optimizer = train(model, StreamedForward(blocks, model), steps=5)
    assert optimizer.num_forwards == 30
    layers = [unit for unit in blocks.units if unit.is_block]
    assert len(layers) == 4
    # The first step's losses may be taken once more, to see whether they repeat.
    passes = {blocks.passes[unit.name] for unit in layers}
    assert passes in ({5}, {6})
    once = sum(unit.nbytes for unit in blocks.units)
    assert once == sum(p.nbytes for name, p in model.named_parameters() if not p.requires_grad)
    assert blocks.bytes_read == once * passes.pop()


def test_each_trained_block_is_written_once_per_step(tmp_path: Path) -> None:
    saved = save(FAMILIES["llama"], tmp_path / "model")
    model = streamed(saved, trains_weights=True)
    blocks = streamed_blocks(model)
    assert blocks is not None
    train(model, StreamedForward(blocks, model, model.working_copy), steps=5)
    headers = sum(unit.parts[0][1] for unit in blocks.units)
    assert model.working_copy.bytes_written == 4 * (blocks.nbytes + headers)  # the last update waits
    blocks.settle_all()
    assert model.working_copy.bytes_written == 5 * (blocks.nbytes + headers)


def test_an_exception_in_one_forward_ends_all(tmp_path: Path) -> None:
    saved = save(FAMILIES["untied"], tmp_path / "model")
    model = streamed(saved, trains_weights=True)
    perturb = StreamedForward(streamed_blocks(model), model, model.working_copy)
    _, optimizer = train(model, perturb, steps=1)
    loss, calls = closure(model), []

    def fails() -> Tensor:
        calls.append(1)
        value = loss()
        if len(calls) == 6:
            raise ValueError("stop here")
        return value

    with pytest.raises(ValueError, match="stop here"):
        optimizer.step(fails)
    assert optimizer.step(loss) == optimizer.last_estimate.loss


def test_an_interrupted_run_continues_with_the_files_it_left(tmp_path: Path) -> None:
    saved = save(FAMILIES["llama"], tmp_path / "model")
    reference = resident(saved)
    expected, _ = train(reference, InForward(), steps=4)
    model = streamed(saved, trains_weights=True)
    train(model, StreamedForward(streamed_blocks(model), model, model.working_copy), steps=3)
    model.working_copy.wait()
    resumed = streamed(saved, trains_weights=True)
    optimizer = ZerothOrder(
        resumed.named_parameters(),
        lr=1e-2,
        estimator="two_point(1e-2, 3)",
        perturb=StreamedForward(streamed_blocks(resumed), resumed, resumed.working_copy),
        weight_decay=0.01,
    )
    for losses in expected[:3]:
        optimizer.replay(losses)
    assert resumed.working_copy.bytes_written == 0
    optimizer.step(closure(resumed))
    assert optimizer.record() == expected[3]
    blocks = streamed_blocks(resumed)
    assert blocks is not None
    size = sum(unit.parts[0][2] for unit in blocks.units)
    assert resumed.working_copy.bytes_written == size  # one update, not three
    assert same(weights(resumed), weights(reference))


def test_files_of_another_run_are_left_alone(tmp_path: Path) -> None:
    saved = save(FAMILIES["llama"], tmp_path / "model")
    model = streamed(saved, trains_weights=True)
    train(model, StreamedForward(streamed_blocks(model), model, model.working_copy), steps=3, seed=5)
    streamed_blocks(model).settle_all()  # type: ignore[union-attr]
    model.working_copy.wait()
    reference = resident(saved)
    expected, _ = train(reference, InForward())
    second = streamed(saved, trains_weights=True)
    losses, _ = train(second, StreamedForward(streamed_blocks(second), second, second.working_copy))
    assert losses == expected
    assert same(weights(second), weights(reference))


def test_updates_that_wait_are_made_before_a_tensor_is_frozen(tmp_path: Path) -> None:
    saved = save(FAMILIES["llama"], tmp_path / "model")
    ends = []
    for model in (resident(saved), streamed(saved, trains_weights=True)):
        blocks = streamed_blocks(model)
        perturb = InForward() if blocks is None else StreamedForward(blocks, model, model.working_copy)
        _, optimizer = train(model, perturb, steps=2)
        dict(model.named_parameters())["model.layers.2.mlp.up_proj.weight"].requires_grad_(False)
        optimizer.step(closure(model))
        optimizer.step(closure(model))
        ends.append(weights(model))
    assert same(*ends)
