"""A finished run whose command is repeated: lost results are made again, lost records are named, nothing is claimed."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial

import pytest
from interrupted import same, weights
from transformers import AutoModelForCausalLM

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune import ZOTrainer
from zokernel.finetune.run_files import METRICS_FILE, PREDICTOR_FILE, RUN_FILE, SETTINGS_FILE
from zokernel.finetune.settings import record
from zokernel.finetune.storage.checkpoint import check_checkpoint

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
    return folder, lambda *more: main([*command, "--output_dir", str(folder), *more])


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", None),
        ("tokenizer_config.json", "{"),
        ("chat_template.jinja", None),
    ],
)
def test_a_tokenizer_that_was_lost_or_damaged_is_saved_again(name, content, again, tiny_lm_path, tmp_path, caplog):
    folder, repeat = again
    if name == "chat_template.jinja":
        base = shutil.copytree(tiny_lm_path, tmp_path / "base")
        (base / name).write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        words = ["--model_name_or_path", str(base), "--train_file", str(tmp_path / "t.jsonl"), "--precision", "fp32"]
        (tmp_path / "t.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n' * 9)
        shutil.rmtree(folder)
        words += ["--max_steps", "1", "--label_words", "bad", "good", "--output_dir", str(folder)]
        assert main(["finetune", *words]) == 0
        repeat = partial(main, ["finetune", *words])
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if content:
        (folder / name).write_text(content)
    (folder / "journal.zkj").unlink()  # which is not needed for it
    assert repeat() == 0
    lost = f"{folder / name} is not valid JSON" if content else f"but its {name} is missing"
    assert lost in caplog.text
    assert ": it is saved again." in caplog.text
    assert (folder / name).read_bytes() == whole
    caplog.clear()
    assert repeat() == 0
    assert "finished: nothing to do" in caplog.text


def test_predict_says_how_the_tokenizer_of_a_run_comes_back(again, capsys):
    folder, _ = again
    (folder / "tokenizer.json").unlink()
    (folder.parent / "new.jsonl").write_text('{"sentence": "a good movie"}\n')
    assert main(["predict", "--model", str(folder), "--file", str(folder.parent / "new.jsonl")]) == 2
    assert capsys.readouterr().err == (
        f"zokernel: error: The tokenizer of '{folder}' could not be loaded (tokenizer.json is missing): repeat the "
        "command of the run, which writes it again.\n"
    )


def test_a_lost_file_of_an_adapter_is_named_with_what_to_do(run, tmp_path, capsys):
    steps = ["--save_strategy", "steps", "--save_steps", "3"]
    assert run(*KINDS["adapter"], *steps) == 0
    folder, new = tmp_path / "run", tmp_path / "new.jsonl"
    new.write_text('{"sentence": "a good movie"}\n')
    places = {
        folder: "repeat the command of the run, which writes it again",
        folder / "checkpoint-3": "give the folder of the run, or another of its checkpoints",
        shutil.copytree(folder / "checkpoint-3", tmp_path / "copy" / "adapter"): "download it again",
    }
    for place, advice in places.items():
        (place / "adapter_model.safetensors").unlink()
        words = ["predict", "--model", str(place), "--file", str(new)]
        if advice.startswith("download"):
            words = ["merge", "--model", str(place), "--output_dir", str(tmp_path / "merged")]
        capsys.readouterr()
        assert main(words) == 2
        message = f"{place} holds no adapter_model.safetensors, so no adapter: {advice}.\n"
        assert capsys.readouterr().err == f"zokernel: error: {message}"
    assert run(*KINDS["adapter"], *steps, "--max_steps", "9", "--resume_from_checkpoint", str(place)) == 2
    assert f"{place} has lost its adapter_model.safetensors: remove this checkpoint" in capsys.readouterr().err
    shutil.rmtree(folder / "checkpoint-3")
    assert run(*KINDS["adapter"], *steps) == 0
    (folder / "adapter_config.json").unlink()
    capsys.readouterr()
    assert main(["predict", "--model", str(folder), "--file", str(new)]) == 2
    assert "holds an adapter, but no adapter_config.json: repeat the command of the run" in capsys.readouterr().err


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
    lost = "run.json of a finished run is missing: restore it from a copy"
    assert f"({lost}): choose another" in capsys.readouterr().err
    for more, message in (
        (["--resume_from_checkpoint", "last"], f"{folder} holds no run to resume: {lost}.\n"),
        (["--overwrite_output_dir"], f"{folder} cannot be overwritten ({lost}): choose another --output_dir.\n"),
    ):
        assert repeat(*more) == 2
        assert capsys.readouterr().err == f"zokernel: error: {message}"


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


@pytest.mark.parametrize("kind", ["steps", "first-order", "adapter"])
@pytest.mark.parametrize("lost", ["model.safetensors", "training_state/optimizer.safetensors", "trainer_state.json"])
def test_a_checkpoint_that_lost_a_file_is_named_and_the_one_before_is_continued(kind, lost, run, tmp_path, capsys):
    words = [*KINDS[kind], "--save_strategy", "steps", "--save_steps", "3"]
    assert run(*words) == 0
    checkpoint = tmp_path / "run" / "checkpoint-6"
    if kind == "adapter":
        lost = lost.replace("model.safe", "adapter_model.safe")
    (checkpoint / lost).unlink()
    capsys.readouterr()
    for which in ("last", str(checkpoint)):
        assert run(*words, "--max_steps", "9", "--resume_from_checkpoint", which) == 2
        assert capsys.readouterr().err == (
            f"zokernel: error: {checkpoint} has lost its {lost}: remove this checkpoint, and the run continues from "
            "what is left.\n"
        )
    shutil.rmtree(checkpoint)
    assert run(*words, "--max_steps", "9", "--resume_from_checkpoint", "last") == 0


def test_a_checkpoint_that_lost_one_of_several_files_of_weights_is_named(tiny_lm_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_path)
    checkpoint = tmp_path / "checkpoint-3"
    model.save_pretrained(checkpoint, max_shard_size="20KB")
    (checkpoint / "training_state").mkdir()
    for name in ("trainer_state.json", "training_state/optimizer.safetensors", "training_state/scheduler.safetensors"):
        (checkpoint / name).write_text('{"global_step": 3}')
    check_checkpoint(checkpoint)
    first = min(checkpoint.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(UsageError, match=f"checkpoint-3 has lost its {first.name}: remove this checkpoint, and the"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("kept", [200, None], ids=["header", "record"])
def test_a_lost_model_beside_a_damaged_journal_is_refused_with_what_to_do(kept, again, capsys, caplog):
    folder, repeat = again
    path = folder / "journal.zkj"
    content = bytearray(path.read_bytes())[:kept]
    content[-400 if kept is None else 100] ^= 1
    path.write_bytes(content)
    (folder / "model.safetensors").unlink()
    caplog.clear()
    capsys.readouterr()
    assert repeat() == 1
    error = capsys.readouterr().err
    lost = f"The run in {folder} has finished, but its model.safetensors is missing and cannot be made again"
    assert error.startswith(f"zokernel: error: {lost}: {path}: The ")
    assert "from a copy" in error
    assert error.endswith("Otherwise, start over with --overwrite_output_dir true.\n")
    assert "is made again" not in caplog.text


def test_a_killed_run_with_a_damaged_journal_is_refused_with_what_to_do(again, capsys):
    folder, repeat = again
    (folder / METRICS_FILE).unlink()
    path = folder / "journal.zkj"
    path.write_bytes(path.read_bytes()[:200])
    assert repeat() == 1
    assert "from a copy. Otherwise, start over with --overwrite_output_dir true.\n" in capsys.readouterr().err


def test_a_lost_model_beside_a_journal_that_was_cut_off_takes_its_last_steps_again(again, caplog):
    folder, repeat = again
    trained = (folder / "model.safetensors").read_bytes()
    assert main(["journal", "truncate", str(folder), "--step", "3"]) == 0
    (folder / "model.safetensors").unlink()
    assert repeat() == 0
    assert "it is made again from its journal, without forward passes for the first 3 steps." in caplog.text
    assert (folder / "model.safetensors").read_bytes() == trained


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
