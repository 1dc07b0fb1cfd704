"""Which layers are quantized while a model is loaded: the estimate beforehand is what is held afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import save_model
from quantized import KINDS, save_llama
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune.models.check import check_model
from zokernel.finetune.models.estimate import bytes_held, estimate_memory
from zokernel.finetune.models.load import load_pretrained
from zokernel.finetune.models.memory_setups import list_setups, measure
from zokernel.finetune.models.quantized_layers import quantized_layers
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.finetune.settings.config import ZOConfig
from zokernel.journal.hashes import stored_bits

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("torchao", reason="torchao is not installed")

MAPS = Path("/proc/self/maps")


def model_arguments(folder, kind, **options):
    flags = {flag.removeprefix("--"): value == "true" or value for flag, value in [KINDS[kind]]}
    return ModelArguments(model_name_or_path=str(folder), **flags, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with layers of other kinds than linear ones, or that are kept in full precision."""
    paths = {family: save_model(tmp_path_factory.mktemp(family), family) for family in ("gpt2", "t5")}
    paths["mixtral"] = save_llama(tmp_path_factory.mktemp("mixtral"))
    config = json.loads((paths["mixtral"] / "config.json").read_text())
    sizes = {name: config[name] for name in ("vocab_size", "num_hidden_layers", "num_key_value_heads", "pad_token_id")}
    moe = MixtralConfig(**sizes, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_local_experts=4)
    MixtralForCausalLM(moe).save_pretrained(paths["mixtral"])
    return paths


def held_by(model):
    """Return the bytes of a quantized model's weights, with what bitsandbytes keeps beside its integers."""
    held = 0
    for parameter in model.parameters():
        held += sum(memoryview(bits).nbytes for bits in stored_bits(parameter))
        state = getattr(parameter, "quant_state", None)
        held += 0 if state is None else state.absmax.nbytes
        held += parameter.SCB.nbytes if getattr(parameter, "SCB", None) is not None else 0
    return held


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gpt2", "4bit"), ("gpt2", "8bit"), ("t5", "4bit"), ("t5", "8bit"), ("t5", "int8"), ("t5", "int4")]
    + [("mixtral", kind) for kind in KINDS],
)
def test_the_estimate_knows_which_layers_are_quantized(family, kind, folders):
    arguments = model_arguments(folders[family], kind, lora=True)
    plan = check_model(arguments)
    model = load_pretrained(plan, arguments)
    estimate = bytes_held(arguments, plan.path, plan.architecture, plan.dtype, plan.kind)
    assert estimate == held_by(model)
    sizes = measure(plan.architecture, plan.dtype, kind=plan.kind)
    held = {way.flags: way.weights for way in list_setups(sizes, losses=2, rows=1, tokens=8)}
    assert held[" ".join(["--lora", "true", *KINDS[kind]])] == held_by(model)
    assert any("torchao" in flags for flags in held) == (family != "gpt2")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantization_without_effect_is_refused(kind, folders):
    with pytest.raises(UsageError, match=r"^--quantization would quantize nothing: .* no linear layers besides"):
        check_model(model_arguments(folders["gpt2"], kind, lora=True))


def test_experts_are_reported_as_unquantized_and_counted_in_full(folders, caplog):
    caplog.set_level("INFO", logger="zokernel")
    arguments = model_arguments(folders["mixtral"], "4bit", lora=True)
    plan = check_model(arguments)
    model = load_pretrained(plan, arguments)
    experts = {name: p for name, p in model.named_parameters() if "experts" in name}
    assert {p.dtype for p in experts.values()} == {torch.float32}
    whole = sum(p.numel() for p in MixtralForCausalLM(plan.architecture).parameters())
    share = 100 * sum(p.numel() for p in experts.values()) / whole
    layers = "mlp.experts.gate_up_proj, mlp.experts.down_proj"
    assert f"{layers}, {share:.0f} % of the model, are not linear layers and stay in float32." in caplog.text


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists what is mapped")
@pytest.mark.parametrize("kind", KINDS)
def test_the_files_do_not_stay_mapped(kind, folders):
    arguments = model_arguments(folders["t5"], kind, lora=True)
    model = load_pretrained(check_model(arguments), arguments)
    assert str(folders["t5"]) not in MAPS.read_text()
    plain = load_pretrained(check_model(ModelArguments(model_name_or_path=str(folders["t5"]))), ModelArguments())
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", ["4bit", "int8"])
def test_a_quantized_model_is_scored_without_an_adapter(
    kind, folders, tiny_reviews_path, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    file, folder = tiny_reviews_path / "validation.jsonl", folders["t5"]
    words = ["--train_file", str(file), "--validation_file", str(file), "--label_words", "bad", "good"]
    words += ["--model_name_or_path", str(folder), "--precision", "fp32", *KINDS[kind], "--max_steps", "1"]
    assert main(["finetune", *words, "--output_dir", str(tmp_path / "scored"), "--do_train", "false"]) == 0
    assert "trained." not in capsys.readouterr().err
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "other home"))  # knows no scores yet
    adapter = ["--lora", "true", "--learning_rate", "1e-3"]  # starts as the base
    assert main(["finetune", *words, *adapter, "--output_dir", str(tmp_path / "run")]) == 0
    scored, run = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("scored", "run"))
    assert scored["before"]["loss"] == pytest.approx(run["before"]["loss"], rel=1e-5)


@pytest.mark.parametrize("count", [quantized_layers, measure, estimate_memory])
def test_a_configuration_that_describes_no_model_is_refused_by_every_count(count):
    config = LlamaConfig(hidden_size=8, intermediate_size=-5, num_attention_heads=1, num_hidden_layers=1)
    arguments = {
        quantized_layers: ("causal", "4bit"),
        measure: (torch.float32,),
        estimate_memory: (torch.float32, ZOConfig(output_dir="unused", use_cpu=True)),
    }
    with pytest.raises(UsageError, match="The configuration of this llama describes no model that can be built"):
        count(config, *arguments[count])
