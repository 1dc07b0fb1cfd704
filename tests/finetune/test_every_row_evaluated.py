"""``dataloader_drop_last`` leaves training rows out, and no row of an evaluation."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import EarlyStoppingCallback, Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune import ZOConfig, zeroth_order


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x, labels):
        return {"loss": ((self.layer(x)[:, 0] - labels) ** 2).mean(), "logits": self.layer(x)}


def rows(count):
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(3, generator=generator), "labels": torch.randn((), generator=generator)} for _ in range(count)
    ]


def arguments(folder, **options):
    return TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        report_to="none",
        learning_rate=1e-3,
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


@pytest.mark.parametrize("count", [3, 6])
def test_a_trainer_evaluates_every_row(count, tmp_path):
    set_seed(0)
    results = {}
    for drop in (False, True):
        set_seed(0)
        trainer = zeroth_order(Trainer)(
            Linear(),
            arguments(tmp_path / str(drop), dataloader_drop_last=drop),
            train_dataset=rows(9),
            eval_dataset=rows(count),
        )
        results[drop] = (trainer.evaluate()["eval_loss"], len(trainer.predict(rows(count)).predictions))
        assert len(trainer.get_train_dataloader()) == (2 if drop else 3)
    assert results[True] == results[False]
    assert results[True][1] == count


def test_the_job_evaluates_every_row(flags, tmp_path):
    metrics = []
    for n, words in enumerate([[], ["--dataloader_drop_last", "true"]]):
        folder = tmp_path / f"run{n}"
        words = [*flags, "--output_dir", str(folder), "--per_device_eval_batch_size", "32", "--max_steps", "2", *words]
        assert main(["finetune", *words]) == 0
        metrics.append(json.loads((folder / "metrics.json").read_text()))
    assert metrics[0]["before"] == metrics[1]["before"]
    assert metrics[0]["evaluations"][0] == metrics[1]["evaluations"][0]


def test_there_is_no_warning_about_early_stopping_where_the_best_weights_are_taken(tmp_path, caplog):
    for best, times in ((True, 0), (False, 1)):
        caplog.clear()
        args = arguments(
            tmp_path / str(best),
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            metric_for_best_model="loss",
            load_best_model_at_end=best,
        )
        trainer = zeroth_order(Trainer)(
            Linear(), args, train_dataset=rows(8), eval_dataset=rows(4), callbacks=[EarlyStoppingCallback(2)]
        )
        with caplog.at_level("WARNING", logger="transformers"):
            trainer.train()
        assert sum("load_best_model_at_end" in message for message in caplog.messages) == times


def test_a_zoconfig_for_a_trainer_with_its_own_arguments_is_refused_in_one_sentence(tmp_path):
    trl = pytest.importorskip("trl")
    for kind, expected in ((trl.SFTTrainer, "SFTConfig"), (Seq2SeqTrainer, "Seq2SeqTrainingArguments")):
        with pytest.raises(
            UsageError, match=rf"{kind.__name__} takes a {expected}, not a ZOConfig: give it {expected}"
        ):
            zeroth_order(kind)(model=Linear(), args=ZOConfig(output_dir=str(tmp_path)), train_dataset=rows(4))
    trainer = zeroth_order(Trainer)(
        Linear(), ZOConfig(output_dir=str(tmp_path), report_to="none"), train_dataset=rows(8)
    )
    assert trainer.args.method == "mezo"
