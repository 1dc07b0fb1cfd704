"""Values that no run can work with are named before data are read and before a model is loaded."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune import ZOConfig
from zokernel.finetune.settings.check import RULES, check_metric, check_values
from zokernel.finetune.settings.resolve import resolve

WRONG = [
    ("--eps", "0", "eps must be positive, not 0.0."),
    ("--eps", "-1e-3", "eps must be positive, not -0.001."),
    ("--eps", "nan", "eps must be positive, not nan."),
    ("--learning_rate", "-1", "learning_rate must be at least 0, not -1.0."),
    ("--learning_rate", "nan", "learning_rate must be at least 0, not nan."),
    ("--learning_rate", "inf", "learning_rate must be at least 0, not inf."),
    ("--num_perturbations", "0", "num_perturbations must be at least 1, not 0."),
    ("--momentum", "1", "momentum must be at least 0 and below 1, not 1.0."),
    ("--weight_decay", "-0.1", "weight_decay must be at least 0, not -0.1."),
    ("--max_steps", "0", "max_steps must be at least 1, or -1 for whole epochs, not 0."),
    ("--max_steps", "-5", "max_steps must be at least 1, or -1 for whole epochs, not -5."),
    ("--num_train_epochs", "0", "num_train_epochs must be positive, not 0.0."),
    ("--per_device_train_batch_size", "0", "per_device_train_batch_size must be at least 1, not 0."),
    ("--per_device_eval_batch_size", "-2", "per_device_eval_batch_size must be at least 1, not -2."),
    ("--gradient_accumulation_steps", "0", "gradient_accumulation_steps must be at least 1, not 0."),
    ("--warmup_steps", "-1", "warmup_steps must be at least 0, not -1"),
    ("--warmup_steps", "7", "warmup_steps 7 is longer than the run of 6 steps"),
    ("--warmup_steps", "2", "warmup_steps has no effect with a constant learning rate"),
    ("--lr_scheduler_type", "wavy", "lr_scheduler_type must be one of linear, cosine"),
    ("--seed", "-1", "seed must be a whole number from 0 to 4294967295, not -1."),
    ("--data_seed", "4294967296", "data_seed must be a whole number from 0 to 4294967295, not 4294967296."),
    ("--freeze_layers", "1.5", "freeze_layers must be at least 0 and below 1, not 1.5."),
    ("--zo_parallel", "tensor", "zo_parallel must be one of"),
    ("--zo_point_ranks", "2", "zo_point_ranks is for zo_parallel hybrid: add it, or leave both out."),
    ("--objective", "bleu", "objective must be one of cross_entropy, accuracy, f1, reward, not 'bleu'."),
    ("--logging_steps", "0", "logging_steps must be a number of steps from 1 on, or a share of the run below 1, not 0"),
    ("--eval_steps", "0", "eval_steps must be a number of steps from 1 on"),
    ("--eval_steps", "2.5", "eval_steps must be a number of steps from 1 on"),
    ("--eval_strategy", "often", "eval_strategy must be one of no, steps, epoch, not 'often'."),
    ("--save_strategy", "never", "save_strategy must be one of no, steps, epoch, best, journal, not 'never'."),
    ("--save_total_limit", "0", "save_total_limit must be at least 1, not 0."),
    ("--early_stopping_patience", "0", "early_stopping_patience must be at least 1, not 0."),
    ("--dataloader_num_workers", "-1", "dataloader_num_workers must be at least 0, not -1."),
    ("--dataloader_prefetch_factor", "2", "dataloader_prefetch_factor is for data that other processes load"),
    ("--report_to", "wandb", "report_to wandb needs a login"),
    ("--method_args", "eps=0", "eps must be positive"),
    ("--distribution", "cauchy", "no distribution 'cauchy' of directions"),
    ("--metric_for_best_model", "nonsense", "metric_for_best_model must be one of loss, accuracy, f1, not 'nonsense'."),
    ("--lora_r", "0", "lora_r must be at least 1, not 0."),
    ("--max_length", "0", "max_length must be at least 1, not 0."),
    ("--max_train_samples", "0", "max_train_samples must be at least 1, or -1 for all, not 0."),
    ("--num_demonstrations", "-1", "num_demonstrations must be at least 0, not -1."),
    ("--max_new_tokens", "0", "max_new_tokens must be at least 1, not 0."),
    ("--lr_scheduler_kwargs", "{half", "lr_scheduler_kwargs is not valid JSON (Expecting property name"),
]


@pytest.fixture
def nothing_is_read(monkeypatch):
    """Fail if data are read, or a model is looked at, before the mistake is named."""

    def too_late(*args, **kwargs):
        raise AssertionError("too late")

    for name in ("job.load_splits", "run.load_model"):
        monkeypatch.setattr(f"zokernel.finetune.{name}", too_late)
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["wandb"])
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("metric", "rest", "words"),
    [
        ("acuracy", "label_words: [a, b]", "'acuracy', and a classification task measures accuracy or f1: name one"),
        ("em", "label_words: [a, b]", "'em', and a classification task measures accuracy or f1"),
        ("f1", "choices: ['{a}', '{b}']", "'f1', and a choice task measures accuracy: name one of these."),
        ("accuracy", "label_column: a", "'accuracy', and a generation task measures f1 or em"),
    ],
)
def test_a_metric_that_is_not_measured_is_named(metric, rest, words, flags, nothing_is_read, tmp_path, capsys):
    (tmp_path / "task.yaml").write_text(f"template: '{{x}}'\nmetric: {metric}\n{rest}\n")
    task = ["--task_file", str(tmp_path / "task.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main(["finetune", *flags[:4], *task]) == 2
    assert f"The task's metric is {words}" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value", "words"), WRONG)
def test_a_wrong_value_is_named_before_anything_is_read(flag, value, words, flags, nothing_is_read, tmp_path, capsys):
    assert main(["finetune", *flags, flag, value]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_every_rule_is_of_a_setting():
    from dataclasses import fields

    from zokernel.finetune.settings.arguments import DataArguments, ModelArguments

    names = {f.name for cls in (ZOConfig, ModelArguments, DataArguments) for f in fields(cls)}
    assert set(RULES) - names <= {"lora_dropout"}


def test_defaults_and_sensible_values_pass(tmp_path):
    from zokernel.finetune.settings.arguments import DataArguments, ModelArguments

    check_values(DataArguments())
    check_values(ModelArguments())
    for values in (
        {},
        {"eval_steps": 0.1, "logging_steps": 0.5},
        {"warmup_steps": 0.1, "lr_scheduler_type": "linear"},
        {"warmup_steps": 3, "method": "auto"},
        {"max_steps": -1, "num_train_epochs": 0.5},
        {"learning_rate": 0.0},
        {"save_strategy": "journal", "eval_strategy": "no", "eval_steps": 0},
    ):
        config = ZOConfig(output_dir=str(tmp_path), **values)
        assert resolve(config, trained="full parameters", num_examples=10)


def test_numbers_of_numpy_become_pythons_own_and_tensors_are_named(tmp_path):
    """A number of numpy could not be written to the settings of the run."""
    from transformers import TrainingArguments

    from zokernel.finetune.settings.arguments import DataArguments
    from zokernel.finetune.settings.combine import add_zeroth_order

    values = {"eps": np.float32(0.5), "max_steps": np.int64(7), "seed": np.uint8(3), "freeze_vectors": np.True_}
    config = ZOConfig(output_dir=str(tmp_path), **values)
    assert [repr(getattr(config, name)) for name in values] == ["0.5", "7", "3", "True"]
    assert repr(ZOConfig(output_dir=str(tmp_path), method=np.str_("lozo")).method) == "'lozo'"
    settings = {"num_perturbations": np.int64(2), "learning_rate": np.float64(0.25)}
    combined = add_zeroth_order(TrainingArguments(str(tmp_path)), settings)
    assert [repr(getattr(combined, name)) for name in settings] == ["2", "0.25"]
    check_values(data := DataArguments(max_length=np.int32(9)))
    assert repr(data.max_length) == "9"
    with pytest.raises(UsageError, match=r"^eps is a tensor: pass eps\.item\(\)\.$"):
        ZOConfig(output_dir=str(tmp_path), eps=torch.tensor(0.5))
    with pytest.raises(UsageError, match=r"^momentum is a tensor: pass momentum\.item\(\)\.$"):
        add_zeroth_order(TrainingArguments(str(tmp_path)), {"momentum": torch.tensor(0.5)})


def test_a_login_lets_wandb_through(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["wandb"])
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UsageError, match="needs a login"):
        ZOConfig(output_dir=str(tmp_path), report_to="wandb")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert ZOConfig(output_dir=str(tmp_path), report_to="wandb").report_to == ["wandb"]
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(UsageError, match="needs a login"):
        ZOConfig(output_dir=str(tmp_path), report_to="wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert ZOConfig(output_dir=str(tmp_path), report_to=["wandb"]).report_to == ["wandb"]


def test_the_measures_of_a_task_may_choose_the_best_step():
    for name in ("loss", "eval_loss", "accuracy", "eval_f1", None):
        check_metric(name, ["accuracy", "f1"])
    with pytest.raises(UsageError, match="must be one of loss, f1, em, not 'accuracy'"):
        check_metric("accuracy", ["f1", "em"])
