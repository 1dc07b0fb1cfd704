"""Settings that contradict each other, are empty or cannot be honoured are named before anything is loaded."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune import ZOConfig
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.settings.check import check_values
from zokernel.finetune.settings.flag_files import read_yaml
from zokernel.finetune.settings.record import RunSettings, keep_recorded
from zokernel.finetune.settings.resolve import resolve


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fsdp", "full_shard"], "--fsdp full_shard cannot be honoured here"),
        (["--deepspeed", "ds.json"], "--deepspeed ds.json cannot be honoured here"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor 0.1 cannot be honoured here (the loss is"),
        (["--max_grad_norm", "0.5"], "--max_grad_norm 0.5 cannot be honoured here (there is no gradient to clip)"),
        (
            ["--adam_beta1", "0.8", "--adam_beta2", "0.99", "--max_grad_norm", "2"],
            "--adam_beta1 0.8, --adam_beta2 0.99, --max_grad_norm 2.0 cannot be honoured here (the optimizer is chosen "
            "by method, and its options by method_args; there is no gradient to clip): leave them out.",
        ),
        (["--optim", "adamw_torch_fused"], "--optim adamw_torch_fused cannot be honoured here"),
        (["--adam_beta1", "0.9"], "--adam_beta1 0.9 cannot be honoured here"),
        (["--do_predict", "true"], "--do_predict true cannot be honoured here"),
        (["--gradient_checkpointing", "true"], "--gradient_checkpointing true cannot be honoured here"),
        (["--activation_checkpointing", "true"], "--activation_checkpointing true cannot be honoured here"),
        (["--seed", "3", "4"], "The argument '4' after --seed has no meaning here"),
        (["--lora", "maybe"], "argument --lora: 'maybe' is not true or false"),
        (["--template", ""], "template is empty"),
        (["--dataloader_drop_last", "true", "--per_device_train_batch_size", "65"], "64 training examples are fewer"),
        # Flags that a task with a prompt would ignore.
        (["--assistant_only_loss", "false"], "--assistant_only_loss is for chats"),
        (["--completion_only_loss", "false"], "--completion_only_loss is for chats"),
        (["--max_new_tokens", "7"], "--max_new_tokens is for answers that are written"),
        (["--k_shot", "8"], "--k_shot is for --protocol mezo-roberta"),
        (["--max_train_samples", "8", "--protocol", "mezo-roberta"], "--max_train_samples has no effect with"),
        # The same flags at their defaults.
        (["--max_new_tokens", "50"], "--max_new_tokens is for answers that are written"),
        (["--k_shot", "16"], "--k_shot is for --protocol mezo-roberta"),
        (["--max_train_samples", "1000", "--protocol", "mezo-roberta"], "--max_train_samples has no effect with"),
        (["--num_generations", "1"], "--num_generations is for --objective reward"),
        (["--model_revision", "main"], "--model_revision is for models of the hub"),
        (["--perturb", "auto", "--method", "adamw"], "--perturb auto cannot be honoured here"),
        (["--model_revision", "v2"], "--model_revision is for models of the hub"),
        (["--template", "{sentence} It was {mask}"], "it needs a masked language model"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_a_model_is_loaded(words, message, flags, capsys, monkeypatch):
    monkeypatch.setattr("zokernel.finetune.run.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert main(["finetune", *flags, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_bound_on_gradients_at_its_default_serves_both_kinds_of_methods(flags, caplog):
    message = "max_grad_norm 1.0 has no effect on mezo: there is no gradient to clip."
    for method, times in (("mezo", 1), ("sgd", 0)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="zokernel"):
            method_flags = ["--method", method, "--max_grad_norm", "1.0", "--max_steps", "1"]
            assert main(["finetune", *flags, *method_flags, "--overwrite_output_dir", "true"]) == 0
        assert caplog.messages.count(message) == times


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmethod: mezo\nseed: 2\n", "sets 'seed' twice, on lines 1 and 3"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}\n", "sets 'a' twice, on lines 1 and 1"),
        ("template: ''\n", "leaves 'template' empty"),
        ("label_words: []\n", "leaves 'label_words' empty"),
    ],
)
def test_a_file_of_flags_with_a_key_twice_or_empty_is_refused(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_yaml(path)


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


def test_report_to_all_logs_its_choice(caplog, monkeypatch):
    monkeypatch.setattr(
        "transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard", "mlflow"]
    )
    from zokernel.finetune.settings.config import check_reporting

    with caplog.at_level(logging.INFO):
        check_reporting("all")
    assert caplog.messages == ["report_to all: tensorboard, mlflow."]


def test_max_steps_overrides_epochs_as_in_transformers_and_is_logged_once(flags, tmp_path, caplog):
    for n, (words, count) in enumerate([(["--num_train_epochs", "0.1"], 1), ([], 0)]):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert main(["finetune", *flags, *words, "--output_dir", str(tmp_path / str(n))]) == 0
        assert caplog.text.count("num_train_epochs 0.1 is ignored") == count
        assert json.loads((tmp_path / str(n) / "metrics.json").read_text())["steps"] == 6


def eps(trained, **options):
    setting = resolve(ZOConfig(output_dir="unused", **options), trained=trained, num_examples=100).setting("eps")
    return setting.value, setting.source


def test_the_default_eps_of_lora_is_a_hundredth(caplog):
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


def test_null_in_a_file_is_logged_and_leaves_the_default(flags, tmp_path, caplog):
    (tmp_path / "run.yaml").write_text("eps:\nseed: ~\n")
    with caplog.at_level(logging.INFO):
        assert main(["finetune", *flags, "--config", str(tmp_path / "run.yaml")]) == 0
    for name in ("eps", "seed"):
        assert f"{tmp_path / 'run.yaml'} sets {name} to null, so its default is used." in caplog.messages
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["seed"], metrics["method_options"]["eps"]) == (42, 0.001)


def test_a_file_of_flags_does_not_bypass_the_checks(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("zokernel.finetune.run.load_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "run.yaml").write_text("k_shot: 16\n")
    assert main(["finetune", *flags, "--config", str(tmp_path / "run.yaml")]) == 2
    assert "--k_shot is for --protocol mezo-roberta" in capsys.readouterr().err


def test_flags_that_are_off_may_be_set_to_off(flags, tmp_path):
    off_flags = [
        "--calibrate",
        "false",
        "--num_demonstrations",
        "0",
        "--temperature",
        "0",
        "--beta",
        "0",
        "--packing",
        "false",
    ]
    assert main(["finetune", *flags, *off_flags, "--max_steps", "1"]) == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": "hello"}] * 9, "Column 'messages' holds no messages"),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 9
            + [{"messages": [{"role": "usr", "content": "a"}]}],
            "line 10: A message in 'messages' has the role 'usr': did you mean 'user'?",
        ),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {"text": "c"}],
            "line 2: this row has 'text', and those before it have",
        ),
        ([{"text": str(n), "label": n % 25} for n in range(100)], "holds 25 classes by number: name them with --label"),
    ],
)
def test_rows_that_are_not_what_they_seem_are_named(rows, message, flags, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = flags.index("--label_words")
    words = ["--train_file", str(tmp_path / "rows.jsonl"), "--chat_template", "chatml"]
    words = words[: 4 if "messages" in rows[0] else 2]
    first = flags[: flags.index("--train_file")]
    assert main(["finetune", *first, *words, *flags[index + 3 :]]) == 2
    assert message in capsys.readouterr().err


def test_a_table_without_a_header_is_distinguished_from_one_without_a_label(flags, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("a very long and tiring film,0\nbright,1\ndull,0\n")
    first, index = flags[: flags.index("--train_file")], flags.index("--label_words")
    assert main(["finetune", *first, "--train_file", str(tmp_path / "rows.csv"), *flags[index:]]) == 2
    assert "name them with --column_names text label" in capsys.readouterr().err


def test_a_trained_run_is_not_called_zero_shot_and_its_adapter_names_the_base_once(flags, tmp_path, caplog, capsys):
    with caplog.at_level(logging.INFO):
        assert main(["finetune", *flags, "--lora", "true"]) == 0
    assert "Zero-shot accuracy on 24 test examples" in caplog.text
    assert caplog.text.count("names the base by its local folder") == 1
    caplog.clear()
    model = ["--model_name_or_path", str(tmp_path / "run"), "--output_dir", str(tmp_path / "scored")]
    with caplog.at_level(logging.INFO):
        assert main(["finetune", *flags, *model, "--do_train", "false"]) == 0
    assert "Already-trained accuracy on 24 test examples" in caplog.text
    assert "ero-shot" not in caplog.text + capsys.readouterr().out.split("already-trained")[-1]
    assert "names the base" not in caplog.text


def test_weights_that_are_all_zero_or_belong_to_no_layer_are_reported(flags, tiny_lm_path, tmp_path, caplog):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_lm_path, broken)
    weights = load_file(broken / "model.safetensors")
    zero = "model.layers.0.mlp.up_proj.weight"
    weights |= {zero: torch.zeros_like(weights[zero]), "model.layers.0.extra.weight": torch.ones(2, 2)}
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for model, count in ((broken, 1), (tiny_lm_path, 0)):
        caplog.clear()
        words = ["--model_name_or_path", str(model), "--lora", "true", "--max_steps", "1"]
        with caplog.at_level(logging.WARNING):
            assert main(["finetune", *flags, *words, "--output_dir", str(tmp_path / f"run-{count}")]) == 0
        assert caplog.text.count("are all zero (") == count
        assert caplog.text.count("which are left out: model.layers.0.extra.weight") == count
        assert "lora_B" not in caplog.text
