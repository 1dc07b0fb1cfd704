"""Continuing runs: what is picked up by itself, what is refused, and that nothing is lost or loaded on the way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest
import torch
from interrupted import Stop, ctrl_c_in, interrupted_run, same, weights
from safetensors.torch import save_file
from trainers import make_trainer
from transformers import AutoModelForCausalLM

from zokernel.cli import main
from zokernel.errors import RunError, UsageError
from zokernel.finetune import ZOTrainer, replay
from zokernel.finetune.models.pickles import PICKLES
from zokernel.finetune.storage.lock import LOCK_FILE, exclusive
from zokernel.finetune.storage.state_file import load_state, save_state
from zokernel.journal import Journal

STEPS = 14


@pytest.fixture
def run(tiny_lm_path, tiny_reviews_path, tmp_path, monkeypatch):
    """A function that runs ``zokernel finetune`` with further flags and returns the exit code."""
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    flags = [
        *("--model_name_or_path", str(tiny_lm_path)),
        *("--train_file", str(tiny_reviews_path / "train.jsonl")),
        *("--validation_file", str(tiny_reviews_path / "validation.jsonl")),
        *("--label_words", "bad", "good", "--precision", "fp32", "--per_device_train_batch_size", "8"),
        *("--max_steps", str(STEPS), "--learning_rate", "2e-3", "--eval_steps", "4"),
    ]
    return lambda folder, *extra: main(["finetune", *flags, "--output_dir", str(tmp_path / folder), *extra])


def test_journal_only_ends_with_the_best_weights_and_no_checkpoint(run, tmp_path):
    flags = ["--learning_rate", "2e-2", "--eval_steps", "2"]
    assert run("checkpoints", *flags) == 0
    assert run("journal", *flags, "--save_strategy", "journal") == 0
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("checkpoints", "journal")]
    assert metrics[0]["best_step"] == metrics[1]["best_step"] < STEPS
    assert metrics[0]["after"] == metrics[1]["after"]
    assert same(weights(tmp_path / "checkpoints"), weights(tmp_path / "journal"))
    assert not list((tmp_path / "journal").glob("checkpoint-*"))
    assert (tmp_path / "journal" / "journal.zkj").stat().st_size < 8000


def test_the_same_command_continues_an_unfinished_run_without_its_forwards(run, tmp_path, monkeypatch, caplog):
    assert run("whole", "--save_strategy", "journal") == 0
    interrupted_run(run, monkeypatch, "--save_strategy", "journal")
    forwards = []
    real = ZOTrainer.compute_loss
    monkeypatch.setattr(
        ZOTrainer, "compute_loss", lambda self, *a, **k: forwards.append(self.is_in_train) or real(self, *a, **k)
    )
    assert run("cut", "--save_strategy", "journal") == 0
    # Steps 10 to 14 are two forwards each; the validations after steps 12 and 14 are one batch each.
    assert sum(forwards) == 5 * 2 + 2
    assert "steps 1 to 9 are taken from the journal" in caplog.text
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert run("cut", "--save_strategy", "journal") == 0
    assert "finished: nothing to do" in caplog.text


def test_a_command_that_left_no_saved_step_begins_its_run_again(run, tmp_path, monkeypatch, caplog):
    """In Python, ``train(resume_from_checkpoint=True)`` refuses this; whoever repeats a command cannot know it."""
    flags = ["--save_strategy", "no", "--load_best_model_at_end", "false", "--eval_strategy", "no"]
    assert run("whole", *flags) == 0
    real = ZOTrainer.begin_step

    def dying(trainer):
        if trainer.state.global_step == 3:
            raise Stop
        real(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(ZOTrainer, "begin_step", dying)
        with pytest.raises(Stop):
            run("cut", *flags)
    assert run("cut", *flags) == 0
    assert "holds no step to continue from, so the run starts from the beginning" in caplog.text
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_other_settings_or_data_do_not_continue_a_run(run, tmp_path, monkeypatch, capsys, tiny_reviews_path):
    interrupted_run(run, monkeypatch)
    before = (tmp_path / "cut" / "journal.zkj").read_bytes()
    assert run("cut", "--learning_rate", "1e-3") == 2
    message = capsys.readouterr().err
    assert "unfinished (learning_rate: 0.002 there, 0.001 asked for)" in message
    with monkeypatch.context() as patch:
        patch.setattr("zokernel.finetune.run.load_model", lambda *_: pytest.fail("the model was loaded first"))
        assert run("cut", "--max_train_samples", "32", "--resume_from_checkpoint", "last") == 2
    message = capsys.readouterr().err
    assert "(train: 64 rows there, 32 now): give it the same, or choose another --output_dir." in message
    assert len(message.replace(str(tmp_path), "")) < 200
    assert (tmp_path / "cut" / "journal.zkj").read_bytes() == before
    # Where it is logged and how it is asked to continue change nothing.
    assert run("cut", "--logging_steps", "3", "--run_name", "again") == 0
    # A finished run is made longer on request: its steps are not taken again.
    assert run("cut", "--max_steps", "18", "--eval_steps", "4") == 2
    assert "lengthen it with --resume_from_checkpoint last, choose another" in capsys.readouterr().err
    assert run("cut", "--max_steps", "18", "--resume_from_checkpoint", "last") == 0
    assert Journal.read(tmp_path / "cut").num_steps == 18
    # A shorter one is another run, whose weights the journal has.
    assert run("cut", "--max_steps", "9") == 2
    message = capsys.readouterr().err
    assert "(eval_steps" not in message
    assert "(max_steps: 18 there, 9 asked for): rebuild an earlier step with 'zokernel replay --step N', " in message
    assert "lengthen" not in message


def test_a_changed_schedule_does_not_replay(run, tmp_path, monkeypatch, capsys):
    interrupted_run(run, monkeypatch, "--save_strategy", "journal")
    changed = ["--save_strategy", "journal", "--resume_from_checkpoint", "last", "--lr_scheduler_type", "linear"]
    assert run("cut", *changed) == 2
    assert "other settings (lr_scheduler_type: constant there, linear asked for)" in capsys.readouterr().err


def test_another_base_is_not_continued(parts, tmp_path):
    settings = {"save_strategy": "journal", "max_steps": 3}
    make_trainer(parts, tmp_path, **settings).train()
    with pytest.raises(UsageError, match=r"journal of an earlier run.*resume_from_checkpoint=True"):
        make_trainer(parts, tmp_path, **settings).train()
    with pytest.raises(UsageError, match="other base weights"):
        make_trainer(parts, tmp_path, **settings).train(resume_from_checkpoint=True)
    make_trainer(parts, tmp_path, overwrite_output_dir=True, **settings).train()
    assert Journal.read(tmp_path).num_steps == 3


def test_weights_changed_behind_the_optimizer_stop_a_journalled_run(parts, tmp_path):
    from transformers import TrainerCallback

    class Meddler(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    next(model.parameters()).mul_(0.5)

    trainer = make_trainer(parts, tmp_path, save_strategy="journal", max_steps=5)
    trainer.add_callback(Meddler())
    with pytest.raises(RunError, match="Something other than the optimizer changed the weights"):
        trainer.train()
    assert Journal.read(tmp_path).num_steps == 2


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_a_checkpoint_of_a_later_epoch_continues_with_the_same_examples(parts, tmp_path, tiny_lm_path, sampling):
    model, tokenizer, data = parts
    # Without journal, so that every step after the checkpoint is computed again; 8 steps are an epoch.
    settings = {"max_steps": 22, "save_steps": 13, "train_sampling_strategy": sampling, "save_total_limit": None}
    trainer = make_trainer(parts, tmp_path, save_strategy="steps", **settings)
    trainer.train()
    expected = {name: w.clone() for name, w in model.state_dict().items()}
    (tmp_path / "journal.zkj").rename(tmp_path / "aside.zkj")
    fresh = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32).eval()
    settings["save_strategy"] = "no"
    resumed = make_trainer((fresh, tokenizer, data), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    assert same(fresh.state_dict(), expected)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in resumed.state.log_history if "loss" in row] == losses


def test_ctrl_c_with_a_journal_saves_no_weights_and_continues(run, tmp_path, monkeypatch, caplog):
    assert run("whole", "--save_strategy", "journal") == 0
    with ctrl_c_in(monkeypatch, step=6):
        assert run("cut", "--save_strategy", "journal") == 130
    assert "continue with the same command" in caplog.text
    assert Journal.read(tmp_path / "cut").num_steps == 6
    assert not list((tmp_path / "cut").rglob("*.safetensors"))
    assert run("cut", "--save_strategy", "journal") == 0
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_a_second_process_in_the_same_folder_is_turned_away(run, tmp_path, capsys):
    assert run("run") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    holder = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); f.truncate(0); "
    holder += "f.write('pid 77'); f.flush(); print('held', flush=True); sys.stdin.read()"
    lock = str(tmp_path / "run" / ".lock")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", holder, lock], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert run("run", "--overwrite_output_dir", "true") == 1
        assert "Another process (pid 77) is working in" in capsys.readouterr().err
        assert main(["journal", "truncate", str(tmp_path / "run"), "--step", "2"]) == 1
        process.stdin.close()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run("run") == 0


def test_a_full_disk_is_one_sentence_and_damages_nothing(run, tmp_path, monkeypatch, capsys):
    from zokernel.finetune.storage import checkpoint

    flags = ["--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "5"]
    assert run("whole", *flags) == 0
    real = checkpoint.save_state

    def full(path, state):
        if "checkpoint-8" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_state", full)
        assert run("cut", *flags) == 1
    message = capsys.readouterr().err
    assert "cannot be written (No space left on device)" in message
    assert "Traceback" not in message
    assert sorted(path.name for path in (tmp_path / "cut").glob("*checkpoint-*")) == ["checkpoint-4"]
    assert run("cut", *flags) == 0
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    (tmp_path / "file").write_text("")
    assert run("file/run") == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_read_only_folder_is_reported_before_anything_else(run, tmp_path, monkeypatch, capsys):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    assert run("run") == 1
    assert "cannot be written (Read-only file system): choose another" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["mezo", "adamw"])
def test_no_pickle_is_written_or_read(run, tmp_path, method, monkeypatch, capsys):
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(torch, "save", None)
    flags = ["--method", method, "--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "9"]
    assert run("run", *flags) == 0
    folder = tmp_path / "run"
    assert [path for pattern in PICKLES for path in folder.rglob(pattern)] == []
    assert json.loads((folder / "training_args.json").read_text())["method"] == method
    # As transformers writes them: nothing in it may be trusted.
    old = folder / "checkpoint-4"
    for path in (old / "training_state").iterdir():
        path.unlink()
    (old / "optimizer.pt").write_bytes(b"\x80\x04.")
    assert run("run", *flags, "--resume_from_checkpoint", str(old)) == 2
    assert "only pickles (optimizer.pt)" in capsys.readouterr().err


def test_pickled_models_and_adapters_are_refused(run, tmp_path, tiny_lm_path, capsys):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in tiny_lm_path.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert run("run", "--model_name_or_path", str(folder)) == 2
    assert "is a pickle (pytorch_model.bin)" in capsys.readouterr().err
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert run("run", "--adapter_name_or_path", str(adapter)) == 2
    assert "is a pickle (adapter_model.bin)" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_replay_command_rebuilds_what_plain_libraries_load(run, tmp_path, tiny_lm_path, lora, capsys):
    flags = ["--save_strategy", "journal", "--load_best_model_at_end", "false"]
    flags += ["--lora", "true", "--learning_rate", "1e-2"] if lora else []
    assert run("run", *flags) == 0
    rebuilt = ["--journal", str(tmp_path / "run"), "--output_dir", str(tmp_path / "rebuilt")]
    assert main(["replay", "--base", str(tiny_lm_path), *rebuilt]) == 0
    assert same(weights(tmp_path / "rebuilt"), weights(tmp_path / "run"))
    base = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32)
    loaded = []
    for name in ("run", "rebuilt"):
        if lora:
            from peft import PeftModel

            base = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32)
            loaded.append(PeftModel.from_pretrained(base, tmp_path / name))
        else:
            loaded.append(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32))
    ids = torch.arange(7)[None]
    assert torch.equal(loaded[0](ids).logits, loaded[1](ids).logits)
    assert not torch.equal(loaded[0](ids).logits, AutoModelForCausalLM.from_pretrained(tiny_lm_path)(ids).logits)
    assert main(["replay", "--base", str(tiny_lm_path), *rebuilt]) == 2
    assert "already holds files" in capsys.readouterr().err
    early = [*rebuilt[:2], "--output_dir", str(tmp_path / "early"), "--step", "3"]
    assert main(["replay", "--base", str(tiny_lm_path), *early]) == 0
    assert "after step 3 of 14" in capsys.readouterr().out
    assert not same(weights(tmp_path / "early"), weights(tmp_path / "run"))
    assert main(["replay", "--base", str(tmp_path / "run" if not lora else tmp_path / "none"), *early[:-2]]) != 0
    assert main(["journal", "verify", str(tmp_path / "run"), "--base", str(tiny_lm_path)]) == 0
    assert (
        replay(tiny_lm_path, tmp_path / "run", step=0).keys()
        == Journal.read(tmp_path / "run").header["parameters"].keys()
    )


def test_first_order_runs_have_no_journal(run, tmp_path, capsys):
    assert run("run", "--method", "adamw", "--save_strategy", "journal") == 2
    assert "takes gradients, which no journal holds" in capsys.readouterr().err


def test_state_files_keep_every_bit_and_run_no_code(tmp_path):
    path = tmp_path / "state.safetensors"
    shared = torch.arange(6.0)
    state = {
        "state": {0: {"m": shared[:3], "step": 7, "half": torch.ones(2, dtype=torch.bfloat16)}, 5: {"m": shared[3:]}},
        "numbers": [0.1, float("inf"), -0.0, 10**18, None, True, "text"],
        "tuple": (1, (2, [3])),
        "transposed": torch.arange(6).view(2, 3).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0),
    }
    save_state(path, state)
    loaded = load_state(path)
    assert repr(loaded) == repr(state)
    assert torch.equal(loaded["transposed"], state["transposed"])
    with pytest.raises(TypeError, match="without pickling"):
        save_state(path, {"x": object()})
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RunError, match=r"holds tensors but no state of zokernel: resume from another checkpoint\."):
        load_state(tmp_path / "other.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RunError, match="damaged or missing"):
        load_state(path)


def test_no_lock_and_no_empty_folder_is_left(run, tiny_lm_path, tmp_path, capsys):
    """Neither by a finished run nor by one that was refused after it had taken its folder."""
    assert run("runs/finished", "--max_steps", "1") == 0
    assert not (tmp_path / "runs" / "finished" / ".lock").exists()
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_path)
    next(model.parameters()).data[0, 0] = float("nan")
    model.save_pretrained(broken)
    for file in tiny_lm_path.glob("*token*"):
        (broken / file.name).write_bytes(file.read_bytes())
    assert run("other/refused", "--model_name_or_path", str(broken)) != 0
    assert "is NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    (tmp_path / "mine").mkdir()
    assert run("mine", "--model_name_or_path", str(broken)) != 0
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_lock_has_one_owner_even_if_its_file_is_removed(tmp_path):
    """A file that was removed between opening and locking is not the lock any more."""
    with exclusive(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK_FILE).read_text() == f"pid {os.getpid()}"
        with exclusive(tmp_path / "a" / "b"):
            pass
        assert (tmp_path / "a" / "b" / LOCK_FILE).exists()
    assert not (tmp_path / "a").exists()
    real, files = fcntl.lockf, []

    def removed_meanwhile(file, how):
        real(file, how)
        files.append(file)
        if len(files) == 1:
            (tmp_path / LOCK_FILE).unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "lockf", removed_meanwhile)
        with exclusive(tmp_path):
            assert len(files) == 2
            assert os.path.samestat(os.fstat(files[1].fileno()), (tmp_path / LOCK_FILE).stat())
    assert tmp_path.exists()
