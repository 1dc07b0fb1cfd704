"""What is refused names the cause, and leaves nothing behind."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from zokernel.cli import main
from zokernel.errors import RunError, UsageError
from zokernel.finetune.models.check import loading_error
from zokernel.finetune.scoring.continuations import shown_prompt
from zokernel.finetune.settings.check import check_output
from zokernel.finetune.storage.run_folder import METRICS_FILE, RUN_FILE, clear_if_refused
from zokernel.finetune.tasks.registry import customize
from zokernel.finetune.tasks.text import TextTask


def test_a_run_refused_before_its_first_step_leaves_nothing(flags, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise UsageError("The first batch does not fit.")

    monkeypatch.setattr("zokernel.finetune.trainer.zo_trainer.ZOTrainer.train", refuse)
    assert main(["finetune", *flags]) == 2
    assert "The first batch does not fit." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "new", "expected"),
    [("x", True, False), ("x", False, True), ("steps.jsonl", True, True), (METRICS_FILE, True, True)],
)
def test_only_a_new_run_without_a_step_is_removed(file, new, expected, tmp_path):
    for name in (RUN_FILE, file):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match=r"^No\.$"), clear_if_refused(tmp_path, new=new):
        raise UsageError("No.")
    assert (tmp_path / RUN_FILE).exists() == expected


def test_an_output_dir_that_is_a_file_is_named_before_data_are_read(flags, tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setattr("zokernel.finetune.job.load_task", lambda *_, **__: pytest.fail("data were read"))
    assert main(["finetune", *flags, "--output_dir", str(tmp_path / "taken")]) == 1
    assert f"{tmp_path / 'taken'} is a file, so choose another." in capsys.readouterr().err
    with pytest.raises(RunError, match="taken is a file"):
        check_output(str(tmp_path / "taken" / "run"))
    check_output(str(tmp_path / "new"))


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"labels": ["a"]}, "leave out --labels."),
        ({"label_words": ["a"]}, "leave out --label_words."),
        ({"labels": ["a"], "label_words": ["a"]}, "leave out --label_words and --labels."),
    ],
)
def test_only_flags_that_were_given_are_named(options, flags):
    with pytest.raises(UsageError, match=rf"has no label words: {flags}$"):
        customize(TextTask(), **options)


def test_a_damaged_gguf_file_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    error = loading_error(str(tmp_path), ValueError("no magic"), gguf_file="bad.gguf")
    assert str(error) == f"GGUF file {tmp_path / 'bad.gguf'} could not be loaded (no magic): fetch it again."


def test_a_mistyped_folder_is_reported_as_missing(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", *flags, "--model_name_or_path", "models/nope"]) in (1, 2)
    assert "(there is no folder models/nope here)." in capsys.readouterr().err


def test_a_plan_of_text_says_how_it_becomes_a_classification(tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert main(["plan", "--train_file", str(file)]) == 2
    message = "these rows have 'prompt' and 'completion', to be learned as text: say --template and --label_words."
    assert message in capsys.readouterr().err
    assert main(["plan", "--task", "squad", "--train_file", str(file)]) == 2
    assert "not for a generation task: choose another --task." in capsys.readouterr().err


def test_prompts_are_shown_without_what_the_tokenizer_puts_around_them(tiny_lm_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_path)
    ids = tokenizer("good bad", add_special_tokens=False)["input_ids"]
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    assert shown_prompt(tokenizer, [0, *ids, 0, *ids, 0]) == tokenizer.decode([*ids, 0, *ids])
