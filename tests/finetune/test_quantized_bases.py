"""Adapters on quantized bases: what is trained, journaled, saved and read again, and what is refused by name."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil

import peft
import pytest
import torch
from interrupted import interrupted_run, same, weights
from quantized import KINDS, declare, save_gguf, save_llama, save_packed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from zokernel.cli import main
from zokernel.errors import MissingDependencyError, UsageError
from zokernel.finetune import load_predictor
from zokernel.finetune.models.check import check_model
from zokernel.finetune.models.estimate import bytes_held
from zokernel.finetune.models.load import load_model, load_pretrained
from zokernel.finetune.models.quantized_model import count_parameters, describe_quantization
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.storage.replay import source_of
from zokernel.journal.hashes import quantized_sha256, stored_bits

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("torchao", reason="torchao is not installed")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

WORDS = {
    "4bit": "bitsandbytes 4 bit",
    "8bit": "bitsandbytes 8 bit",
    "int8": "torchao Int8WeightOnlyConfig",
    "int4": "torchao IntxWeightOnlyConfig",
}
FULL = ["--max_steps", "2", "--learning_rate", "1e-4", "--eval_strategy", "no", "--load_best_model_at_end", "false"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(base, tiny_reviews_path, tmp_path, monkeypatch):
    """A function that runs ``zokernel finetune`` on the base with further flags."""
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    flags = [
        *("--model_name_or_path", str(base), "--train_file", str(tiny_reviews_path / "train.jsonl")),
        *("--validation_file", str(tiny_reviews_path / "validation.jsonl"), "--label_words", "bad", "good"),
        *("--precision", "fp32", "--per_device_train_batch_size", "8", "--max_steps", "6", "--learning_rate", "1e-2"),
        *("--eval_steps", "3", "--max_eval_samples", "8"),
    ]
    return lambda folder, *extra: main(["finetune", *flags, "--output_dir", str(tmp_path / folder), *extra])


def flags_of(kind):
    return {flag.removeprefix("--"): value == "true" or value for flag, value in [KINDS[kind]]}


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]


def loaded(base, kind, **options):
    arguments = ModelArguments(model_name_or_path=str(base), **flags_of(kind), **options)
    return load_model(arguments, ZOConfig(output_dir="unused", precision="fp32", report_to="none", use_cpu=True))[0]


@pytest.mark.parametrize("kind", WORDS)
def test_quantized_weights_are_counted_as_the_numbers_they_stand_for(base, kind):
    model = loaded(base, kind, lora=True)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_parameters(model) - adapter == AutoModelForCausalLM.from_pretrained(base).num_parameters()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_resumed_saved_and_read_again(kind, base, run, tmp_path, monkeypatch, caplog):
    flags = ["--lora", "true", *KINDS[kind]]
    assert run("whole", *flags) == 0
    interrupted_run(run, monkeypatch, *flags, step=5)
    assert run("cut", *flags) == 0
    whole, cut = (weights(tmp_path / name) for name in ("whole", "cut"))
    assert same(whole, cut)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["base"]["quantization"] == WORDS[kind]

    # 'predict' quantizes the base as the run did; peft alone puts the adapter on the base in full precision.
    predictor = load_predictor(tmp_path / "whole")
    assert describe_quantization(predictor.model) == WORDS[kind]
    rows = ["a movie bad", "the good"]
    shares = [answer["scores"]["1"] for answer in predictor(rows)]
    full = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "whole").eval()
    predictor.model = full
    answers = [answer["scores"]["1"] for answer in predictor(rows)]
    assert 0 < max(abs(a - b) for a, b in zip(shares, answers, strict=True)) < 0.05

    # Journal and base rebuild the adapter; a base that is quantized otherwise does not continue the run.
    rebuilt, journal = tmp_path / "rebuilt", str(tmp_path / "whole" / "journal.zkj")
    best = json.loads((tmp_path / "whole" / "metrics.json").read_text())["best_step"]
    words = ["--base", str(base), "--journal", journal, "--step", str(best)]
    assert main(["replay", *words, "--output_dir", str(rebuilt)]) == 0
    with caplog.at_level(logging.WARNING, logger="zokernel"):
        reloaded = loaded(base, kind, adapter_name_or_path=str(tmp_path / "whole"))
    assert "its weights were different" not in caplog.text
    replayed = load_file(rebuilt / "adapter_model.safetensors")
    assert all(torch.equal(replayed[name], whole[name]) for name in whole)
    assert sum(p.requires_grad for p in reloaded.parameters()) == len(whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_the_size_of_the_weights(kind, dtype, base):
    arguments = ModelArguments(model_name_or_path=str(base), dtype=dtype, lora=True, **flags_of(kind))
    plan = check_model(arguments)
    model = load_pretrained(plan, arguments)
    held = sum(memoryview(bits).nbytes for p in model.parameters() for bits in stored_bits(p))
    for parameter in model.parameters():  # what bitsandbytes keeps beside its integers
        state = getattr(parameter, "quant_state", None)
        held += 0 if state is None else state.absmax.nbytes
        held += parameter.SCB.nbytes if getattr(parameter, "SCB", None) is not None else 0
    estimate = bytes_held(arguments, plan.path, plan.architecture, plan.dtype, plan.kind)
    assert estimate == held
    full = sum(p.numel() * p.element_size() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert estimate < 0.72 * full


ADAPTERS = {
    "dora": ["--lora", "true", "--use_dora", "true", "--lora_dropout", "0.1"],
    "rslora": ["--lora", "true", "--use_rslora", "true", "--lora_target_modules", "all-linear"],
    "saved": ["--lora", "true", "--modules_to_save", "norm"],
    "prompt": ["--prompt_tuning", "true", "--num_virtual_tokens", "3"],
    "prefix": ["--prefix_tuning", "true", "--num_virtual_tokens", "3"],
}
# All of them on 4 bits; on the others those that read the weights, and one that does not.
TRIED = [("4bit", name) for name in ADAPTERS] + [
    ("int8", "dora"),
    ("int8", "prompt"),
    ("int4", "dora"),
    ("8bit", "dora"),
]
TRIED += [("8bit", "rslora"), ("8bit", "prefix")]


@pytest.mark.parametrize(("kind", "name"), TRIED)
def test_every_adapter_trains(kind, name, run, tmp_path, capsys):
    adapter = ADAPTERS[name]
    if (kind, name) == ("8bit", "dora"):
        assert run("run", *adapter, *KINDS[kind]) == 2
        assert "peft loses the scales of bitsandbytes' 8 bits when DoRA reads the weights" in capsys.readouterr().err
        return
    assert run("run", *adapter, *KINDS[kind], "--max_steps", "2", "--eval_strategy", "no") == 0
    first_losses = losses(tmp_path / "run")
    assert first_losses[0] != first_losses[1]
    assert all(0.3 < loss < 1.5 for loss in first_losses)
    assert load_predictor(tmp_path / "run")(["the good"])[0]["prediction"] in (0, 1)


@pytest.mark.parametrize("kind", ["4bit", "int8"])
def test_losses_do_not_depend_on_the_way_of_perturbing(kind, run, tmp_path):
    by_perturb = {}
    for perturb in ("in_place", "in_place:grid", "in_place:copy", "in_forward", "stacked"):
        flags = ["--lora", "true", "--perturb", perturb, "--max_steps", "2", "--eval_strategy", "no"]
        assert run(perturb, *flags, *KINDS[kind]) == 0
        by_perturb[perturb] = losses(tmp_path / perturb)
    for actual in by_perturb.values():
        assert actual == pytest.approx(by_perturb["in_place:copy"], abs=2e-6)
    flags = ["--lora", "true", "--method", "grzo", "--max_steps", "2", "--eval_strategy", "no"]
    assert run("by-example", *flags, *KINDS[kind]) == 0  # directions for every example
    assert losses(tmp_path / "by-example")[0] == pytest.approx(by_perturb["stacked"][0], abs=0.02)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_the_stored_bytes_are_hashed_and_stay(kind, base, tmp_path):
    model = loaded(base, kind, lora=True)
    parameters = dict(model.named_parameters())
    before = quantized_sha256(parameters)
    assert len(before) == 64
    with torch.no_grad():
        model(torch.arange(12).view(2, 6))
    assert (
        quantized_sha256(parameters)
        == before
        == quantized_sha256(dict(loaded(base, kind, lora=True).named_parameters()))
    )
    integers = next(p for p in parameters.values() if type(p).__module__.startswith("bitsandbytes"))
    integers.data.view(-1)[0] += 1
    assert quantized_sha256(parameters) != before
    assert quantized_sha256({"w": torch.zeros(2)}) == ""


def test_another_quantization_does_not_continue_a_run(run, capsys):
    assert run("run", "--lora", "true", *KINDS["int8"]) == 0
    assert run("run", "--lora", "true", *KINDS["int4"]) == 2
    assert "quantization: torchao:int8 there, torchao:int4 asked for" in capsys.readouterr().err


def test_an_adapter_is_merged_into_the_base_in_full_precision(base, run, tmp_path, caplog):
    assert run("run", "--lora", "true", *KINDS["4bit"]) == 0
    with caplog.at_level(logging.INFO, logger="zokernel"):
        assert main(["merge", "--model", str(tmp_path / "run"), "--output_dir", str(tmp_path / "merged")]) == 0
    assert "trained on its base quantized (bitsandbytes 4 bit), and here the base is in full precision" in caplog.text
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not getattr(merged, "is_quantized", False)
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run").eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-4)


def test_packed_checkpoints_are_unpacked_and_train_in_full(base, run, tmp_path, caplog):
    packed, expected = save_packed(base, tmp_path / "packed")
    with caplog.at_level(logging.INFO, logger="zokernel"):
        assert run("lora", "--model_name_or_path", str(packed), "--lora", "true") == 0
    assert "is unpacked to float32 as it is loaded" in caplog.text
    predictor = load_predictor(tmp_path / "lora")
    for name, weight in predictor.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, expected[name.replace(".base_layer", "")]), name
    assert run("full", "--model_name_or_path", str(packed), *FULL) == 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert not getattr(saved, "is_quantized", False)
    trained = dict(saved.named_parameters())
    assert any(not torch.equal(trained[name], expected[name]) for name in expected)


def test_gguf_files_are_unpacked(base, run, tmp_path, caplog):
    folder = tmp_path / "gguf"
    folder.mkdir()
    file = save_gguf(base, folder / "tiny.gguf")
    with caplog.at_level(logging.INFO, logger="zokernel"):
        assert run("lora", "--model_name_or_path", str(file), "--lora", "true") == 0
    assert "tiny.gguf is unpacked as it is read: the model is held, trained and saved in full." in caplog.text
    original = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    predictor = load_predictor(tmp_path / "lora")
    for name, weight in predictor.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, original[name.replace(".base_layer", "")]), name
    assert predictor(["the good"])[0]["prediction"] in (0, 1)
    base_flags = ["--model_name_or_path", str(folder), "--gguf_file", "tiny.gguf"]
    assert run("full", *base_flags, *FULL) == 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert saved.num_parameters() == sum(p.numel() for p in original.values())
    words = ["--base", str(file), "--journal", str(tmp_path / "full" / "journal.zkj")]
    assert main(["replay", *words, "--output_dir", str(tmp_path / "rebuilt")]) == 0
    rebuilt = load_file(tmp_path / "rebuilt" / "model.safetensors")
    assert all(torch.equal(p, rebuilt[name]) for name, p in saved.named_parameters())
    assert any(not torch.equal(original[name], rebuilt[name]) for name in original)
    for options, message in [({"load_in_8bit": True}, "is quantized already"), ({"offload": "cpu"}, "not streamed")]:
        with pytest.raises(UsageError, match=message):  # before its weights are read
            check_model(ModelArguments(model_name_or_path=str(file), lora=True, **options))
    (folder / "optimizer.pt").write_bytes(b"no weights of this model")
    assert check_model(ModelArguments(model_name_or_path=str(file))).arguments.gguf_file == "tiny.gguf"
    continued = ["--model_name_or_path", str(tmp_path / "lora"), "--max_steps", "1"]
    assert run("more", *continued) == 0  # the adapter's folder knows the file


REFUSED = [
    ("load_in_4bit load_in_8bit", "--load_in_4bit and --load_in_8bit contradict each other: give one of them."),
    ("load_in_8bit quantization=torchao:int8", "--load_in_8bit and --quantization contradict each other"),
    ("quantization=int3", "--quantization must be one of torchao:int8, torchao:int4, not 'int3'"),
    ("load_in_4bit", "is quantized, so its weights cannot be perturbed: train an adapter with --lora true"),
    ("load_in_4bit lora merge_adapter", "'zokernel merge' adds the adapter to the base in full precision"),
    ("load_in_4bit lora offload=disk", "Quantized weights are not streamed: leave out --offload or --load_in_4bit."),
    ("load_in_4bit gguf_file=x.gguf", "A GGUF file is quantized already: leave out --load_in_4bit, or name a model"),
    ("gguf_file=x.gguf", "x.gguf: correct --gguf_file."),
    ("gguf_file=x.gguf offload=disk", "The weights of a GGUF file are unpacked as it is read, and not streamed"),
    ("train=all", "--train must be scales, or left out, not 'all'."),
    ("train=scales", "has no scales to train (it is not quantized)"),
    ("train=scales load_in_4bit", "--train scales trains the scales of torchao, and --load_in_4bit is bitsandbytes"),
    ("train=scales quantization=torchao:int8 lora", "--train scales trains nothing but scales"),
    ("train=scales quantization=torchao:int8 merge_adapter", "--merge_adapter would round the adapter away"),
]


@pytest.mark.parametrize(("setting", "message"), REFUSED, ids=[given for given, _ in REFUSED])
def test_refused_by_name(setting, message, base):
    pairs = (word.partition("=") for word in setting.split())
    flags = {name: value if sign else True for name, sign, value in pairs}
    with pytest.raises(UsageError, match=r"^[^\n]*$") as error:
        check_model(ModelArguments(model_name_or_path=str(base), **flags))
    assert message in str(error.value)


def test_an_unknown_quantization_is_no_quantization(base, tmp_path, caplog):
    folder = shutil.copytree(base, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mine", "bits": 3}
    (folder / "config.json").write_text(json.dumps(config))
    unknown, plain = (ModelArguments(model_name_or_path=str(place)) for place in (folder, base))
    models = [load_pretrained(check_model(arguments), arguments) for arguments in (unknown, plain)]
    assert caplog.text.count("a quantization that transformers does not know (mine): its weights are read as they") == 1
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


@pytest.mark.parametrize(
    ("package", "flags", "method", "command"),
    [
        ("bitsandbytes", {"load_in_4bit": True}, "", "pip install 'zokernel[quantized]'"),
        ("bitsandbytes", {}, "bitsandbytes", "pip install 'zokernel[quantized]'"),
        ("torchao", {"quantization": "torchao:int8"}, "", "pip install 'zokernel[quantized]'"),
        ("compressed_tensors", {}, "compressed-tensors", "pip install 'zokernel[quantized]'"),
        ("gptqmodel", {}, "gptq", "pip install gptqmodel optimum"),
        ("gptqmodel", {}, "awq", "pip install gptqmodel"),
        ("peft", {"load_in_4bit": True}, "", "pip install 'zokernel[finetune]'"),
    ],
)
def test_a_missing_library_is_named(package, flags, method, command, base, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(base, tmp_path / "model")
    if method:
        declare(folder, quant_method=method, bits=4, load_in_4bit=True, group_size=32)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value).lower())]
    data = ["--train_file", "unread.jsonl", "--label_words", "bad", "good", "--output_dir", str(tmp_path / "run")]
    assert main(["finetune", "--model_name_or_path", str(folder), "--lora", "true", *words, *data]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert package in error
    assert command in error


def test_what_reads_a_run_names_its_base_and_no_flag_where_a_library_is_missing(base, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    record = dict.fromkeys(("task", "max_length", "context", "calibrate", "max_new_tokens", "ends"))
    record |= {"load_in_4bit": True, "language_model": "causal", "precision": "fp32"}
    (tmp_path / "run" / "predictor.json").write_text(json.dumps(record))
    needs = "needs bitsandbytes, which is not installed"
    with pytest.raises(MissingDependencyError, match=rf"^run, whose base is quantized \(4bit\), {needs}"):
        load_predictor("run")
    with pytest.raises(MissingDependencyError, match=rf"/base.*, which the run quantized \(bitsandbytes\), {needs}"):
        source_of(str(base), {"quant_method": "bitsandbytes", "load_in_4bit": True})


def test_a_quantized_checkpoint_is_not_quantized_again(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    declare(folder, quant_method="gptq", bits=4, group_size=32)
    with pytest.raises(UsageError, match=r"is quantized already \(gptq\): leave out --load_in_8bit"):
        check_model(ModelArguments(model_name_or_path=str(folder), load_in_8bit=True, lora=True))
    declare(folder, quant_method="compressed-tensors")
    with pytest.raises(UsageError, match=r"\(compressed-tensors\), and quantized weights are not streamed"):
        check_model(ModelArguments(model_name_or_path=str(folder), offload="disk", lora=True))
    declare(folder, quant_method="bitsandbytes", load_in_8bit=True)
    with pytest.raises(UsageError, match=r"has no scales to train \(those of bitsandbytes are not trained\)"):
        check_model(ModelArguments(model_name_or_path=str(folder), train="scales"))


def test_gradients_that_do_not_pass_are_refused(base):
    arguments = ModelArguments(model_name_or_path=str(base), lora=True, quantization="torchao:int4")
    config = ZOConfig(output_dir="unused", method="adamw", report_to="none", use_cpu=True, precision="fp32")
    with pytest.raises(UsageError, match="choose a zeroth-order method"):
        load_model(arguments, config)
