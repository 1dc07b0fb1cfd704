"""What a new user sees: the output on the screen, the files at the end, and the report."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import preloaded
import pytest
import ranks
import torch
from trainers import load_parts, make_trainer
from transformers import AutoModelForCausalLM, TrainerCallback

from zokernel.cli import main
from zokernel.errors import RunError
from zokernel.finetune.report.text import describe_loss, describe_method, describe_rate, describe_weights


def weights_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_without_an_output_dir_nothing_is_written(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    index = flags.index("--output_dir")
    for rest in ([], ["--output_dir", ""]):
        assert main(["finetune", *flags[:index], *flags[index + 2 :], *rest]) == 2
        assert "Say where the results go: --output_dir runs/NAME." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_copy_of_the_weights_is_left_and_the_run_can_be_lengthened(flags, tmp_path):
    assert main(["finetune", *flags, "--eval_steps", "2"]) == 0
    folder = tmp_path / "run"
    assert weights_in(folder) == ["model.safetensors"]
    assert not list(folder.glob("checkpoint-*"))
    longer = ["--max_steps", "9", "--eval_steps", "2"]
    assert main(["finetune", *flags, *longer, "--resume_from_checkpoint", "last"]) == 0
    assert weights_in(folder) == ["model.safetensors"]
    metrics = metrics_of(folder)
    assert (metrics["steps"], metrics["forwards"]) == (9, 18)
    assert main(["finetune", *flags, *longer, "--output_dir", str(tmp_path / "whole")]) == 0
    lengthened, whole = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (folder, tmp_path / "whole")
    )
    assert all(torch.equal(lengthened[name], whole[name]) for name in whole)
    assert metrics["best_step"] == metrics_of(tmp_path / "whole")["best_step"]


@pytest.mark.parametrize(
    ("saving", "expected"),
    [
        (["--save_total_limit", "1"], True),
        (["--save_strategy", "steps", "--save_steps", "3", "--eval_steps", "3"], True),
        (["--save_strategy", "best", "--eval_steps", "1"], False),
        (["--save_strategy", "journal"], False),
        (["--method", "adamw", "--learning_rate", "1e-3", "--eval_steps", "3"], True),  # which no journal rebuilds
    ],
)
def test_checkpoints_that_were_asked_for_stay(saving, expected, flags, tmp_path):
    assert main(["finetune", *flags, "--eval_steps", "2", *saving]) == 0
    assert bool(list((tmp_path / "run").glob("checkpoint-*"))) is expected


def test_a_repeated_command_prints_one_line_and_the_table(flags, tmp_path, capsys, caplog):
    assert main(["finetune", *flags]) == 0
    table = capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("[!.]*") if path.is_file()}
    caplog.clear()
    assert main(["finetune", *flags]) == 0
    assert capsys.readouterr().out == table
    assert caplog.messages[-1].endswith("already holds this run, finished: nothing to do.")
    assert "setting  " not in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_an_evaluation_prints_nothing_about_training(flags, tmp_path, capsys, caplog):
    assert main(["finetune", *flags, "--do_train", "false"]) == 0
    output = caplog.text + capsys.readouterr().out
    for word in ("learning_rate", "max_steps", "forwards per step", "perturb", "training loss", "journal"):
        assert word not in output
    report = (tmp_path / "run" / "report.md").read_text()
    assert "Nothing was trained." in report
    assert metrics_of(tmp_path / "run")["effective_lr"] is None
    assert weights_in(tmp_path / "run") == []


def test_the_report_of_auto_says_what_was_asked_for_and_what_it_became(flags, tmp_path, capsys, caplog):
    index = flags.index("--learning_rate")
    extra = ["--template", "{sentence} It was", "--method", "auto"]
    assert main(["finetune", *flags[:index], *flags[index + 2 :], *extra]) == 0
    folder = tmp_path / "run"
    metrics = metrics_of(folder)  # valid JSON: no NaN
    assert (metrics["requested_method"], metrics["method"]) == ("auto", "forward_difference")
    assert "parameters with auto (forward_difference)" in capsys.readouterr().out
    for name in ("report.md", "README.md"):
        text = (folder / name).read_text()
        assert "with auto (forward_difference)" in text
        assert not re.search(r"\bnan\b", text)
        assert "sst2" not in text
    assert metrics["task"] != "sst2"
    (table,) = [message for message in caplog.messages if message.startswith("Settings (")]
    assert re.search(r"perturb +decided when the model is loaded +auto\n", table)


ENDS = {
    "by loss": [],
    "by accuracy": ["--metric_for_best_model", "accuracy"],
    "too short for a window": ["--max_steps", "6", "--eval_steps", "2"],
    "of an adapter": ["--lora", "true", "--learning_rate", "100"],
    "stopped early": ["--early_stopping_patience", "1"],
    "with a journal": ["--save_strategy", "journal"],
    "with all checkpoints": ["--save_strategy", "steps", "--save_steps", "10", "--save_total_limit", "5"],
    "never evaluated": ["--eval_delay", "100"],
}


@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_diverged_ends_with_the_weights_before_that(end, flags, tmp_path, capsys, caplog):
    """It ends with the same score for all words: a loss of ln 2, which is below that of the untrained model."""
    wild = ["--learning_rate", "3", "--max_steps", "30", "--eval_steps", "10"]
    assert main(["finetune", *flags, *wild, *ENDS[end]]) == 0
    metrics = metrics_of(tmp_path / "run")
    slopes = end == "of an adapter"  # whose scores lose what the input does to them, and are never far off
    wrong = (
        r"its slopes fell from 0\.0\d+ to \S+ " if slopes else r"the loss of its batches rose from 0\.\d+ to \S+e\+\d+ "
    )
    assert re.match(f"Training diverged: {wrong}", metrics["went_wrong"])
    losses = [row["loss"] for row in metrics["evaluations"]]
    assert losses[0] > math.log(2)
    assert (len(losses) == 1) == (end == "never evaluated")
    if slopes:
        assert losses[1:] == pytest.approx(losses[:1] * (len(losses) - 1), abs=0.1)
    elif end != "never evaluated":
        assert losses[-1] == pytest.approx(math.log(2), abs=1e-3)
    assert metrics["best_step"] == 0
    assert metrics["after"] == pytest.approx(metrics["before"])
    table = capsys.readouterr().out
    assert "(the untrained weights were the best) (the run diverged)" in table
    texts = [(tmp_path / "run" / name).read_text() for name in ("report.md", "README.md")]
    assert all("Training diverged: " in text for text in texts)
    assert all("so the weights are the untrained ones" in text for text in texts)
    assert not any("too few to tell" in text for text in texts)
    assert "The weights are those of step 0, before that." in caplog.text


def test_the_last_weights_of_a_run_that_diverged_are_kept_if_they_are_asked_for(flags, tmp_path, caplog):
    wild = ["--learning_rate", "3", "--max_steps", "12", "--eval_steps", "4", "--load_best_model_at_end", "false"]
    assert main(["finetune", *flags, *wild]) == 0
    metrics = metrics_of(tmp_path / "run")
    assert (metrics["best_step"], metrics["after"]["loss"]) == (12, pytest.approx(math.log(2), abs=1e-3))
    assert re.search(r"Training diverged: the loss .* The last weights were kept, as asked\.", caplog.text)


def test_the_best_weights_before_the_loss_became_infinite_are_saved(tiny_lm_path, tiny_reviews_path, tmp_path):
    class Wild(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 20:
                optimizer.param_groups[0]["lr"] = 3.0
            if state.global_step == 34:
                optimizer.param_groups[0]["params"][0].data.fill_(math.nan)

    settings = {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "best", "load_best_model_at_end": True}
    trainer = make_trainer(load_parts(tiny_lm_path, tiny_reviews_path), tmp_path, max_steps=40, **settings)
    trainer.add_callback(Wild())
    with pytest.raises(RunError, match=r"The weights of step 20 are in .*last-good"):
        trainer.train()
    assert trainer.state.global_step > trainer.final_step == 20
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "last-good", dtype=torch.float32).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in trainer.model.state_dict().items())


def test_validation_examples_are_called_that(flags, tmp_path, capsys):
    index = flags.index("--test_file")
    assert main(["finetune", *flags[:index], *flags[index + 2 :], "--max_steps", "2"]) == 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert "on 24 validation examples" in capsys.readouterr().out
    assert "held-out" not in report


def test_descriptions_of_a_run():
    run = {"method": "mezo", "learning_rate": 1e-3, "effective_lr": float("nan"), "steps": 100, "selected_by": "loss"}
    run |= {
        "before": {"loss": 1.4222},
        "after": {"loss": 1.0986},
        "evaluations": [1],
        "went_wrong": None,
        "best_step": 60,
    }
    assert describe_method(run) == "mezo"
    assert describe_rate(run) == "0.001"
    assert describe_loss(run) == "1.4222 -> 1.0986"
    assert describe_weights(run) == "The weights are those with the best validation loss, of step 60 of 100."
    assert (
        describe_weights(run | {"evaluations": [], "best_step": 100}) == "The weights are those of the last step, 100."
    )
    assert describe_loss(run | {"went_wrong": "Training diverged."}) == "1.4222 -> 1.0986 (the run diverged)"


SCREEN = """
import sys, warnings
from zokernel.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_shows_its_own_lines_once_and_none_of_the_libraries(flags, tmp_path):
    variables = os.environ | {"ZOKERNEL_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", SCREEN, "finetune", *flags]
    process = subprocess.run(words, capture_output=True, text=True, env=variables, cwd=tmp_path, check=False)
    out, err = process.stdout, process.stderr
    assert process.returncode == 0, err
    lines = [line for line in err.splitlines() if line and not line.startswith("step ")]
    assert len(lines) == len(set(lines))
    noise = ("Warning", "warn", "Loading weights", "Writing model shards", "it/s", ".py:", "transformers", "torch.")
    assert [line for line in err.splitlines() if any(word in line for word in noise)] == []
    assert "Saved in" in out
    assert not (tmp_path / "trainer_output").exists()


@pytest.mark.parametrize("words", [["claims"], ["reproduce", "--list"], ["--help"]])
def test_a_closed_pipe_is_no_error(words, tmp_path):
    command = f"'{sys.executable}' -m zokernel {' '.join(words)}"
    process = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -c 1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert process.stderr == ""
    assert process.returncode in (0, 141)


def test_a_pipe_closed_while_all_help_is_printed_is_no_error(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["head", "-c", "1", pipe], stdout=subprocess.DEVNULL):
        words = ["-m", "zokernel", "finetune", "--help-all"]
        process = preloaded.run(words, environment=os.environ, folder=tmp_path, standard_output=pipe)
    assert process.stderr == ""
    assert process.returncode in (0, 141)


def test_two_processes_print_once(flags, tmp_path):
    """Every line, the table and an error come from one process."""
    words = ["finetune", *flags, "--max_steps", "2"]
    first, log = ranks.command(words, tmp_path / "first", size=2)
    assert first.count("zero-shot accuracy") == first.count("Saved in") == 1
    for line in ("Settings (all of them", "Data: 64 train", "Method mezo: learning rate", "step 2: validation loss"):
        assert log.count(line) == 1
    assert "Warning" not in log
    out, err = ranks.command(words, tmp_path / "again", size=2)
    assert out == first
    assert err.count("nothing to do") == 1
    _, err = ranks.command([*words, "--eps", "0"], tmp_path / "refused", size=2)
    assert err.count("zokernel: error: eps must be positive, not 0.0.") == 1


def test_times_of_a_continued_run_add_up(flags, tmp_path, monkeypatch):
    from zokernel.finetune.monitor.interrupt import StopOnInterrupt

    def stop_after_three(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.interrupted = control.should_save = control.should_training_stop = True
        return control

    with monkeypatch.context() as patch:
        patch.setattr(StopOnInterrupt, "on_step_end", stop_after_three)
        assert main(["finetune", *flags]) == 130
    folder = tmp_path / "run"
    run = json.loads((folder / "run.json").read_text())
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert run["seconds"] >= steps[-1]["seconds"]
    # An earlier process that took 49 s for three steps, and 55 s in all.
    for row in steps:
        row["seconds"] = 49.0 * row["step"] / 3
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (folder / "run.json").write_text(json.dumps(run | {"seconds": 55.0}))
    assert main(["finetune", *flags]) == 0
    metrics = metrics_of(folder)
    assert 49 <= metrics["train_seconds"] < 55 <= metrics["total_seconds"]
    first = metrics["total_seconds"]
    # One that was killed leaves no time but that of its steps.
    (folder / "metrics.json").unlink()
    (folder / "run.json").write_text(json.dumps({key: value for key, value in run.items() if key != "seconds"}))
    assert main(["finetune", *flags]) == 0
    metrics = metrics_of(folder)
    assert 49 <= metrics["train_seconds"] <= metrics["total_seconds"] <= first + 30


def test_the_hubs_bar_of_a_download_stays():
    import huggingface_hub.utils
    import transformers

    from zokernel.commands.messages import quiet_transformers

    for enabled in (True, False):
        (huggingface_hub.utils.enable_progress_bars if enabled else huggingface_hub.utils.disable_progress_bars)()
        quiet_transformers()
        assert huggingface_hub.utils.are_progress_bars_disabled() is not enabled
        assert not transformers.logging.is_progress_bar_enabled()
    huggingface_hub.utils.enable_progress_bars()


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--num_probes", "8", "--update_examples", "4", "--observe_examples", "2"],
        ["evolve", "--max_examples", "8", "--label_words", " bad", " good"],
        [
            "kernel",
            "--x_o",
            "a movie",
            "--x_u",
            "the movie",
            "--label_words",
            "bad",
            "good",
            "--num_perturbations",
            "1",
        ],
    ],
    ids=lambda words: words[0],
)
def test_other_commands_show_none_of_the_libraries_remarks(words, tiny_lm_path, tiny_reviews_path, tmp_path):
    data = ["--train_file", str(tiny_reviews_path / "train.jsonl")] if words[0] != "kernel" else []
    words_of_labels = ["--label_words", "bad", "good"] if words[0] == "plan" else []
    output = ["--output_dir", str(tmp_path / "out")] if words[0] != "plan" else []
    words = [*words, "--model_name_or_path", str(tiny_lm_path), *data, *words_of_labels, *output]
    variables = os.environ | {"ZOKERNEL_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    process = preloaded.run(["-m", "zokernel", *words], environment=variables, folder=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout
    lines = process.stderr.splitlines()
    assert len(lines) == len(set(lines))
    assert [line for line in lines if re.search(r"Warning|it/s|Loading weights|\.py:|transformers", line)] == []
