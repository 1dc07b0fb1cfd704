"""Loading saved weights into a model in place: the same bits, a bounded amount at a time, never another model's."""

import pytest
import safetensors
import torch
import transformers as tf
import transformers.modeling_utils  # it takes safe_open now, before a test replaces it
from safetensors.torch import save_file
from torch import nn

from zokernel.errors import RunError
from zokernel.finetune.models import weights as loading
from zokernel.private_apis import converts_weights


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


MOE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
RENAMED = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**MOE, num_key_value_heads=2, num_local_experts=3)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**MOE, num_key_value_heads=2, num_experts=3, moe_intermediate_size=8, num_experts_per_tok=2)
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**MOE)),
    "granitemoe": lambda: tf.GraniteMoeForCausalLM(
        tf.GraniteMoeConfig(**MOE, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)
    ),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**MOE, num_key_value_heads=2, num_experts=3)),
    "esm": lambda: tf.EsmForMaskedLM(tf.EsmConfig(**MOE, pad_token_id=1, mask_token_id=2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", RENAMED)
def test_weights_under_other_names_in_files_are_loaded_bit_for_bit(tmp_path, family, dtype):
    """transformers stacks experts and renames heads when it loads, and undoes that when it saves."""
    torch.manual_seed(0)
    model = RENAMED[family]().to(dtype)
    assert converts_weights(model)
    model.save_pretrained(tmp_path)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as archive:
        assert not set(archive.keys()) <= set(saved)
    for reloaded in (False, True):
        if reloaded:
            model = type(model).from_pretrained(tmp_path, dtype=dtype)
        addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        loading.load_weights_(model, tmp_path)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
        assert addresses == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_another_models_weights_are_refused_where_names_differ(tmp_path):
    RENAMED["mixtral"]().save_pretrained(tmp_path)
    with pytest.raises(RunError, match="could not be read as the weights of this OlmoeForCausalLM"):
        loading.load_weights_(RENAMED["olmoe"](), tmp_path)
