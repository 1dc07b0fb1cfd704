"""Every family of models streams to the same bits as in memory, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import CAUSAL, FAMILIES, MASKED, save_model
from torch import Tensor

from zokernel.errors import UsageError
from zokernel.finetune.models.streamed import StreamingOptions, load_streamed
from zokernel.offload import StreamedForward, streamed_blocks
from zokernel.optim import ZerothOrder
from zokernel.perturb import InForward

CLASSES: dict[str, Any] = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
}


def kind_of(family: str) -> str:
    return "causal" if family in CAUSAL else "masked" if family in MASKED else "seq2seq"


def streamed(folder: Path, kind: str) -> Any:
    return load_streamed(
        transformers.AutoConfig.from_pretrained(folder),
        folder,
        torch.float32,
        StreamingOptions(folder.parent / "copy", trains_weights=True),
        kind=kind,
        name="the model",
    )


def train(model: Any, perturb: Any) -> tuple[list[float], dict[str, Tensor]]:
    ids = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(2))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = ZerothOrder(trained, lr=1e-2, estimator="two_point(1e-2, 2)", perturb=perturb)
    losses = []
    for _ in range(3):
        optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
        losses += optimizer.record()
    return losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_streams_to_the_same_bits(family: str, tmp_path: Path) -> None:
    folder, kind = save_model(tmp_path / "model", family), kind_of(family)
    resident = CLASSES[kind].from_pretrained(folder).eval()
    losses, weights = train(resident, InForward())
    model = streamed(folder, kind)
    actual, trained = train(model, StreamedForward(streamed_blocks(model), model, model.working_copy))
    assert actual == losses
    assert trained.keys() == weights.keys()
    assert [name for name in trained if not torch.equal(trained[name], weights[name])] == []


def test_experts_that_are_stored_one_by_one_stream_to_the_same_bits(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    resident = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "model").eval()
    losses, weights = train(resident, InForward())
    model = streamed(tmp_path / "model", "causal")
    actual, trained = train(model, StreamedForward(streamed_blocks(model), model, model.working_copy))
    assert actual == losses
    assert trained.keys() == weights.keys()
    assert [name for name in trained if not torch.equal(trained[name], weights[name])] == []
    model.save_pretrained(tmp_path / "trained")
    reloaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "trained")
    assert [name for name, tensor in reloaded.state_dict().items() if not torch.equal(trained[name], tensor)] == []
    assert not (tmp_path / "copy" / "converted").exists()


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = save_model(tmp_path / "model", "gpt2") / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "h.1.mlp.c_fc.weight" not in k}, file, {"format": "pt"})
    with pytest.raises(UsageError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight"):
        streamed(tmp_path / "model", "causal")


def test_buffers_are_those_that_transformers_takes_from_the_files(tmp_path: Path) -> None:
    """Old files hold what models compute themselves now, and integers where models have floats."""
    from safetensors.torch import load_file, save_file

    stored = {
        "bert": {"bert.embeddings.position_ids": torch.arange(16).flip(0)[None].contiguous()},
        "bart": {"final_logits_bias": torch.arange(309, dtype=torch.int32)[None]},
    }
    for family, buffers in stored.items():
        folder, kind = save_model(tmp_path / family, family), kind_of(family)
        file = folder / "model.safetensors"
        save_file(load_file(file) | buffers, file, {"format": "pt"})
        resident = dict(CLASSES[kind].from_pretrained(folder).named_buffers())
        actual = dict(streamed(folder, kind).named_buffers())
        assert actual.keys() == resident.keys()
        assert [key for key in actual if not torch.equal(actual[key], resident[key])] == []
    assert actual["final_logits_bias"].tolist() == [list(range(309))]


def test_a_buffer_of_another_shape_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = save_model(tmp_path / "model", "bart") / "model.safetensors"
    save_file(load_file(file) | {"final_logits_bias": torch.zeros(1, 1)}, file, {"format": "pt"})
    with pytest.raises(UsageError, match=r"'final_logits_bias' in shape \(1, 1\)"):
        streamed(tmp_path / "model", "seq2seq")
