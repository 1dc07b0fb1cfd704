"""Loading saved weights into a model in place: the same bits, a bounded amount at a time, never another model's."""

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from zokernel.errors import RunError
from zokernel.finetune.models import load as loading


class Odd(nn.Module):
    """Parameters of no, one and several dimensions, one without elements, and a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(()))
        self.bias = nn.Parameter(torch.randn(5))
        self.kernel = nn.Parameter(torch.randn(7, 3, 2))
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("count", torch.randint(9, (3,)))


@pytest.mark.parametrize("at_once", [1, 50, 1 << 24])
def test_weights_are_loaded_bit_for_bit_and_few_at_a_time(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(loading, "LOADED_AT_ONCE", at_once)
    saved, model = Odd(), Odd()
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    opened = []
    real = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *args: opened.append(args) or real(*args))
    loading.load_weights_(model, tmp_path)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    # Once for the names; then rows of 4, 24 and 8 bytes: 5, 7 and 3 of them, one, several or all at a time.
    parts = {1: 1 + 5 + 7 + 3, 50: 1 + 1 + 4 + 1, 1 << 24: 4}[at_once]
    assert len(opened) == 1 + parts


@pytest.mark.parametrize(("name", "shape"), [("bias", (1,)), ("bias", (1, 5)), ("scale", (1,)), ("weight", (5,))])
def test_another_models_weights_are_refused(tmp_path, name, shape):
    """Of a shape that broadcasts they would be copied without a word."""
    model = Odd()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_file({name: torch.ones(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match=f"{name}.*which this model does not have"):
        loading.load_weights_(model, tmp_path)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(RunError, match="holds no"):
        loading.load_weights_(Odd(), tmp_path)
