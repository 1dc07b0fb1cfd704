"""Runs with a direction for every example: prompts, options of several tokens, chats; resumed, replayed, refused."""

from __future__ import annotations

import json

import pytest
import torch
from interrupted import ctrl_c_in
from models import build
from safetensors.torch import load_file
from test_text_losses import documents, loud

from zokernel.cli import main
from zokernel.estimators.per_example import offsets_of
from zokernel.finetune import Collator, EncodedDataset, encode
from zokernel.finetune.data.collate_text import TextCollator, TextDataset
from zokernel.finetune.scoring.language import LanguageObjective
from zokernel.finetune.scoring.objective import Objective
from zokernel.finetune.tasks import get_task
from zokernel.finetune.trainer.micro_batches import MicroBatches
from zokernel.journal import Journal
from zokernel.optim import GRZO
from zokernel.perturb import PerExampleRows

GRZO_FLAGS = ("--method", "grzo", "--method_args", "whiten=false")


def prompt_batches(tokenizer, words, *, shared):
    task = get_task("sst2", label_words=words)
    rows = [{"sentence": f"film {'good ' * n}", "label": n % 2} for n in range(5)]
    data = EncodedDataset(encode(task, rows, tokenizer))
    collate = Collator(tokenizer.pad_token_id, shared_prompt=shared)
    return [collate([data[i] for i in part]) for part in ((0, 1, 2), (3, 4))]


def text_batches():
    data = TextDataset(documents(9, 17, 12, 20, 8))
    collate = TextCollator(0)
    return [collate([data[i] for i in part]) for part in ((0, 1, 2), (3, 4))]


def objective_and_batches(kind, tokenizer):
    """Return an objective and two micro-batches that do not weigh the same."""
    if kind.startswith("chat"):
        return LanguageObjective(whole=kind == "chat, whole head"), text_batches()
    words = ["bad", "good"] if kind == "one token" else ["really not good", "good"]
    loss = "answer" if kind == "answers" else "options"
    return Objective(loss=loss), prompt_batches(tokenizer, words, shared=kind == "shared prompt")


def micro_batches(kind, model, tokenizer):
    objective, batches = objective_and_batches(kind, tokenizer)
    together = MicroBatches(
        lambda batch: objective(model, batch),
        None,
        objective.weight,
        lambda batch: objective.example_terms(model, batch),
    )
    for batch in batches:
        together.add(batch)
    return together


KINDS = ("one token", "several tokens", "shared prompt", "answers", "chat", "chat, whole head")


@pytest.fixture
def model_and_tokenizer(tiny_lm_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_path)
    torch.manual_seed(0)
    return loud(build("llama", vocab_size=max(120, len(tokenizer)))), tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_examples_make_up_the_loss_of_the_batch(kind, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    together = micro_batches(kind, model, tokenizer)
    with torch.no_grad():
        losses = torch.cat([part.losses() for part in together.examples()])
        assert len(losses) == 5
        assert float(losses.mean()) == pytest.approx(float(together.loss()), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_each_example_sees_its_own_weights(kind, model_and_tokenizer):
    """Against the weights moved for one example after another: fp32, differences of losses to 1e-5."""
    model, tokenizer = model_and_tokenizer
    together = micro_batches(kind, model, tokenizer)
    optimizer = GRZO(model, lr=0.0, eps=1e-2, whiten=False, perturb=PerExampleRows(together.examples))
    optimizer.step(lambda: 0.0)
    params = dict(model.named_parameters())
    expected = []
    with torch.no_grad():
        for offset in (1e-2, -1e-2):
            for example in range(5):
                base = {name: p.clone() for name, p in params.items()}
                for index, scale in offsets_of({0: offset}, example).items():
                    optimizer.directions.add_(params, scale, seed=0, step=0, index=index)
                expected.append(float(torch.cat([part.losses() for part in together.examples()])[example]))
                for name, p in params.items():
                    p.copy_(base[name])
    assert optimizer.record() == pytest.approx(expected, abs=2e-5)
    assert max(expected) - min(expected) > 1e-2


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_is_resumed_and_replayed_to_the_same_bits(flags, tmp_path, monkeypatch):
    whole = [*flags, *GRZO_FLAGS, "--save_strategy", "journal", "--gradient_accumulation_steps", "2"]
    whole += ["--load_best_model_at_end", "false"]
    assert main(["finetune", *whole]) == 0
    cut = [*whole, "--output_dir", str(tmp_path / "cut")]
    with ctrl_c_in(monkeypatch, step=4):
        assert main(["finetune", *cut]) == 130
    assert Journal.read(tmp_path / "cut").num_steps == 4
    assert main(["finetune", *cut]) == 0
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "run"))
    base, out = flags[flags.index("--model_name_or_path") + 1], tmp_path / "rebuilt"
    assert main(["replay", "--base", base, "--journal", str(tmp_path / "run"), "--output_dir", str(out)]) == 0
    assert same(weights(out), weights(tmp_path / "run"))
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    assert next(row["value"] for row in settings if row["name"] == "perturb") == "per_example"


def test_forward_difference_takes_them_too(flags, tmp_path):
    args = ("--method", "forward_difference", "--method_args", "per_example=true", "rank=1", "normalize=true")
    assert main(["finetune", *flags, *args]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["forwards"] == 6 * 3


def test_objectives_without_losses_of_examples_are_refused(flags, capsys):
    assert main(["finetune", *flags, *GRZO_FLAGS, "--objective", "accuracy"]) == 2
    assert "objective accuracy is not a mean over losses of examples" in capsys.readouterr().err


def test_trainers_with_a_custom_loss_are_refused(tmp_path, parts):
    from transformers import Trainer, TrainingArguments

    from zokernel.errors import UsageError
    from zokernel.finetune import zeroth_order

    model = parts[0]
    rows = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}] * 8
    trainer = zeroth_order(Trainer, method="grzo", learning_rate=1e-4)(
        model, TrainingArguments(str(tmp_path), max_steps=2, report_to="none", save_strategy="no"), train_dataset=rows
    )
    with pytest.raises(UsageError, match="grzo needs the loss of each example"):
        trainer.train()
