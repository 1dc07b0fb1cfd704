"""A finished run whose command is repeated: lost results are made again, lost records are named, nothing is claimed."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from interrupted import same, weights

from zokernel.cli import main
from zokernel.finetune import ZOTrainer
from zokernel.finetune.run_files import METRICS_FILE, PREDICTOR_FILE, RUN_FILE, SETTINGS_FILE
from zokernel.finetune.settings import record

KINDS = {
    "best step": ["--learning_rate", "2e-2", "--seed", "1"],
    "last step": ["--load_best_model_at_end", "false"],
    "steps": ["--save_strategy", "steps"],
    "adapter": ["--lora", "true", "--lora_target_modules", "q_proj"],
    "first-order": ["--method", "adamw"],
}


@pytest.fixture
def run(flags, tmp_path):
    """A function that runs ``zokernel finetune`` and returns the exit code."""
    return lambda *more: main(["finetune", *flags, "--eval_steps", "3", *more])


@pytest.fixture(scope="module")
def finished(tiny_lm_path, tiny_reviews_path, tmp_path_factory):
    """Folder and command of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    command = [
        "finetune",
        "--model_name_or_path",
        str(tiny_lm_path),
        "--label_words",
        "bad",
        "good",
        "--max_steps",
        "4",
    ]
    command += ["--train_file", str(tiny_reviews_path / "train.jsonl"), "--precision", "fp32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOKERNEL_HOME", str(folder.parent / "home"))
        assert main([*command, "--output_dir", str(folder)]) == 0
    return folder, command


@pytest.fixture
def again(finished, tmp_path, monkeypatch):
    """A copy of the finished run, and a function that repeats its command."""
    source, command = finished
    monkeypatch.setenv("ZOKERNEL_HOME", str(source.parent / "home"))
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    return folder, lambda: main([*command, "--output_dir", str(folder)])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_were_deleted_are_made_again(kind, run, tmp_path, monkeypatch, capsys, caplog):
    assert run(*KINDS[kind]) == 0
    folder, results = tmp_path / "run", json.loads((tmp_path / "run" / METRICS_FILE).read_text())
    trained, (file,) = weights(folder), folder.glob("*model.safetensors")
    file.unlink()
    steps, real = [], ZOTrainer.compute_loss
    monkeypatch.setattr(
        ZOTrainer, "compute_loss", lambda self, *a, **k: steps.append(self.is_in_train) or real(self, *a, **k)
    )
    capsys.readouterr()
    assert run(*KINDS[kind]) == 0
    assert f"has finished, but its {file.name} is missing: it is made again from its" in caplog.text
    assert same(weights(folder), trained)
    assert json.loads((folder / METRICS_FILE).read_text())["after"] == results["after"]
    assert "continued_at" not in json.loads((folder / RUN_FILE).read_text())
    if kind != "first-order":
        assert not any(steps), "forward passes of steps or evaluations that the journal holds"
    assert f"and the {results['saved']}." in capsys.readouterr().out
    monkeypatch.undo()


def test_weights_that_were_cut_off_are_made_again(again, caplog):
    folder, repeat = again
    file = folder / "model.safetensors"
    trained = file.read_bytes()
    file.unlink()
    file.write_bytes(trained[:1000])
    assert repeat() == 0
    assert "model.safetensors, 1,000 bytes long, is damaged or cut off" in caplog.text
    assert file.read_bytes() == trained


def test_predict_says_how_the_weights_of_a_run_come_back(again, capsys):
    folder, repeat = again
    (folder / "model.safetensors").unlink()
    (folder.parent / "new.jsonl").write_text('{"sentence": "a good movie"}\n')
    words = ["predict", "--model", str(folder), "--file", str(folder.parent / "new.jsonl")]
    assert main(words) == 2
    assert "holds no model.safetensors, so no weights: repeat the command of the run" in capsys.readouterr().err
    (folder / PREDICTOR_FILE).unlink()
    assert main(words) == 2
    assert "predictor.json is missing, though the run has finished: repeat its command" in capsys.readouterr().err
    assert repeat() == 0
    assert (folder / PREDICTOR_FILE).is_file()


@pytest.mark.parametrize(("more", "lost"), [((), "journal"), (("--save_strategy", "no"), "checkpoint")])
def test_a_model_that_nothing_can_be_made_from_is_refused(more, lost, run, tmp_path, capsys):
    assert run(*more) == 0
    folder = tmp_path / "run"
    for path in (folder / "model.safetensors", folder / "journal.zkj"):
        path.unlink(missing_ok=True)
    capsys.readouterr()
    assert run(*more) == 2
    captured = capsys.readouterr()
    assert (
        f"its model.safetensors is missing, and no {lost} is left to make it from: restore the file from a copy, or "
        "start over with --overwrite_output_dir true." in captured.err
    )
    assert "Saved in" not in captured.out
    assert (folder / METRICS_FILE).is_file()


def test_only_files_that_are_there_are_said_to_be_saved(again, capsys):
    folder, repeat = again
    (folder / "loss.png").unlink()
    assert repeat() == 0
    assert f"Saved in {folder}: report.md, metrics.json, README.md and the model." in capsys.readouterr().out


def test_a_damaged_journal_or_lost_settings_are_named(again, caplog):
    folder, repeat = again
    whole, path = (folder / "journal.zkj").read_bytes(), folder / "journal.zkj"
    damaged = bytearray(whole)
    damaged[len(whole) - 400] ^= 1
    for content, words in (
        (whole[:200], "The journal's header is damaged"),
        (whole[:-10], "is cut off in its last record, but all 4 steps are in it"),
        (bytes(damaged), "is damaged, and whole records follow"),
        (None, "journal.zkj is missing; the trained model is whole, but the run can be neither rebuilt nor continued"),
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        caplog.clear()
        assert repeat() == 0
        warnings = [message for message in caplog.messages if str(path) in message]
        assert len(warnings) == 1
        assert words in warnings[0]
        path.write_bytes(whole)
    assert main(["journal", "truncate", str(folder), "--step", "3"]) == 0
    (folder / SETTINGS_FILE).unlink()
    caplog.clear()
    assert repeat() == 0
    assert "journal.zkj is cut off: it holds 3 of 4 steps; the trained model is whole" in caplog.text
    assert "settings.json, which says who decided each setting, is missing" in caplog.text


READ_BY = {
    SETTINGS_FILE: ("finetune",),
    METRICS_FILE: ("finetune",),
    RUN_FILE: ("finetune",),
    PREDICTOR_FILE: ("predict",),
    "config.json": ("predict",),
}


@pytest.mark.parametrize("name", READ_BY)
@pytest.mark.parametrize("content", ["{", "[1]", '{"task": {}}', "\xff"])
def test_damaged_json_is_one_sentence(name, content, again, capsys):
    folder, repeat = again
    (folder / name).write_bytes(content.encode("latin-1"))
    (folder.parent / "new.jsonl").write_text('{"sentence": "a good movie"}\n')
    commands = {
        "finetune": repeat,
        "predict": lambda: main(["predict", "--model", str(folder), "--file", str(folder.parent / "new.jsonl")]),
        "report": lambda: main(["report", str(folder)]),
    }
    for command in ("report", "predict", "finetune"):  # the last one makes again what it can
        capsys.readouterr()
        refused = command in READ_BY[name]
        assert commands[command]() == (2 if refused else 0), command
        error = capsys.readouterr().err
        if refused:
            assert re.fullmatch(r"(?s).*zokernel: error: [^\n]*\.\n", error)
            assert name in error or "with settings that are not known" in error  # a whole run.json without settings
    assert commands["predict"]() == 0


def test_a_damaged_state_of_a_checkpoint_is_named(run, tmp_path, capsys):
    assert run("--save_strategy", "steps") == 0
    checkpoint = tmp_path / "run" / "checkpoint-6"
    (checkpoint / "trainer_state.json").write_text("{")
    longer = ["--save_strategy", "steps", "--max_steps", "9", "--resume_from_checkpoint"]
    for which in ("last", str(checkpoint)):
        assert run(*longer, which) == 2
        assert "trainer_state.json is not valid JSON" in capsys.readouterr().err
    shutil.rmtree(checkpoint)
    assert run(*longer, "last") == 0


def test_a_lost_record_of_the_run_is_named(again, capsys):
    folder, repeat = again
    (folder / RUN_FILE).unlink()
    assert repeat() == 2
    assert "(run.json of a finished run is missing: restore it from a copy): choose another" in capsys.readouterr().err


def test_settings_are_read_by_the_one_reader(again):
    folder, _ = again
    assert record.read_settings(folder)["max_steps"].value == 4


@pytest.mark.parametrize("more", [(), ("--save_strategy", "no")], ids=["shorter", "without steps"])
def test_a_finished_run_is_not_replaced_by_continuing_it(more, run, tmp_path, capsys):
    """To an earlier step, or from no step at all: the model would be overwritten though nobody said so."""
    assert run("--max_steps", "6", *more) == 0
    trained = (tmp_path / "run" / "model.safetensors").read_bytes()
    steps = "9" if more else "3"
    capsys.readouterr()
    assert run("--max_steps", steps, "--resume_from_checkpoint", "last", *more) == 2
    message = capsys.readouterr().err
    assert ("kept no step to continue from: choose another" if more else "zokernel replay --step N") in message
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == trained
    assert run("--max_steps", steps, *more) == 2
    assert "lengthen it" not in capsys.readouterr().err


def test_a_checkpoint_with_cut_weights_is_named(run, tmp_path, capsys):
    words = ["--save_strategy", "steps", "--save_steps", "3"]
    assert run(*words, "--max_steps", "3") == 0
    file = tmp_path / "run" / "checkpoint-3" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    capsys.readouterr()
    assert run(*words, "--max_steps", "6", "--resume_from_checkpoint", str(file.parent)) == 2
    assert re.search(r"model.safetensors is damaged or cut off \(.*: remove this checkpoint", capsys.readouterr().err)


def test_a_base_with_cut_weights_is_named_by_replay(again, tiny_lm_path, tmp_path, capsys):
    folder, _ = again
    base = shutil.copytree(tiny_lm_path, tmp_path / "base")
    weights_file = base / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    words = ["replay", "--base", str(base), "--journal", str(folder), "--output_dir", str(tmp_path / "replayed")]
    assert main(words) == 2
    assert "model.safetensors, 1,000 bytes long, is damaged or cut off" in capsys.readouterr().err


def test_a_cut_adapter_to_start_from_is_named(run, tmp_path, capsys):
    assert run(*KINDS["adapter"]) == 0
    adapter = shutil.copytree(tmp_path / "run", tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:300])
    capsys.readouterr()
    assert run("--adapter_name_or_path", str(adapter), "--overwrite_output_dir", "true") == 2
    assert "adapter_model.safetensors, 300 bytes long, is damaged or cut off" in capsys.readouterr().err
