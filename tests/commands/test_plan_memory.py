"""``zokernel plan --memory``: the ways that a model has, and flags that would change nothing."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from quantized import KINDS, declare, save_gguf, save_llama, save_packed
from safetensors.torch import save_file
from transformers import AutoTokenizer

from zokernel.cli import main
from zokernel.finetune.models import estimate
from zokernel.finetune.models.check import check_model
from zokernel.finetune.models.estimate import QuantizedBytes, bytes_held, check_memory, quantized_bytes
from zokernel.finetune.models.load import load_pretrained
from zokernel.finetune.models.memory_report import read_configuration
from zokernel.finetune.models.quantized_layers import quantized_layers
from zokernel.finetune.models.scales import train_scales_
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.finetune.settings.config import ZOConfig
from zokernel.readable import readable_bytes

ADAPTER = ["--lora true --perturb stacked", "--lora true"]
HEAD = "80,384 parameters in float32, 2 losses per step of 1 row of 128 tokens."
IN_MEMORY = ["--perturb in_place", "--perturb in_forward", *ADAPTER]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def table(capsys):
    """A function that returns the table of a model: what follows the flags of each way, by these."""

    def of(model, *flags, expected=()):
        assert main(["plan", "--memory", "true", "--model_name_or_path", str(model), *flags]) == 0
        out = capsys.readouterr().out
        assert all(line in out.splitlines() for line in expected)
        lines = out.split("\n\n")[1].splitlines()
        start = lines[0].index("trained")
        return {line[:start].strip(): line[start:].split() for line in lines[1:]}

    return of


def test_unpacked_files_are_neither_quantized_again_nor_streamed(base, table, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    plain = table(base)
    assert {"--offload disk", "--lora true --load_in_4bit true"} < set(plain)
    for model in (save_gguf(base, tmp_path / "tiny.gguf"), save_packed(base, tmp_path / "packed")[0]):
        assert table(model) == {flags: plain[flags] for flags in IN_MEMORY}


def test_a_checkpoint_that_stays_quantized_takes_what_its_files_hold(base, table, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    arguments = ModelArguments(model_name_or_path=str(base), lora=True, quantization=KINDS["int8"][1])
    model = load_pretrained(check_model(arguments), arguments)
    model.save_pretrained(tmp_path / "int8")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "int8")
    setups = table(tmp_path / "int8")
    assert list(setups) == [*ADAPTER, "--train scales"]
    held = sum(len(part.untyped_storage()) for part in parts_of(model))
    assert all(setups[flags][2:4] == readable_bytes(held).split() for flags in ADAPTER)
    scales = ModelArguments(model_name_or_path=str(tmp_path / "int8"), train="scales")
    trained = train_scales_(load_pretrained(check_model(scales), scales))
    factors = sum(4 * p.numel() for p in trained.parameters() if p.requires_grad)
    assert factors == 4 * sum(
        rows for rows, _ in quantized_layers(model.config, "causal", "torchao:int8").shapes.values()
    )
    assert setups["--train scales"][1:3] == readable_bytes(held + factors).split()
    whole = read_configuration(scales)
    assert whole.stored == QuantizedBytes(held, factors)
    assert bytes_held(scales, str(tmp_path / "int8"), whole.architecture, whole.dtype, "causal") == held + factors
    declare(tmp_path / "int8", quant_method="torchao")  # a configuration alone tells no size
    assert list(table(tmp_path / "int8" / "config.json")) == [*ADAPTER, "--train scales"]


def test_the_headers_of_a_quantized_checkpoint_are_read_once(base, table, tmp_path, monkeypatch):
    folder = shutil.copytree(base, tmp_path / "int8")
    stored = {
        "model.layers.0.self_attn.q_proj._weight_qdata": torch.zeros(64, 64, dtype=torch.int8),
        "model.layers.0.self_attn.q_proj._weight_scale": torch.ones(64, 1),
        "model.norm.weight": torch.ones(64),
    }
    save_file(stored, folder / "model.safetensors")
    declare(folder, quant_method="torchao")
    read, real = [], estimate.tensor_types
    monkeypatch.setattr(estimate, "tensor_types", lambda files: read.append(files) or real(files))
    setups = table(folder)
    held = 64 * 64 + 4 * 64 + 4 * 64
    assert read == [[folder / "model.safetensors"]]
    assert setups["--lora true"][2:4] == readable_bytes(held).split()
    assert setups["--train scales"][1:3] == readable_bytes(held + 4 * 64).split()


def test_weights_of_unknown_size_are_reported_as_unknown(base, table, tmp_path, monkeypatch, caplog):
    shutil.copy(base / "config.json", tmp_path)
    declare(tmp_path, quant_method="torchao")
    answer = "unknown, as the size of the weights is."
    lines = [f"Fastest that fits for {what}: {answer}" for what in ("an adapter", "scales")]
    setups = table(tmp_path / "config.json", expected=lines)
    assert [row[-1] for row in setups.values()] == ["unknown"] * 3
    assert all(row.count("unknown") == 3 for row in setups.values()), "weights, memory, and whether they fit"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"The size of the quantized weights is unknown ({tmp_path} holds no model.safetensors")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    assert [row[-1] for row in table(tmp_path / "config.json").values()] == ["no"] * 3
    architecture = read_configuration(ModelArguments(model_name_or_path=str(tmp_path / "config.json"))).architecture
    config = ZOConfig(output_dir="unused", precision="fp32", use_cpu=True)
    caplog.set_level("INFO", logger="zokernel")
    check_memory(architecture, torch.float32, config, adapter=True, stored=estimate.UNKNOWN)
    assert caplog.messages[-1].startswith("Memory: at least 0 B (weights of unknown size) and activations")
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    assert quantized_bytes(str(tmp_path), architecture, torch.float32) == QuantizedBytes()
    monkeypatch.setattr(estimate, "tensor_types", lambda files: {}["a mistake"])
    with pytest.raises(KeyError, match="a mistake"):
        quantized_bytes(str(tmp_path), architecture, torch.float32)


def parts_of(model):
    for parameter in model.parameters():
        stored = parameter.data
        names = stored.__tensor_flatten__()[0] if hasattr(stored, "__tensor_flatten__") else []
        yield from [getattr(stored, name) for name in names] or [stored]


def test_the_table_of_an_adapter_folder_lists_ways_to_train_it_further(base, table, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig())
    adapted.save_pretrained(tmp_path / "lora")
    plain = table(base)
    new = {flags.removeprefix("--lora true").strip(): row for flags, row in plain.items() if "an" in row[:1]}
    assert {"--perturb stacked", "", "--load_in_4bit true", "--offload disk"} < set(new)
    setups = table(tmp_path / "lora")
    assert setups.pop("--perturb in_place") == new.pop("")
    assert setups == new
    record = {"settings": {"load_in_4bit": True, "quantization": None}}
    (tmp_path / "lora" / "run.json").write_text(json.dumps(record))
    advice = "The adapter was trained with --load_in_4bit true: repeat it, or the base is held in full precision."
    assert list(table(tmp_path / "lora", expected=[advice])) == [
        "--perturb stacked",
        "--perturb in_place",
        *list(new)[1:],
    ]
    tokens = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), tokens).save_pretrained(tmp_path / "tokens")
    assert list(table(tmp_path / "tokens")) == ["--perturb in_place", *list(new)[1:]]


def test_a_run_that_streams_the_base_of_an_adapter_lists_ways_to_train_it_further(base, flags, tmp_path, caplog):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    caplog.set_level("INFO", logger="zokernel")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig())
    adapted.save_pretrained(tmp_path / "lora")
    streamed = ["--model_name_or_path", str(tmp_path / "lora"), "--offload", "disk", "--max_steps", "1"]
    assert main(["finetune", *flags, *streamed]) == 0
    listing = next(message for message in caplog.messages if message.startswith("Memory of each setup"))
    setups = [line.partition("  ")[0] for line in listing.split("\n\n")[1].splitlines()[1:]]
    assert {"--perturb stacked", "--perturb in_place", "--offload disk"} <= set(setups)
    assert not [flags for flags in setups if "--lora" in flags]


def test_the_table_accepts_a_batch_of_one_row_and_refuses_an_empty_one(base, table, capsys):
    assert table(base, "--update_examples", "1", expected=[HEAD])
    words = ["plan", "--model_name_or_path", str(base), "--update_examples"]
    assert main([*words, "0", "--memory", "true"]) == 2
    assert "--update_examples must be at least 1, not 0." in capsys.readouterr().err
    assert main([*words, "1"]) == 2
    assert "A plan needs --update_examples of at least 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--load_in_4bit", "true"], "--load_in_4bit would"),
        (["--quantization=torchao:int3", "--offload", "nvme"], "--quantization and --offload would"),
        (["--train_file", "none.jsonl", "--output_file", "x.json"], "--train_file and --output_file would"),
        (["--num-probes", "3"], "--num_probes would"),
    ],
)
def test_flags_without_effect_are_refused(flags, names, base, capsys):
    assert main(["plan", "--memory", "true", "--model_name_or_path", str(base), *flags]) == 2
    assert f"{names} change nothing" in capsys.readouterr().err
