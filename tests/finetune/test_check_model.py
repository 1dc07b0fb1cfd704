"""Models that cannot be trained are refused in one sentence: damaged files, missing weights, wrong configurations."""

import json
import shutil

import pytest
import torch
import transformers as tf
from models import save_model
from safetensors.torch import load_file, save_file

from zokernel.errors import UsageError
from zokernel.finetune import ZOConfig, finetune
from zokernel.finetune.models.check import check_model
from zokernel.finetune.models.load import load_model
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d2\nsize 135219328\n"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("whole") / "llama", "llama")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def load(folder, **options):
    model = ModelArguments(model_name_or_path=str(folder), **options)
    return load_model(model, ZOConfig(output_dir="unused", use_cpu=True, precision="fp32"))


def change(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


def rewrite(folder, change_):
    weights = load_file(folder / "model.safetensors")
    change_(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder, length):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:length])


def remove(folder, *patterns):
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def index(folder):
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors")
    names[UP] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


# What is done to a whole model -> what is said before any weight is read.
BROKEN = {
    "pointer": (lambda f: (f / "model.safetensors").write_text(POINTER), "model.safetensors is a git-lfs pointer"),
    "pointer of the tokenizer": (lambda f: (f / "tokenizer.json").write_text(POINTER), "tokenizer.json is a git-lfs"),
    "half": (lambda f: cut(f, 9000), "9,000 bytes long, is damaged or cut off"),
    "half a header": (lambda f: cut(f, 100), "100 bytes long, is damaged or cut off"),
    "nothing in the file": (lambda f: cut(f, 0), "0 bytes long, is damaged or cut off"),
    "no weights": (lambda f: remove(f, "*.safetensors"), "holds no model.safetensors, so no weights"),
    "a shard short": (index, "lacks model-00002-of-00002.safetensors, which its index names .1 of 2 files"),
    "index": (
        lambda f: (remove(f, "*.safetensors"), (f / "model.safetensors.index.json").write_text("{}")),
        "does not",
    ),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "is a pickle"),
    "no configuration": (lambda f: remove(f, "config.json"), "holds weights, but no config.json"),
    "half a configuration": (
        lambda f: (f / "config.json").write_text('{"model_type": '),
        "config.json is not valid JSON",
    ),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "names no model_type"),
    "no type": (lambda f: (f / "config.json").write_text('{"hidden_size": 8}'), "names no model_type"),
    "unknown type": (lambda f: change(f, model_type="grok9"), "grok9"),
    "text for a number": (lambda f: change(f, hidden_size="big"), "hidden_size"),
    "heads that do not divide": (
        lambda f: change(f, num_attention_heads=7),
        "multiple of the number of attention heads",
    ),
    "code": (
        lambda f: change(f, model_type="own", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}),
        "brings code of its own, which is not run: read it, and pass --trust_remote_code true",
    ),
    "tokenizer only": (lambda f: remove(f, "*.safetensors", "config.json"), "holds a tokenizer, but no model"),
    "no tokenizer": (lambda f: remove(f, "*token*"), "The tokenizer of .* could not be loaded"),
    "half a tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"a": '),
        "The tokenizer of .* could not be loaded",
    ),
    "empty": (lambda f: remove(f, "*"), "is an empty folder"),
    "run without a result": (lambda f: (remove(f, "*"), (f / "checkpoint-20").mkdir()), "checkpoint-20 is the last"),
    "vision": (lambda f: change(f, model_type="vit"), "not language models"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_folder_is_refused_in_one_sentence(folder, damage, capsys):
    breaks, words = BROKEN[damage]
    check_model(ModelArguments(model_name_or_path=str(folder)))
    breaks(folder)
    with pytest.raises(UsageError, match=words) as error:
        check_model(ModelArguments(model_name_or_path=str(folder)))
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""  # transformers would ask whether to run code


def test_a_file_and_a_missing_folder_are_refused(folder):
    with pytest.raises(UsageError, match="is a file: give the folder"):
        check_model(ModelArguments(model_name_or_path=str(folder / "model.safetensors")))
    with pytest.raises(UsageError, match=r"There is no model folder .*nowhere"):
        check_model(ModelArguments(model_name_or_path=str(folder / "nowhere")))


def test_the_model_is_checked_before_the_data(folder, tmp_path):
    cut(folder, 100)
    data = DataArguments(train_file=str(tmp_path / "missing.jsonl"))
    with pytest.raises(UsageError, match="cut off"):
        finetune(ModelArguments(model_name_or_path=str(folder)), data, ZOConfig(output_dir=str(tmp_path / "run")))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    def spoil(weights):
        weights[UP][1, 2] = value

    rewrite(folder, spoil)
    with pytest.raises(UsageError, match=f"{UP}' of .* is NaN or infinite in 1 of 1,536 places"):
        load(folder)


def test_a_tensor_of_another_shape_and_a_missing_one_are_named(folder):
    rewrite(folder, lambda weights: weights.update({UP: weights[UP][:-1].clone()}))
    with pytest.raises(UsageError, match=rf"{UP}' in shape \(47, 32\), and its configuration asks for \(48, 32\)"):
        load(folder)
    rewrite(folder, lambda weights: weights.pop(UP))
    with pytest.raises(UsageError, match=f"lacks weights of LlamaForCausalLM, which would start at random .{UP}"):
        load(folder)


BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
HEADLESS = {
    "BertForSequenceClassification": (tf.BertConfig, "cls.predictions.bias, cls.predictions.decoder.bias"),
    "RobertaForTokenClassification": (tf.RobertaConfig, "lm_head.bias"),
    "LlamaModel": (tf.LlamaConfig, "lm_head.weight"),
    "LlamaForSequenceClassification": (tf.LlamaConfig, "lm_head.weight"),
}


@pytest.mark.parametrize("adapter", [{}, {"lora": True}], ids=["whole", "lora"])
@pytest.mark.parametrize("name", HEADLESS)
def test_a_checkpoint_without_its_head_is_refused(whole, tmp_path, name, adapter):
    config, words = HEADLESS[name]
    tokenizer = tf.AutoTokenizer.from_pretrained(whole)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(tmp_path)
    sizes = {**BERT, "vocab_size": len(tokenizer), "pad_token_id": 1}
    getattr(tf, name)(config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"which would start at random .{words}.* since it was saved as {name}"):
        load(tmp_path, **adapter)


def test_tied_heads_and_omitted_weights_are_not_refused(whole, tmp_path, caplog):
    assert "lm_head.weight" not in load_file(whole / "model.safetensors")
    load(whole)
    assert "left out" not in caplog.text
    tokenizer = tf.AutoTokenizer.from_pretrained(whole)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(tmp_path)
    config = tf.BertConfig(**BERT, vocab_size=len(tokenizer))
    saved = tf.BertForPreTraining(config)
    saved.save_pretrained(tmp_path)
    with caplog.at_level("INFO"):
        model, _ = load(tmp_path)
    assert type(model).__name__ == "BertForMaskedLM"
    assert "left out: bert.pooler.dense.bias, bert.pooler.dense.weight" in caplog.text
    assert torch.equal(model.cls.predictions.bias, saved.cls.predictions.bias)


def test_dtype_auto_is_what_was_saved(whole, tmp_path):
    for dtype in (torch.bfloat16, torch.float32):
        model = tf.AutoModelForCausalLM.from_pretrained(whole, dtype=dtype)
        model.save_pretrained(tmp_path)
        tf.AutoTokenizer.from_pretrained(whole).save_pretrained(tmp_path)
        loaded, _ = load(tmp_path, dtype="auto")
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert check_model(ModelArguments(model_name_or_path=str(tmp_path), dtype="auto")).dtype == dtype
    assert {p.dtype for p in load(tmp_path)[0].parameters()} == {torch.float32}
    with pytest.raises(UsageError, match="dtype must be one of float32, bfloat16, float16 or auto, not 'int8'"):
        load(tmp_path, dtype="int8")


def test_a_model_that_fills_masks_needs_a_mask_token(tmp_path):
    folder = save_model(tmp_path / "bert", "bert")
    assert check_model(ModelArguments(model_name_or_path=str(folder))).kind == "masked"
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            settings = json.loads((folder / name).read_text())
            settings.pop("mask_token", None)
            (folder / name).write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=r"fills masks, and its tokenizer has no mask token: save the tokenizer"):
        check_model(ModelArguments(model_name_or_path=str(folder)))


def test_the_ending_of_a_gguf_file_may_be_in_upper_case(tmp_path):
    with pytest.raises(UsageError, match=r"There is no GGUF file .*MODEL\.GGUF: correct --model_name_or_path"):
        check_model(ModelArguments(str(tmp_path / "MODEL.GGUF")))
