"""``--profile``: parts that add up, a trace that a viewer reads, and steps that are the same with and without it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trainers import make_trainer

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune.monitor import profile as module
from zokernel.finetune.monitor.profile import EVALUATION, MEANING, TIMED, Stopwatch


def read_table(folder) -> dict[str, tuple[float, str]]:
    rows = re.findall(r"^\| ([^|*]+) \| ([\d.]+) \| ([^|]*) \|", (folder / "profile.md").read_text(), re.MULTILINE)
    return {part: (float(milliseconds), share.strip()) for part, milliseconds, share in rows}


def test_every_instant_belongs_to_the_innermost_part(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0, 36.0, 45.0])
    monkeypatch.setattr(module, "_now", lambda: next(ticks))
    watch = Stopwatch()
    watch.start()
    watch.enter("update")  # at 1
    watch.enter("forwards")  # at 3
    watch.leave()  # at 6
    watch.leave()  # at 10
    watch.enter(EVALUATION)  # at 15
    watch.enter("forwards")  # at 21
    watch.leave()  # at 28
    watch.leave()  # at 36
    watch.stop()  # at 45
    watch.leave()  # after the end nothing counts
    assert watch.seconds == {"rest": 1 + 5 + 9, "update": 2 + 4, "forwards": 3, EVALUATION: 6 + 7 + 8}


def test_the_command_writes_a_table_and_a_trace(flags, tmp_path, capsys):
    options = ["--profile", "true", "--max_steps", "10", "--eval_steps", "4", "--perturb", "in_forward"]
    assert main(["finetune", *flags, *options]) == 0
    folder = tmp_path / "run"
    table = read_table(folder)
    assert list(table) == list(MEANING)
    for part in ("forwards", "perturbation", "update", "data", "journal", "logging", EVALUATION):
        assert table[part][0] > 0, part
    shares = [float(share.removesuffix(" %")) for _, share in table.values() if share]
    assert len(shares) == len(MEANING) - 1
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))
    assert "2 losses per step, perturb in_forward; fp32" in (folder / "profile.md").read_text()
    events = json.loads((folder / "profile.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events if event.get("ph") == "X"]
    # Two recorded steps of two losses each; the first of them began before the recording did.
    assert names.count("zokernel: forwards") == 4
    assert names.count("zokernel: update") >= 2
    assert "zokernel: perturbation" in names
    assert any(name.startswith("aten::") for name in names)


@pytest.mark.parametrize("perturb", ["in_place", "in_forward", "stacked"])
def test_a_profile_changes_no_weight_and_leaves_nothing_behind(parts, tmp_path, perturb):
    model, tokenizer, data = parts
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {}
    for profile in (False, True):
        model.load_state_dict(state)
        torch.manual_seed(0)
        tuned = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)).eval()
        folder = tmp_path / str(profile)
        trainer = make_trainer((tuned, tokenizer, data), folder, max_steps=11, perturb=perturb, profile=profile)
        trainer.train()
        weights[profile] = {name: p.clone() for name, p in tuned.named_parameters() if p.requires_grad}
        model = tuned.unload()
    assert all(torch.equal(weights[True][name], tensor) for name, tensor in weights[False].items())
    assert "compute_loss" not in vars(trainer)
    assert "step" not in vars(trainer.bare_optimizer)
    assert not any(hasattr(method, "__wrapped__") for method in vars(trainer.bare_optimizer.perturb).values())
    table = read_table(tmp_path / "True")
    measured = sum(row["seconds"] for row in trainer.run_log.rows[-1:])  # of all eleven steps
    assert 0 < TIMED * table["forwards"][0] / 1e3 < measured
    assert not (tmp_path / "False" / "profile.md").exists()


def test_steps_from_the_journal_are_not_profiled(flags, tmp_path):
    assert main(["finetune", *flags, "--save_strategy", "journal"]) == 0
    longer = ["--max_steps", "15", "--save_strategy", "journal", "--resume_from_checkpoint", "last"]
    assert main(["finetune", *flags, *longer, "--profile", "true"]) == 0
    assert read_table(tmp_path / "run")["forwards"][0] > 0


def test_too_few_steps_and_gradients_are_refused(parts, tmp_path):
    with pytest.raises(UsageError, match="profile takes 9 steps"):
        make_trainer(parts, tmp_path / "short", profile=True, max_steps=8)
    with pytest.raises(UsageError, match="not those of sgd"):
        make_trainer(parts, tmp_path / "first", profile=True, method="sgd")


def test_training_that_ends_early_says_so(parts, tmp_path, caplog):
    trainer = make_trainer(parts, tmp_path / "short", profile=True, max_steps=-1, num_train_epochs=0.5)
    trainer.train()
    assert "No profile was written" in caplog.text
    assert "compute_loss" not in vars(trainer)
