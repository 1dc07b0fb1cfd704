"""Tokenizers and embeddings that do not fit each other, and the memory of quantized bases."""

import json

import pytest
import torch
import transformers as tf
from models import save_model
from safetensors.torch import save_file

from zokernel.errors import UsageError
from zokernel.finetune import ZOConfig, finetune, get_task
from zokernel.finetune.models.estimate import QuantizedBytes, estimate_memory, quantized_bytes
from zokernel.finetune.models.vocabulary import check_token_ids, choose_pad_token
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.tasks.toy import toy_files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("vocabulary") / "llama", "llama")


@pytest.fixture
def parts(whole):
    return tf.AutoModelForCausalLM.from_pretrained(whole), tf.AutoTokenizer.from_pretrained(whole)


def train(folder, tmp_path, **task):
    data = DataArguments(**{"task": "sst2", **task}, **toy_files(tmp_path / "data", "sst2", get_task("sst2"), size=8))
    config = ZOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        precision="fp32",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    return finetune(ModelArguments(model_name_or_path=str(folder)), data, config)


def test_a_padding_token_beyond_the_embeddings_is_replaced(parts, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    model, tokenizer = parts
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with caplog.at_level("INFO"):
        expected = train(tmp_path / "model", tmp_path)["before"]
        assert "in place of" not in caplog.text
        tokenizer.add_special_tokens({"pad_token": "<new pad>"})
        assert tokenizer.pad_token_id == model.config.vocab_size
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "other").mkdir()
        metrics = train(tmp_path / "model", tmp_path / "other")["before"]
    rows = model.config.vocab_size
    assert f"'</s>' in place of '<new pad>', whose id {rows} is beyond the model's {rows} embeddings" in caplog.text
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_without_padding_and_end_any_token_pads(parts):
    model, tokenizer = parts
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.bos_token = None
    choose_pad_token(model, tokenizer)
    assert tokenizer.pad_token_id == 0


def test_label_words_without_an_embedding_are_refused_with_both_sizes(parts, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    model, tokenizer = parts
    rows = model.config.vocab_size
    tokenizer.add_tokens(["worst", "best"])
    check_token_ids(model, tokenizer, [[0, rows - 1], []])
    words = (
        f"The token 'best' has id {rows + 1}, and the model has {rows} embeddings where its tokenizer has {rows + 2}"
    )
    with pytest.raises(UsageError, match=words):
        check_token_ids(model, tokenizer, [[0, rows + 1], [rows]])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match=words):
        train(tmp_path / "model", tmp_path, label_words=["worst", "best"])


def test_a_quantized_base_is_counted_as_it_is_stored(tmp_path):
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    stored = {
        "packed": torch.zeros(1000, 1, dtype=torch.uint8),  # two weights of 4 bits each
        "packed.absmax": torch.zeros(30, dtype=torch.uint8),
        "embeddings": torch.zeros(50, 32, dtype=torch.bfloat16),
    }
    save_file(stored, tmp_path / "model.safetensors")
    assert quantized_bytes(str(tmp_path), config, torch.float32) is None
    config.quantization_config = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    assert quantized_bytes(str(tmp_path), config, torch.float32) == QuantizedBytes(1030 + 4 * 1600, 0)
    sizes = quantized_bytes(str(tmp_path), config, torch.bfloat16)
    assert sizes == QuantizedBytes(1030 + 2 * 1600, 0)
    run = ZOConfig(output_dir="unused", precision="fp32", use_cpu=True)
    assert estimate_memory(config, torch.bfloat16, run, adapter=True, stored=sizes.weights)["total"] == sizes.weights
