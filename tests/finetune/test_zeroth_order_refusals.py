"""zeroth_order(Trainer) refuses trainers, losses and settings that it cannot honour, with a sentence that says why."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from trainer_cases import CASES
from transformers import Trainer

from zokernel.errors import UsageError
from zokernel.finetune import zeroth_order


@pytest.mark.parametrize("wrong", ["Trainer", None, dict, 3])
def test_a_class_that_is_no_trainer_is_refused(wrong):
    with pytest.raises(UsageError, match="takes a class"):
        zeroth_order(wrong)


def test_a_loss_that_draws_is_refused(tmp_path):
    class Noisy(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs) + torch.rand(())

    _, kwargs = CASES["text_classification"](tmp_path)
    with pytest.raises(UsageError, match=r"gave the losses .* at the same weights"):
        zeroth_order(Noisy)(**kwargs).train()


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (None, r"Own.compute_loss returned None: it must return the batch's loss"),
        (0.5, r"compute_loss returned a float"),
        (torch.zeros(3), r"compute_loss returned a tensor of shape \(3,\)"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(loss, match, tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return loss

    _, kwargs = CASES["text_classification"](tmp_path)
    with pytest.raises(UsageError, match=match):
        zeroth_order(Own)(**kwargs).train()


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("by_accelerate", [False, True])
@pytest.mark.parametrize("perturb", ["in_place", "in_forward"])
def test_a_loss_that_calls_backward_is_refused(perturb, by_accelerate, with_gradients, tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            with torch.set_grad_enabled(with_gradients):
                loss = super().compute_loss(model, inputs)
                self.accelerator.backward(loss) if by_accelerate else loss.backward()
            return loss.detach()

    _, kwargs = CASES["text_classification"](tmp_path)
    with pytest.raises(UsageError) as caught:
        zeroth_order(Own, perturb=perturb)(**kwargs).train()
    assert str(caught.value) == (
        "ZerothOrderOwn.compute_loss must not call backward, because a zeroth-order step takes losses alone: return "
        "the loss, and leave out loss.backward() and zero_grad()."
    )


def test_a_loss_that_calls_backward_is_refused_while_the_batch_is_fitted(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs)
            loss.backward()
            return loss

    _, kwargs = CASES["text_classification"](tmp_path)
    kwargs["args"].auto_find_batch_size = True
    with pytest.raises(UsageError, match=r"^ZerothOrderOwn\.compute_loss must not call backward"):
        zeroth_order(Own)(**kwargs).train()


def test_a_loss_function_that_calls_backward_is_named(tmp_path):
    def own(outputs, labels, num_items_in_batch=None):
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        loss.backward()
        return loss

    _, kwargs = CASES["text_classification"](tmp_path)
    with pytest.raises(UsageError, match=r"^compute_loss_func must not call backward"):
        zeroth_order(Trainer)(**kwargs, compute_loss_func=own).train()


def test_a_loss_that_takes_derivatives_is_told_to_enable_them(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs)
            return torch.autograd.grad(loss, list(model.parameters()))[0].norm()

    _, kwargs = CASES["text_classification"](tmp_path)
    with pytest.raises(UsageError, match=r"^ZerothOrderOwn\.compute_loss calls torch\.autograd\.grad"):
        zeroth_order(Own)(**kwargs).train()


def test_trainers_that_sample_are_refused():
    trl = pytest.importorskip("trl")
    for trainer in (trl.GRPOTrainer, trl.RLOOTrainer, trl.DistillationTrainer):
        with pytest.raises(UsageError, match=f"{trainer.__name__} samples new completions"):
            zeroth_order(trainer)
    for module, name in (("iw_opd", "IWOPDTrainer"), ("sdft", "SDFTTrainer"), ("sdpo", "SDPOTrainer"),
                         ("a2po", "A2POTrainer"), ("async_grpo", "AsyncGRPOTrainer")):  # fmt: skip
        trainer = getattr(importlib.import_module(f"trl.experimental.{module}"), name)
        with pytest.raises(UsageError, match=f"{name} samples new completions"):
            zeroth_order(trainer)


def test_trainers_with_their_own_loop_are_refused(tmp_path):
    class OwnOptimizer(Trainer):
        def create_optimizer(self, *args):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    class OwnStep(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return torch.zeros(())

    _, kwargs = CASES["text_classification"](tmp_path / "a")
    with pytest.raises(UsageError, match="OwnOptimizer makes an optimizer of its own"):
        zeroth_order(OwnOptimizer)(**kwargs).train()
    _, kwargs = CASES["text_classification"](tmp_path / "b")
    with pytest.raises(UsageError, match=r"OwnStep\.training_step took no zeroth-order step"):
        zeroth_order(OwnStep)(**kwargs).train()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"methods": "mezo"}, r"no setting 'methods' \(did you mean method\?\)"),
        ({"method": "mezzo"}, "There is no method 'mezzo': choose one of auto, adamw, (?!.*grzo).*mezo"),
        ({"perturb": "sideways"}, "perturb must be one of"),
        ({"save_strategy": "sometimes"}, "save_strategy must be one of no, .*, journal, not 'sometimes'"),
        ({"zo_point_ranks": 2, "zo_parallel": "data"}, "zo_point_ranks is for zo_parallel hybrid"),
        ({"method": "adamw", "perturb": "in_place"}, "perturb says how the losses .* adamw takes gradients"),
        ({"method": "sgd", "zo_parallel": "perturbation"}, "zo_parallel says how .* sgd takes gradients"),
        ({"method_args": "kernel_order=3"}, r'write \["kernel_order=3"\]'),
        *(({"learning_rate": rate}, "learning_rate must be at least 0, not") for rate in (-1.0, float("nan"), "1e-3")),
    ],
)
def test_wrong_settings_are_refused_when_the_class_is_made(settings, match):
    with pytest.raises(UsageError, match=match):
        zeroth_order(Trainer, **settings)


def test_arguments_that_a_step_cannot_honour_are_refused(tmp_path):
    _, kwargs = CASES["text_classification"](tmp_path, neftune_noise_alpha=5.0)
    with pytest.raises(UsageError, match=r"neftune_noise_alpha=5\.0 cannot be honoured"):
        zeroth_order(Trainer)(**kwargs)
    _, kwargs = CASES["text_classification"](tmp_path)
    with pytest.raises(UsageError, match="stacked"):
        zeroth_order(Trainer, perturb="stacked")(**kwargs).train()
    optimizer = torch.optim.SGD(kwargs["model"].parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"zeroth_order\(Trainer, method='kerzoo'\)"):
        zeroth_order(Trainer)(**kwargs, optimizers=(optimizer, None))
