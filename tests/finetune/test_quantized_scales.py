"""Trained scales of a quantized model: what changes, that transformers alone reads it again, and that runs continue."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from interrupted import interrupted_run, same, weights
from quantized import save_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune import ZOConfig, load_predictor
from zokernel.finetune.models.check import check_model
from zokernel.finetune.models.estimate import bytes_held
from zokernel.finetune.models.load import load_model
from zokernel.finetune.models.quantization_config import loading_options
from zokernel.finetune.models.scales import FACTORS_FILE, scaled_layers
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.journal.hashes import stored_bits
from zokernel.optim import QZO

pytest.importorskip("torchao", reason="torchao is not installed")

IDS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(base, tiny_reviews_path, tmp_path, monkeypatch):
    """A function that trains the scales of the base with further flags."""
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    flags = [
        *("--model_name_or_path", str(base), "--train_file", str(tiny_reviews_path / "train.jsonl")),
        *("--validation_file", str(tiny_reviews_path / "validation.jsonl"), "--label_words", "bad", "good"),
        *("--precision", "fp32", "--per_device_train_batch_size", "8", "--max_steps", "6", "--learning_rate", "1e-2"),
        *("--eval_steps", "3", "--train", "scales", "--max_eval_samples", "8"),
    ]
    return lambda folder, *extra: main(["finetune", *flags, "--output_dir", str(tmp_path / folder), *extra])


def loaded(folder, quantization=None, dtype="float32"):
    arguments = ModelArguments(model_name_or_path=str(folder), train="scales", quantization=quantization, dtype=dtype)
    config = ZOConfig(output_dir="unused", precision="fp32", report_to="none", use_cpu=True)
    return load_model(arguments, config)[0]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("quantization", ["torchao:int8", "torchao:int4"])
def test_only_scales_change_and_transformers_alone_reads_them(quantization, base, run, tmp_path):
    assert run("run", "--quantization", quantization, "--eval_strategy", "no", "--load_best_model_at_end", "false") == 0
    before, after = loaded(base, quantization), AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    factors = load_file(tmp_path / "run" / FACTORS_FILE)
    assert factors.keys() == scaled_layers(before).keys()
    changes = torch.cat([factor.flatten() for factor in factors.values()]) - 1
    assert 1e-4 < changes.std() < 0.2
    for name, layer in scaled_layers(before).items():
        stored, now = layer.weight, after.get_submodule(name).weight
        assert torch.equal(stored.qdata, now.qdata)
        assert torch.equal(stored.zero_point, now.zero_point)
        assert torch.equal(stored.scale * factors[name], now.scale)
    rest = {name: p for name, p in before.named_parameters() if not p.requires_grad and "_proj" not in name}
    assert len(rest) == 6
    assert all(torch.equal(p, dict(after.named_parameters())[name]) for name, p in rest.items())
    # The run's own model, its predictor, and a model whose scales are trained on all compute the same.
    with torch.no_grad():
        expected = after(IDS).logits
        assert torch.equal(load_predictor(tmp_path / "run").model(IDS).logits, expected)
        continued = loaded(tmp_path / "run")
        assert torch.equal(continued(IDS).logits, expected)
    assert all(bool((layer.scale == 1).all()) for layer in scaled_layers(continued).values())
    assert run("more", "--model_name_or_path", str(tmp_path / "run"), "--max_steps", "2") == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["torchao:int8", "torchao:int4"])
def test_factors_of_one_change_nothing_and_are_counted(quantization, dtype, base):
    arguments = ModelArguments(model_name_or_path=str(base), train="scales", quantization=quantization, dtype=dtype)
    plan = check_model(arguments)
    options = loading_options(arguments, plan.architecture, plan.dtype)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=plan.dtype, **options).eval()
    model = loaded(base, quantization, dtype)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    held = sum(memoryview(bits).nbytes for p in model.parameters() for bits in stored_bits(p))
    assert bytes_held(arguments, plan.path, plan.architecture, plan.dtype, plan.kind) == held
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{name}.scale" for name in scaled_layers(model)}


def test_a_factor_below_zero_counts_as_zero(base):
    model = loaded(base, "torchao:int8")
    layer = scaled_layers(model)["model.layers.0.mlp.up_proj"]
    with torch.no_grad():
        layer.scale[0], layer.scale[1] = -0.5, 2.0
        whole = layer.weight.dequantize()
        inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        outputs = layer(inputs)
    assert (outputs[:, 0] == 0).all()
    torch.testing.assert_close(outputs[:, 1], 2 * inputs @ whole[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[:, 2], inputs @ whole[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["best", "journal"])
def test_a_killed_run_continues_to_the_same_bits(strategy, base, run, tmp_path, monkeypatch):
    flags = ["--quantization", "torchao:int4", "--save_strategy", strategy, "--learning_rate", "3e-2"]
    assert run("whole", *flags) == 0
    interrupted_run(run, monkeypatch, *flags, step=5)
    assert run("cut", *flags) == 0
    whole, cut = (weights(tmp_path / name) for name in ("whole", "cut"))
    assert same(whole, cut)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    step = json.loads((tmp_path / "whole" / "metrics.json").read_text())["best_step"]
    words = ["--base", str(base), "--journal", str(tmp_path / "whole" / "journal.zkj"), "--step", str(step)]
    assert main(["replay", *words, "--output_dir", str(tmp_path / "rebuilt")]) == 0
    rebuilt = load_file(tmp_path / "rebuilt" / "model.safetensors")
    assert all(torch.equal(whole[name], rebuilt[name]) for name in whole)


def test_losses_do_not_depend_on_the_way_of_perturbing(run, tmp_path):
    by_perturb = {}
    for perturb in ("in_place", "in_place:grid", "in_place:copy", "in_forward"):
        flags = ["--perturb", perturb, "--max_steps", "2", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
        assert run(perturb, *flags, "--quantization", "torchao:int8") == 0
        by_perturb[perturb] = losses(tmp_path / perturb)
    for actual in by_perturb.values():
        assert actual == pytest.approx(by_perturb["in_place:copy"], abs=2e-6)


def test_the_loss_falls(base):
    """Scales that were changed are found again: the outputs of the changed model are the target."""
    model, other = loaded(base, "torchao:int8"), loaded(base, "torchao:int8")
    generator = torch.Generator().manual_seed(0)
    layers, changed = scaled_layers(model), scaled_layers(other)
    inputs = torch.randn(64, 64, generator=generator)
    name = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        changed[name].scale.add_(0.3 * torch.randn(96, 1, generator=generator))
        target = changed[name](inputs)
    optimizer = QZO([("scale", layers[name].scale)], lr=0.3, eps=1e-2, num_perturbations=4, clip_slope=2.0)
    loss = lambda: (layers[name](inputs) - target).square().sum(1).mean()  # noqa: E731
    before = loss().item()
    for _ in range(500):
        optimizer.step(loss)
    assert loss().item() < 1e-3 * before
    # The errors of the 96 scales fall together: the largest was 0.74 at first, 0.09 after 250 steps, 0.011 after 500.
    torch.testing.assert_close(layers[name].scale, changed[name].scale, atol=0.03, rtol=0)


def test_frozen_layers_keep_their_scales(run, tmp_path):
    flags = ["--quantization", "torchao:int8", "--max_steps", "1", "--eval_strategy", "no", "--freeze_layers", "0.5"]
    assert run("run", *flags, "--load_best_model_at_end", "false") == 0
    factors = load_file(tmp_path / "run" / FACTORS_FILE)
    assert all(bool((factor == 1).all()) == name.startswith("model.layers.0") for name, factor in factors.items())
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["method"] == "qzo"


def test_slopes_are_clipped(run, tmp_path):
    flags = ["--quantization", "torchao:int8", "--max_steps", "1", "--eval_strategy", "no", "--learning_rate", "1"]
    flags += ["--load_best_model_at_end", "false", "--distribution", "rademacher", "--method_args", "clip_slope=1e-4"]
    assert run("run", *flags, "--method", "qzo") == 0
    factors = load_file(tmp_path / "run" / FACTORS_FILE)
    for factor in factors.values():  # one step of the clipped slope along signs
        torch.testing.assert_close((factor - 1).abs(), torch.full_like(factor, 1e-4), atol=1e-7, rtol=1e-2)


@pytest.mark.parametrize("perturb", ["stacked", "per_example"])
def test_rows_with_their_own_scales_are_refused(perturb, run, capsys):
    assert run("run", "--quantization", "torchao:int8", "--perturb", perturb) == 2
    error = capsys.readouterr().err
    assert f"--perturb {perturb} gives rows of one batch weights of their own" in error


@pytest.mark.parametrize("method", [["grzo"], ["forward_difference", "--method_args", "per_example=true"]])
def test_examples_with_their_own_directions_are_refused(method, run, tmp_path, capsys):
    assert run("run", "--quantization", "torchao:int8", "--method", *method) == 2
    message = (
        f"{method[0]} gives every example directions of its own, which a quantized layer with trained scales has no"
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_gradients_of_scales_are_refused(base):
    arguments = ModelArguments(model_name_or_path=str(base), train="scales", quantization="torchao:int8")
    config = ZOConfig(output_dir="unused", method="adamw", report_to="none", use_cpu=True, precision="fp32")
    with pytest.raises(UsageError, match="choose a zeroth-order method"):
        load_model(arguments, config)


def test_the_files_of_equal_runs_are_equal(base, tmp_path):
    model = loaded(base, "torchao:int8")
    for name in ("one", "two", "three"):
        model.save_pretrained(tmp_path / name)
    files = {(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")}
    assert len(files) == 1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(IDS).logits, model(IDS).logits)


def test_predict_trains_nothing_and_the_card_names_torchao_and_the_clipping(run, tmp_path, caplog, capsys, monkeypatch):
    caplog.set_level("INFO", logger="zokernel")
    assert run("run", "--quantization", "torchao:int8", "--max_steps", "1", "--eval_strategy", "no") == 0
    assert "Trained: a factor on each of 896 scales of 14 layers, and nothing else." in caplog.messages
    card = (tmp_path / "run" / "README.md").read_text()
    assert "load without zokernel, too (they are quantized, which needs torchao: `pip install torchao`):" in card
    assert "clip_slope=100.0" in card
    (tmp_path / "rows.jsonl").write_text('{"sentence": "a movie bad"}\n')
    monkeypatch.chdir(tmp_path)
    caplog.clear()
    words = ["predict", "--model", "run", "--file", "rows.jsonl"]
    assert main(words) == 0
    assert "prediction" in capsys.readouterr().out
    assert "Model run: 81,280 parameters." in caplog.messages
    assert "rained" not in caplog.text
    # Without the library, the sentence begins with the folder as it is called.
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else real(name))
    assert main(words) == 1
    message = "error: run, which is quantized (torchao), needs torchao, which is not installed: pip install"
    assert message in capsys.readouterr().err


def test_rewards_say_why_the_members_of_a_step_are_not_stacked(base, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a movie {word}"}) + "\n" for word in ("bad", "good", "the", "a")))
    words = [
        "--model_name_or_path",
        str(base),
        "--quantization",
        "torchao:int8",
        "--train",
        "scales",
        "--max_steps",
        "1",
    ]
    words += ["--train_file", str(rows), "--validation_file", str(rows), "--objective", "reward", "--method", "es"]
    words += [
        "--reward_function",
        "length:2",
        "--max_new_tokens",
        "2",
        "--num_perturbations",
        "2",
        "--precision",
        "fp32",
    ]
    with caplog.at_level("INFO", logger="zokernel"):
        assert main(["finetune", *words, "--output_dir", str(tmp_path / "run")]) == 0
    message = "perturb: in_place, one member after the other (rows of one batch cannot have scales of their own)."
    assert message in caplog.messages
