"""Settings that contradict each other, are empty or cannot be honoured are named before anything is loaded."""

from __future__ import annotations

import json
import logging

import pytest

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune import ZOConfig
from zokernel.finetune.settings.arguments import DataArguments, read_yaml
from zokernel.finetune.settings.check import check_values
from zokernel.finetune.settings.record import RunSettings, keep_recorded
from zokernel.finetune.settings.resolve import resolve


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--fsdp", "full_shard"], "fsdp='full_shard' has no effect here"),
        (["--deepspeed", "ds.json"], "deepspeed='ds.json' has no effect here"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor=0.1 has no effect here (the loss is"),
        (["--do_predict", "true"], "do_predict=True has no effect here"),
        (["--gradient_checkpointing", "true"], "gradient_checkpointing=True has no effect here"),
        (["--activation_checkpointing", "true"], "activation_checkpointing=True has no effect here"),
        (["--num_train_epochs", "2"], "max_steps 6 and num_train_epochs 2 both say how long the run is"),
        (["--seed", "3", "4"], "The argument '4' after --seed has no meaning here"),
        (["--lora", "maybe"], "argument --lora: 'maybe' is not true or false"),
        (["--template", ""], "template is empty"),
        (["--dataloader_drop_last", "true", "--per_device_train_batch_size", "65"], "64 training examples are fewer"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_a_model_is_loaded(words, told, flags, capsys, monkeypatch):
    monkeypatch.setattr("zokernel.finetune.job.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert main(["finetune", *flags, *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\nmethod: mezo\nseed: 2\n", "sets 'seed' twice, on lines 1 and 3"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}\n", "sets 'a' twice, on lines 1 and 1"),
        ("eps:\n", "leaves 'eps' empty"),
        ("eps: null\n", "leaves 'eps' empty"),
        ("template: ''\n", "leaves 'template' empty"),
        ("label_words: []\n", "leaves 'label_words' empty"),
        ("seed: ~\n", "leaves 'seed' empty"),
    ],
)
def test_a_file_of_flags_with_a_key_twice_or_empty_is_refused(text, told, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_yaml(path)
    assert told in str(error.value)


def test_null_takes_back_what_an_extended_file_sets_and_means_none_where_none_is_a_value(tmp_path):
    (tmp_path / "base.yaml").write_text("eps: 0.01\nseed: 3\n")
    path = tmp_path / "run.yaml"
    path.write_text("extends: base\neps: null\nmax_train_samples: null\nsave_total_limit: null\n")
    assert read_yaml(path) == {"eps": None, "seed": 3, "max_train_samples": None, "save_total_limit": None}


@pytest.mark.parametrize("text", ["template: '{a}'\ntemplate: '{b}'\n", "template: '{a} It'\nlabel_words:\n"])
def test_a_task_file_with_a_key_twice_or_empty_is_refused(text, tmp_path, flags, capsys):
    (tmp_path / "task.yaml").write_text(text)
    assert main(["finetune", *flags, "--task_file", str(tmp_path / "task.yaml")]) == 2
    assert ("sets 'template' twice" if text.count("template") == 2 else "leaves 'label_words' empty") in (
        capsys.readouterr().err
    )


def test_values_that_are_empty_are_no_values():
    for arguments in (DataArguments(template=""), DataArguments(label_words=[])):
        with pytest.raises(UsageError, match="is empty: give it a value"):
            check_values(arguments)


def test_report_to_all_says_what_it_chose(caplog, monkeypatch):
    monkeypatch.setattr(
        "transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard", "mlflow"]
    )
    from zokernel.finetune.settings.config import check_reporting

    with caplog.at_level(logging.INFO):
        check_reporting("all")
    assert caplog.messages == ["report_to all: tensorboard, mlflow."]


def eps(trained, **given):
    setting = resolve(ZOConfig(output_dir="unused", **given), trained=trained, num_examples=100).setting("eps")
    return setting.value, setting.source


def test_eps_of_lora_is_a_hundredth_where_nobody_gave_one(caplog):
    with caplog.at_level(logging.INFO):
        assert eps("LoRA") == eps("LoRA", method="kerzoo") == (0.01, "default")
    assert caplog.messages.count("eps: 0.01, the default for LoRA.") == 2
    assert eps("full parameters") == eps("virtual tokens") == (0.001, "default")
    assert eps("LoRA", eps=2e-3) == (0.002, "user")
    assert eps("LoRA", method_args=["eps=3e-3"]) == (0.003, "user")
    assert eps("LoRA", method="fzoo") == (0.0001, "default")
    assert eps("LoRA", method="adamw")[0] is None


def test_a_run_that_began_with_another_default_keeps_its_eps(flags, tmp_path):
    lora = [*flags, "--lora", "true"]
    assert main(["finetune", *lora, "--eps", "1e-3"]) == 0
    folder = tmp_path / "run"
    record = json.loads((folder / "settings.json").read_text())
    next(row for row in record["settings"] if row["name"] == "eps")["source"] = "default"
    (folder / "settings.json").write_text(json.dumps(record))
    resolved: RunSettings = resolve(ZOConfig(output_dir=str(folder)), trained="LoRA", num_examples=64)
    assert keep_recorded(resolved, folder)["eps"] == 0.001
    assert main(["finetune", *lora, "--max_steps", "8", "--resume_from_checkpoint", "last"]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["steps"], metrics["method_options"]["eps"]) == (8, 0.001)
    assert main(["finetune", *lora, "--overwrite_output_dir", "true"]) == 0
    assert json.loads((folder / "metrics.json").read_text())["method_options"]["eps"] == 0.01
