"""Logs and reports of runs on rewards: rewards in place of losses, and a warning about empty answers."""

from __future__ import annotations

import json
import re

import pytest
from chats import chat_tokenizer, turns

from zokernel.cli import main
from zokernel.commands.report import read
from zokernel.finetune.rewards.prompts import describe_empty_answers

CURE = "give rows of messages"
NUMBER = r"(-?[\d.]+)"


@pytest.fixture
def flags(reward_flags):
    return ["finetune", *reward_flags, "--max_steps", "4", "--eval_steps", "2", "--logging_steps", "2"]


def silent(folder, chat_model_path):
    """Copy a model, of which every token ends an answer."""
    folder.mkdir()
    for file in chat_model_path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = list(range(len(chat_tokenizer())))
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_log_and_table_speak_of_rewards(flags, tmp_path, capsys, caplog, beta):
    caplog.set_level("INFO", logger="zokernel")
    assert main([*flags, "--beta", str(beta)]) == 0
    goal = "reward less penalty" if beta else "reward"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    lines = [message for message in caplog.messages if message.startswith("step ")]
    assert not [line for line in lines if "loss" in line]
    held_out = {row["step"]: row for row in metrics["evaluations"]}
    logged = {int(s): float(v) for s, v in re.findall(rf"step (\d+): validation {goal} {NUMBER}", "\n".join(lines))}
    assert logged == {step: pytest.approx(-row["loss"], abs=6e-4) for step, row in held_out.items()}
    assert ("KL divergence" in lines[0]) == bool(beta)
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    trained = {int(s): float(v) for s, v in re.findall(rf"step (\d+): {goal} {NUMBER}", "\n".join(lines))}
    assert set(trained) == {2, 4}
    for step, value in trained.items():  # the mean over the steps since the last line
        assert value == pytest.approx(-sum(row["loss"] for row in steps[step - 2 : step]) / 2, abs=6e-4)
    change = next(float(re.search(r"\((\S+) ±", line)[1]) for line in lines if "since the start" in line)
    assert change == pytest.approx(held_out[0]["loss"] - held_out[2]["loss"], abs=6e-4 + 0.06 * abs(change))
    table = capsys.readouterr().out
    before, after = metrics["before"]["loss"], metrics["after"]["loss"]
    row = re.search(rf"^{goal} before -> after +{NUMBER} -> {NUMBER}", table, re.MULTILINE)
    assert [float(number) for number in row.groups()] == pytest.approx([-before, -after], abs=6e-4)
    assert not re.search(r"^loss", table, re.MULTILINE)


def test_reports_show_rewards_and_the_columns_of_rows(flags, tmp_path):
    assert main([*flags, "--learning_rate", "1e-9"]) == 0  # which changes no answer: the start is the best
    report = (tmp_path / "run" / "report.md").read_text()
    assert len(re.findall(r"In the data:\n\n    level: \d+\n    review: so so\n", report)) == 3
    assert "better validation reward than the model had before" in report
    assert "Dots: the reward of each training batch" in report
    page = read(tmp_path / "run")
    assert page.facts[0][0] == "reward"
    assert "loss" not in [name for name, _ in page.facts]
    assert "were empty" not in report + " ".join(page.summary)


def test_a_run_that_did_not_learn_says_what_its_loss_is(flags, tmp_path, caplog):
    caplog.set_level("INFO", logger="zokernel")
    assert main([*flags, "--learning_rate", "1e-9", "--max_steps", "20", "--eval_steps", "10"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["diagnosis"]["verdict"] != "learned"
    assert metrics["diagnosis"]["outcome"].endswith("(The loss is minus the reward.)")
    summary = next(message for message in caplog.messages if message.startswith("No evaluation was better"))
    assert f"(reward {metrics['before']['reward']:.4g})" in summary


def test_a_model_that_writes_nothing_is_noticed_before_training(flags, chat_model_path, tmp_path, caplog, capsys):
    caplog.set_level("INFO", logger="zokernel")
    extra = [
        "--model_name_or_path",
        silent(tmp_path / "silent", chat_model_path),
        "--max_steps",
        "20",
        "--lora",
        "true",
    ]
    assert main([*flags, *extra]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["before"]["empty_answers"] == 1.0
    count = metrics["num_test"]
    warnings = [record for record in caplog.records if "were empty before training" in record.getMessage()]
    sentence = warnings[0].getMessage()
    assert sentence.startswith(f"{count} of the answers to {count} held-out prompts were empty")
    assert CURE in sentence
    assert warnings[0].levelname == "WARNING"
    first = next(n for n, message in enumerate(caplog.messages) if message.startswith("step "))
    assert caplog.records.index(warnings[0]) < first
    # Equal losses have a reason then, which is not eps.
    assert metrics["diagnosis"]["reasons"] == [sentence]
    assert (tmp_path / "run" / "report.md").read_text().count(sentence) == 1
    page = read(tmp_path / "run")
    assert [section.items for section in page.sections if section.anchor == "reasons"] == [[sentence]]
    assert sentence not in page.summary


def test_reports_of_short_runs_and_of_evaluations_mention_empty_answers_too(flags, chat_model_path, tmp_path):
    silent_flags = ["--model_name_or_path", silent(tmp_path / "silent", chat_model_path)]
    for name, extra in (("short", ["--max_steps", "2"]), ("none", ["--do_train", "false"])):
        out = tmp_path / name
        assert main([*flags, *silent_flags, *extra, "--output_dir", str(out)]) == 0
        assert (out / "report.md").read_text().count(CURE) == 1
        assert CURE in read(out).summary[0]


def test_the_cure_is_messages_only_where_a_template_takes_them():
    texts, chats = [{"prompt": "a"}] * 4, [{"prompt": turns("a")}] * 4
    assert describe_empty_answers(0.25, texts, chat_tokenizer()) == ""
    assert CURE in describe_empty_answers(0.5, texts, chat_tokenizer())
    assert describe_empty_answers(0.5, texts, chat_tokenizer()).startswith("2 of the answers to 4 held-out prompts")
    for rows, template in ((texts, None), (chats, chat_tokenizer().chat_template)):
        advice = describe_empty_answers(1.0, rows, chat_tokenizer(template))
        assert CURE not in advice
        assert "word them such that an answer follows" in advice
