"""Whole runs on chats, instructions and plain text: the loss falls, the report shows it, and a run continues."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from chats import PLAIN, chat_model, turns
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune import load_predictor


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """Folder of a tiny Llama whose tokenizer has no chat template."""
    return chat_model(tmp_path_factory.mktemp("chat-lm"), None, num_key_value_heads=2)


ROWS = {
    "chat.jsonl": [{"messages": turns(f"film {n}", "good good good")} for n in range(30)],
    "shared.jsonl": [
        {"conversations": [{"from": "human", "value": f"film {n}"}, {"from": "gpt", "value": "bad bad"}]}
        for n in range(30)
    ],
    "completion.jsonl": [{"prompt": f"film {n} was", "completion": " good good"} for n in range(30)],
    "alpaca.json": [{"instruction": "Judge.", "input": f"film {n}", "output": "good good"} for n in range(30)],
    "plain.txt": [f"film {n} was good and good" for n in range(30)],
}


def write(folder, name):
    rows = ROWS[name]
    if name.endswith(".txt"):
        text = "\n".join(rows)
    else:
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text)
    return folder / name


@pytest.fixture
def run(model_path, tmp_path, monkeypatch):
    """A function that trains on rows and returns the exit code."""
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))

    def train(name, *extra, out="run", template=True):
        chat = ("--chat_template", PLAIN) if template and ("chat" in name or "shared" in name) else ()
        flags = ["--model_name_or_path", str(model_path), "--train_file", str(write(tmp_path, name)), *chat]
        flags += ["--max_steps", "12", "--learning_rate", "3e-3", "--precision", "fp32", "--eval_steps", "6"]
        flags += ["--per_device_train_batch_size", "4", "--max_new_tokens", "4", "--num_perturbations", "4"]
        return main(["finetune", *flags, "--output_dir", str(tmp_path / out), *extra])

    return train


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_on_held_out_rows_falls_and_the_report_shows_it(run, tmp_path, name):
    assert run(name) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    before, after = metrics["before"], metrics["after"]
    assert after["loss"] < before["loss"] - 0.05
    for scores in (before, after):
        assert scores["perplexity"] == pytest.approx(torch.tensor(scores["loss"]).exp().item(), rel=1e-4)
    assert len(metrics["samples"]) == 3
    assert all(sample["before"] is not None and sample["prompt"] and sample["answer"] for sample in metrics["samples"])
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"from {before['perplexity']:.3f} to {after['perplexity']:.3f}" in report
    assert report.count("Before training:") == 3
    assert metrics["samples"][0]["answer"] in report
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000


def test_a_chat_template_is_saved_with_the_model(run, tmp_path):
    assert run("chat.jsonl", "--max_steps", "2") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == PLAIN


def test_an_adapter_keeps_its_chat_template_when_it_answers_is_merged_and_trained_on(run, tmp_path, capsys):
    adapter, merged, questions = tmp_path / "run", tmp_path / "merged", [{"messages": turns("film 3")}]
    assert run("chat.jsonl", "--max_steps", "2", "--lora", "true", "--learning_rate", "3e-2") == 0
    answers = load_predictor(adapter)(questions)
    assert load_predictor(adapter).tokenizer.chat_template == PLAIN
    assert answers[0]["prediction"] == plain_answer(adapter, "film 3")
    assert main(["merge", "--model", str(adapter), "--output_dir", str(merged)]) == 0
    assert AutoTokenizer.from_pretrained(merged).chat_template == PLAIN
    assert load_predictor(merged)(questions) == answers
    rows = tmp_path / "asked.jsonl"
    rows.write_text(json.dumps(questions[0]))
    capsys.readouterr()
    for model in (adapter, merged):
        assert main(["predict", "--model", str(model), "--file", str(rows)]) == 0
        assert json.loads(capsys.readouterr().out)["prediction"] == answers[0]["prediction"]
    extra = ["--model_name_or_path", str(adapter), "--max_steps", "2"]
    assert run("chat.jsonl", *extra, template=False, out="again") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == PLAIN
    (adapter / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match=r"Row 1: .* train with one .--chat_template of 'zokernel finetune'"):
        load_predictor(adapter)(questions)


def plain_answer(adapter, question):
    """Return what plain peft and transformers write after a question, in at most four tokens."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    ids = tokenizer.apply_chat_template(
        turns(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    new_ids = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(new_ids, skip_special_tokens=True).strip()


def test_chats_without_a_template_are_refused_by_the_flag_that_helps(run, capsys):
    assert run("chat.jsonl", template=False) == 2
    assert "--chat_template" in capsys.readouterr().err


def test_a_flag_of_chats_is_refused_for_labels(flags, capsys):
    assert main(["finetune", *flags, "--packing", "true"]) == 2
    assert "--packing is for chats, instructions and texts" in capsys.readouterr().err


def test_one_packed_row_is_singular(run, tmp_path, caplog):
    assert run("plain.txt", "--packing", "true", "--max_steps", "1", "--max_eval_samples", "1") == 0
    messages = [line.split(" of ")[0] for line in caplog.messages if line.startswith("Packing:")]
    assert messages == ["Packing: 29 texts in 1 row"]
    assert sum("; 1 validation row, " in line for line in caplog.messages) == 1


def test_packing_and_adapters_train_too(run, tmp_path):
    assert run("plain.txt", "--packing", "true", "--max_length", "120") == 0
    packed = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert packed["after"]["loss"] < packed["before"]["loss"] - 0.05
    assert run("chat.jsonl", "--lora", "true", "--perturb", "stacked", "--learning_rate", "3e-2", out="lora") == 0
    assert run("chat.jsonl", "--lora", "true", "--perturb", "in_place", "--learning_rate", "3e-2", out="place") == 0
    stacked, in_place = (json.loads((tmp_path / out / "metrics.json").read_text()) for out in ("lora", "place"))
    assert stacked["after"]["loss"] == pytest.approx(in_place["after"]["loss"], abs=1e-3)


def test_auto_never_takes_the_memory_of_several_copies_of_whole_chats(run, tmp_path):
    assert run("chat.jsonl", "--lora", "true", "--max_steps", "2", "--perturb", "auto") == 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    assert [s["value"] for s in settings if s["name"] == "perturb"] == ["in_place"]


def test_a_resumed_run_ends_with_the_same_bits_and_then_nothing_is_left_to_do(run, tmp_path, caplog):
    plan = ("--save_strategy", "steps", "--save_steps", "3", "--eval_steps", "3")
    assert run("chat.jsonl", *plan, out="whole") == 0
    assert run("chat.jsonl", *plan, "--max_steps", "6", out="parts") == 0
    assert run("chat.jsonl", *plan, "--resume_from_checkpoint", "last", out="parts") == 0
    whole, parts = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    caplog.clear()
    assert run("chat.jsonl", *plan, out="whole") == 0
    assert "nothing to do" in caplog.text


def test_an_evaluation_alone_reports_nothing_about_training(run, tmp_path):
    assert run("alpaca.json", "--do_train", "false") == 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert "Nothing was trained." in report
    assert "Written:" in report
    assert "After training" not in report


def test_the_best_step_has_the_lowest_perplexity(run, tmp_path):
    assert run("completion.jsonl", "--metric_for_best_model", "perplexity") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    best = min(metrics["evaluations"], key=lambda row: row["perplexity"])
    assert metrics["best_step"] == best["step"]
