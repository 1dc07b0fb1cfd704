"""Which weights a run of zeroth_order(Trainer) ends with: the best, the first or the last."""

from __future__ import annotations

import pytest
import torch
import transformers
from trainer_cases import CASES, arguments, make, weights
from transformers import Trainer

from zokernel.finetune import zeroth_order


def test_a_run_that_gets_worse_ends_with_the_weights_it_began_with(tmp_path, caplog):
    best = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    trainer = make("text_classification", tmp_path, learning_rate=0.1, **best)
    before, loss = weights(trainer), trainer.evaluate()["eval_loss"]
    with caplog.at_level("WARNING"):
        trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert losses[0] == pytest.approx(loss, abs=1e-6)
    assert min(losses[1:]) > loss
    assert trainer.final_step == 0
    assert "No evaluation was better than the one before training" in caplog.text
    for key, tensor in weights(trainer).items():
        assert torch.equal(tensor, before[key]), key


class Cliff(Trainer):
    """The loss is 1 at the start, then high, and far away 0.5 without a slope, as that of a collapsed model is."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        w = model.weight.abs().sum()
        loss = torch.where(w < 2, 1 - 0.1 * model.weight.sum(), torch.where(w < 1e4, 1e3 * w, torch.tensor(0.5)))
        return (loss, {"w": w}) if return_outputs else loss


@pytest.mark.parametrize("save", ["best", "steps"])
@pytest.mark.parametrize("stops", [False, True])
def test_a_collapsed_model_is_no_candidate_for_the_best(save, stops, tmp_path, caplog):
    def run(folder, **settings):
        model = torch.nn.Linear(1, 1, bias=False)
        model.weight.data.zero_()
        settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": save, "save_steps": 1} | settings
        args = arguments(
            tmp_path / folder,
            remove_unused_columns=False,
            label_names=["labels"],
            **(settings | {"learning_rate": 1e3}),
        )
        rows = [{"labels": torch.ones(1)}] * 4
        trainer = zeroth_order(Cliff)(model=model, args=args, train_dataset=rows, eval_dataset=rows)
        if stops:
            trainer.add_callback(transformers.EarlyStoppingCallback(3))
        trainer.train()
        return trainer, [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]

    trainer, losses = run("best", load_best_model_at_end=True)
    assert (losses[0], losses[-1]) == (1.0, 0.5)
    assert trainer.divergence.startswith("Training diverged: the loss of its batches rose from 1 to")
    assert (trainer.final_step, trainer.state.best_global_step, trainer.state.best_metric) == (0, 0, 1.0)
    assert trainer.model.weight.item() == 0.0
    assert "The weights are those of step 0, before that." in caplog.text
    if save == "steps" and not stops:
        caplog.clear()
        trainer, _ = run("last")
        assert abs(trainer.model.weight.item()) > 1e4
        assert "The last weights were kept, as asked." in caplog.text


@pytest.mark.parametrize("rate", [0.5, 1e-3])
def test_a_new_head_is_restored_too(rate, tmp_path):
    """Half of the model is in the folder that it was loaded from; its head is in no file."""
    best = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "load_best_model_at_end": True}
    trainer, kwargs = CASES["text_classification"](tmp_path, learning_rate=rate, **best)
    kwargs["model"].bert.save_pretrained(tmp_path / "body")
    torch.manual_seed(3)
    kwargs["model"] = type(kwargs["model"]).from_pretrained(tmp_path / "body", num_labels=2)
    trainer = zeroth_order(trainer)(**kwargs)
    before = weights(trainer)
    trainer.train()
    same = all(torch.equal(before[key], value) for key, value in weights(trainer).items())
    assert same == (trainer.final_step == 0)
    assert (tmp_path / "run" / "checkpoint-0").exists() == same
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_a_run_that_is_too_short_to_be_evaluated_ends_with_its_last_weights(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 50, "save_steps": 50, "load_best_model_at_end": True}
    trainer = make("text_classification", tmp_path, eval_delay=50, **best)
    before = weights(trainer)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [0]
    assert trainer.final_step == 6
    assert any(not torch.equal(before[key], value) for key, value in weights(trainer).items())
