"""Every recipe parses and takes two steps, with its model and data replaced by tiny ones."""

from __future__ import annotations

import json
import logging
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import save_model

from zokernel.cli import load, main
from zokernel.commands.parser import read_dataclasses
from zokernel.errors import UsageError
from zokernel.finetune import finetune, get_task
from zokernel.finetune.settings.flag_files import read_yaml, recipe_names
from zokernel.finetune.tasks.toy import toy_files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of a causal and a masked model, and flags with a toy data set for any task."""
    folders = {f: save_model(tmp_path_factory.mktemp(f), f) for f in ("llama", "roberta")}
    cache = {}

    def flags(task, protocol):
        if task not in cache:
            cache[task] = toy_files(tmp_path_factory.mktemp(task), task, get_task(task), size=12)
        # A published protocol takes validation examples from the training file.
        files = {name: path for name, path in cache[task].items() if name != "validation_file" or not protocol}
        return [word for name, path in files.items() for word in (f"--{name}", path)]

    return folders, flags


def parse(words):
    """Return the three groups of flags of ``zokernel finetune``."""
    command, parser = load("finetune")
    return read_dataclasses(parser.parse(words), *command.GROUPS)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_runs(name, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("zokernel.finetune.run.draw_loss", lambda *args, **kwargs: None)  # tested elsewhere
    folders, data_flags = tiny
    recipe_model, recipe_data, recipe = parse(["--config", f"recipes/{name}.yaml"])
    by_class = recipe_data.protocol == "mezo-roberta"
    model, data, config = parse(
        [
            *("--config", name),
            *("--model_name_or_path", str(folders["roberta" if recipe_model.lm_type == "masked" else "llama"])),
            *data_flags(recipe_data.task, recipe_data.protocol),
            *("--max_steps", "2", "--per_device_train_batch_size", "2", "--max_test_samples", "4"),
            *(("--k_shot", "2") if by_class else ("--max_eval_samples", "4")),
            *(("--max_new_tokens", "2") if get_task(recipe_data.task).kind == "generation" else ()),
            *("--num_demonstrations", "2" if recipe_data.num_demonstrations else "0"),
            *("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"),
            *("--report_to", "none", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "run")),
        ]
    )
    assert (model.lora, model.prefix_tuning) == (recipe_model.lora, recipe_model.prefix_tuning)
    assert (config.learning_rate, config.method_options()["seed" if recipe.method != "adamw" else "weight_decay"]) == (
        recipe.learning_rate,
        0,
    )
    metrics = finetune(model, data, config)
    assert metrics["steps"] == (2 if recipe.do_train else 0)
    assert metrics["method"] == recipe.method
    assert metrics["language_model"] == ("masked" if recipe_model.lm_type == "masked" else "causal")


def test_recipes_say_what_was_published():
    settings = {name: read_yaml_of(name) for name in recipe_names()}
    opt, roberta = settings["mezo-opt-sst2"], settings["mezo-roberta-snli"]
    assert (opt["learning_rate"], opt["eps"], opt["max_steps"], opt["per_device_train_batch_size"]) == (
        1e-6,
        1e-3,
        20000,
        16,
    )
    assert (roberta["k_shot"], roberta["data_seed"], roberta["max_length"], roberta["max_steps"]) == (
        16,
        13,
        256,
        100000,
    )
    assert settings["mezo-opt-lora"]["eps"] == 1e-2
    assert settings["mezo-opt-wsc"]["learning_rate"] == 1e-7
    assert len({values["output_dir"] for values in settings.values()}) == len(settings)


def read_yaml_of(name):
    from pathlib import Path

    return read_yaml(Path(name))


def test_files_extend_each_other_but_not_in_circles(tmp_path):
    (tmp_path / "own.yaml").write_text("extends: mezo-opt-cb\nmax_steps: 7\n")
    values = read_yaml(tmp_path / "own.yaml")
    assert (values["task"], values["max_steps"], values["method"]) == ("cb", 7, "mezo")
    (tmp_path / "a.yaml").write_text("extends: b\n")
    (tmp_path / "b.yaml").write_text("extends: a\n")
    with pytest.raises(UsageError, match="extends itself"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(UsageError, match="nearest name is mezo-opt-sst2"):
        read_yaml(tmp_path / "mezo-opt-sst.yaml")


def test_recipes_are_run_in_full_by_one_command(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("zokernel.finetune.run.draw_loss", lambda *args, **kwargs: None)
    folders, data_flags = tiny
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "recipes.py"))["main"]
    flags = [
        *("--model_name_or_path", str(folders["llama"]), *data_flags("sst2", "mezo-opt"), "--max_steps", "2"),
        *("--per_device_train_batch_size", "2", "--max_test_samples", "4", "--max_eval_samples", "4"),
        *("--report_to", "none", "--disable_tqdm", "true"),
    ]

    def called(words, **kwargs):
        return SimpleNamespace(returncode=main(words[3:]))

    monkeypatch.setattr(subprocess, "run", called)
    words = ["mezo-opt-sst2", "--seeds", "1", "2", "--output_dir", str(tmp_path / "runs"), "--", *flags]
    with caplog.at_level(logging.INFO):
        assert script(words) == 0
    assert any("it has not been run in full" in message for message in caplog.messages)
    lines = (tmp_path / "runs" / "results.md").read_text().splitlines()[2:]
    metrics = json.loads((tmp_path / "runs" / "mezo-opt-sst2-2" / "metrics.json").read_text())
    assert [line.split(" | ")[2:4] for line in lines] == [["1", "2"], ["2", "2"]]
    assert lines[1].split(" | ")[5] == f"{100 * metrics['after']['accuracy']:.1f} of 4"
    modified = (tmp_path / "runs" / "mezo-opt-sst2-2" / "metrics.json").stat().st_mtime_ns
    assert script([*words[:3], *words[4:]]) == 0  # finished runs are read
    assert (tmp_path / "runs" / "mezo-opt-sst2-2" / "metrics.json").stat().st_mtime_ns == modified
    with pytest.raises(SystemExit):
        script(["mezo-opt-sst"])
