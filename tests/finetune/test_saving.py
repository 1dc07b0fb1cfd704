"""When a run evaluates and saves: a strategy given alone works, what follows is said, and what contradicts is named."""

from __future__ import annotations

import json

import pytest

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune import Collator, ZOConfig, ZOTrainer
from zokernel.finetune.settings.combine import add_zeroth_order

ALONE = {
    "no": (
        ["--save_strategy", "no"],
        "save_strategy='no' keeps no step to go back to, so the run ends with its last weights, not",
    ),
    "epoch": (["--save_strategy", "epoch"], "save_strategy='epoch' lets each epoch be evaluated, too"),
    "steps": (
        ["--save_strategy", "steps"],
        "save_strategy='steps' saves a checkpoint at each evaluation: save_steps=1.",
    ),
    "no evaluation": (
        ["--eval_strategy", "no", "--save_strategy", "journal"],
        "eval_strategy='no' evaluates no step, so",
    ),
    "no evaluation alone": (["--eval_strategy", "no"], "Without evaluations no step is known as the best: save_strat"),
}


def make(tmp_path, **settings):
    return ZOConfig(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("method", ["mezo", "adamw"])
def test_a_strategy_given_alone_works(name, method, flags, tmp_path, caplog):
    words, message = ALONE[name]
    if name == "no evaluation" and method == "adamw":
        words = ["--eval_strategy", "no", "--save_strategy", "epoch"]
    assert main(["finetune", *flags, "--method", method, *words]) == 0
    assert sum(line.startswith(message) for line in caplog.messages) == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    steps = [row["step"] for row in metrics["evaluations"]]
    if name == "epoch":  # four steps of 16 examples are an epoch of 64
        assert [step for step in steps if step] == [4, 6]
    if name.startswith("no"):
        assert metrics["best_step"] == 6
        assert not (tmp_path / "run" / "checkpoint-0").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("steps", None, 500, True)),
        ({"save_strategy": "no"}, ("steps", None, 500, False)),
        ({"save_strategy": "epoch"}, ("epoch", None, 500, True)),
        ({"save_strategy": "epoch", "eval_steps": 10}, ("steps", 10, 500, False)),
        ({"save_strategy": "epoch", "load_best_model_at_end": False}, ("steps", None, 500, False)),
        ({"save_strategy": "steps"}, ("steps", None, 200, True)),
        ({"save_strategy": "steps", "eval_steps": 50}, ("steps", 50, 50, True)),
        ({"save_strategy": "steps", "eval_steps": 0.1}, ("steps", 0.1, 0.1, True)),
        ({"save_strategy": "steps", "save_steps": 400}, ("steps", None, 400, True)),
        ({"save_strategy": "steps", "save_steps": 300}, ("steps", 300, 300, True)),
        ({"save_strategy": "steps", "save_steps": 30, "eval_steps": 20}, ("steps", 20, 30, False)),
        ({"save_strategy": "steps", "load_best_model_at_end": False}, ("steps", None, 500, False)),
        ({"save_strategy": "journal", "eval_strategy": "no"}, ("no", None, 500, False)),
        ({"eval_strategy": "no"}, ("no", None, 500, False)),
    ],
)
def test_what_follows_from_what_is_given(settings, expected, tmp_path):
    config = make(tmp_path, **settings)
    strategy = getattr(config.eval_strategy, "value", config.eval_strategy)
    assert (strategy, config.eval_steps, config.save_steps, config.load_best_model_at_end) == expected


def test_without_evaluations_a_run_saves_what_it_can_continue_from(tmp_path):
    saved = [make(tmp_path, eval_strategy=e, method=m).save_strategy for e in ("no", "steps") for m in ("mezo", "sgd")]
    assert [getattr(strategy, "value", strategy) for strategy in saved] == ["journal", "steps", "best", "best"]


DERIVED = {
    "nothing": ({}, {}),
    "epoch": ({"save_strategy": "epoch"}, {"eval_strategy": "epoch"}),
    "steps": ({"save_strategy": "steps", "eval_steps": 50}, {"save_steps": 50}),
    "far apart": ({"save_strategy": "steps", "save_steps": 300}, {"eval_steps": 300}),
    "no saving": ({"save_strategy": "no"}, {"load_best_model_at_end": False}),
    "no evaluation": ({"eval_strategy": "no"}, {"save_strategy": "journal", "load_best_model_at_end": False}),
}


@pytest.mark.parametrize("name", DERIVED)
def test_auto_decides_what_follows_from_other_settings(name, parts, tmp_path):
    given, derived = DERIVED[name]
    model, tokenizer, data = parts
    config = make(tmp_path, max_steps=600, disable_tqdm=True, report_to="none", **given)
    trainer = ZOTrainer(
        model,
        config,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    names = ("eval_strategy", "eval_steps", "save_strategy", "save_steps", "load_best_model_at_end")
    settings = {name: trainer.settings.setting(name) for name in names}
    assert {name: s.value for name, s in settings.items() if s.source == "auto"} == derived
    assert {name for name, s in settings.items() if s.source == "user"} == given.keys()


def test_the_table_and_the_record_say_what_auto_decided(flags, tmp_path, caplog):
    assert main(["finetune", *flags, "--save_strategy", "steps"]) == 0
    rows = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    assert {"name": "save_steps", "value": 1, "source": "auto"} in rows
    assert any(line.split() == ["save_steps", "1", "auto"] for line in caplog.text.splitlines())


def test_without_a_data_set_to_evaluate_auto_decides_against_it(parts, tmp_path):
    model, tokenizer, data = parts
    collator = Collator(tokenizer.pad_token_id)
    trainer = ZOTrainer(model, make(tmp_path), train_dataset=data["train"], data_collator=collator)
    names = ("eval_strategy", "save_strategy", "load_best_model_at_end")
    settings = [trainer.settings.setting(name) for name in names]
    assert [(s.value, s.source) for s in settings] == [("no", "auto"), ("steps", "auto"), (False, "auto")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"save_strategy": "no"},
            "save_strategy='no' keeps no step to go back to, so .* set save_strategy='journal', or",
        ),
        (
            {"save_strategy": "epoch", "eval_strategy": "steps"},
            "save_strategy='epoch' does not save the steps that eval_strategy='steps' .* set eval_strategy='epoch', or",
        ),
        (
            {"save_strategy": "journal", "eval_strategy": "no"},
            "set eval_strategy='steps', or load_best_model_at_end=False",
        ),
        (
            {"save_strategy": "steps", "save_steps": 30, "eval_steps": 20},
            "save_steps=30 is no multiple of eval_steps=20, so .* set save_steps=20, or load_best_model_at_end=False",
        ),
    ],
)
def test_the_best_step_is_refused_where_nothing_is_kept_of_it(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        make(tmp_path, load_best_model_at_end=True, **settings)


@pytest.mark.parametrize(("method", "other"), [("mezo", "journal"), ("adamw", "steps")])
def test_the_best_step_is_not_saved_where_none_is_evaluated(method, other, flags, tmp_path, capsys):
    words = ["--method", method, "--eval_strategy", "no", "--save_strategy", "best"]
    assert main(["finetune", *flags, *words]) == 2
    assert capsys.readouterr().err == (
        "zokernel: error: --eval_strategy no evaluates no step, so --save_strategy best would never save one: set "
        f"--eval_strategy steps, or --save_strategy {other}.\n"
    )
    assert not (tmp_path / "run").exists()


def test_the_command_line_names_its_flags(flags, capsys):
    assert main(["finetune", *flags, "--save_strategy", "no", "--load_best_model_at_end"]) == 2
    assert capsys.readouterr().err == (
        "zokernel: error: --save_strategy no keeps no step to go back to, so the run cannot end with its best step: "
        "set --save_strategy journal, or --load_best_model_at_end false.\n"
    )


def test_another_trainer_does_not_lose_its_best_step(tmp_path):
    from transformers import TrainingArguments

    best = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    args = TrainingArguments(str(tmp_path), learning_rate=1e-4, **best)
    with pytest.raises(UsageError, match="save_strategy='no' keeps no step to go back to"):
        add_zeroth_order(args, {"method": "mezo", "save_strategy": "no"})
    assert add_zeroth_order(args, {"method": "mezo", "save_strategy": "journal"}).load_best_model_at_end
    never = TrainingArguments(str(tmp_path), learning_rate=1e-4, eval_strategy="no")
    with pytest.raises(UsageError, match="save_strategy='best' would never save one"):
        add_zeroth_order(never, {"method": "mezo", "save_strategy": "best"})


def test_a_run_without_evaluations_of_an_earlier_version_is_known_again(flags, tmp_path, caplog):
    """Without evaluations, ``save_strategy`` was ``best`` unless given."""
    command = ["finetune", *flags, "--eval_strategy", "no"]
    assert main(command) == 0
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    record["settings"] |= {"save_strategy": "best", "load_best_model_at_end": True}
    file.write_text(json.dumps(record))
    caplog.clear()
    assert main(command) == 0
    assert "already holds this run, finished: nothing to do" in caplog.text


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"save_strategy": "best"}, "save_strategy='best'"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True"),
    ],
)
def test_the_best_of_no_evaluations_is_refused(given, named, parts, tmp_path):
    model, tokenizer, data = parts
    collator = Collator(tokenizer.pad_token_id)
    with pytest.raises(UsageError, match=f"^{named} needs evaluations, and there is no eval_dataset: pass one"):
        ZOTrainer(model, make(tmp_path, **given), train_dataset=data["train"], data_collator=collator)
