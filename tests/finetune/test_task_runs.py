"""Runs on the published tasks: twenty steps of each in both forms, objectives, calibration, demonstrations."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from models import save_model
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from zokernel.errors import UsageError
from zokernel.finetune import Collator, EncodedDataset, Objective, ZOConfig, ZOTrainer, encode, get_task
from zokernel.finetune.data.check_text import check_text
from zokernel.finetune.data.datasets import Splits
from zokernel.finetune.scoring.prepare import Inputs, prepare
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.tasks import TASKS, demonstrations
from zokernel.finetune.tasks.generation import GenerationTask
from zokernel.finetune.tasks.toy import toy_rows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A causal and a masked model, and their weights to start every task from."""
    loaded = {}
    for family, auto in (("llama", AutoModelForCausalLM), ("roberta", AutoModelForMaskedLM)):
        folder = save_model(tmp_path_factory.mktemp(family), family)
        model = auto.from_pretrained(folder, dtype=torch.float32).eval()
        start = {name: w.clone() for name, w in model.state_dict().items()}
        loaded[family] = model, AutoTokenizer.from_pretrained(folder), start
    return loaded


SAME_WORDING = {"movie-reviews", "mr", "cr", "mpqa", "cola", "qqp"}  # made by the same lines as another task


def short_run(folder, **settings):
    return ZOConfig(
        output_dir=str(folder),
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        precision="fp32",
        disable_tqdm=True,
        report_to="none",
        **settings,
    )


# Masked language models do not generate; that they refuse is tested elsewhere.
RUNS = [
    (family, name)
    for name in sorted(set(TASKS) - SAME_WORDING)
    for family in ("llama", "roberta")
    if family == "llama" or get_task(name).kind != "generation"
]


@pytest.mark.parametrize(("family", "name"), RUNS)
def test_twenty_steps_of_every_task(models, tmp_path, family, name):
    """The pipeline of the command line without its reports: read, encode, train, evaluate."""
    model, tokenizer, start = models[family]
    model.load_state_dict(start)
    task, masked = get_task(name), family == "roberta"
    splits = {
        split: EncodedDataset(
            encode(
                task,
                task.read(toy_rows(name, task, size=size, seed=seed), where=split),
                tokenizer,
                masked=masked,
                max_length=128,
                only_answer=split == "train" and task.loss == "answer",
            )
        )
        for seed, (split, size) in enumerate((("train", 16), ("validation", 6)))
    }
    config = short_run(
        tmp_path,
        max_steps=20,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
    )
    trainer = ZOTrainer(
        model,
        config,
        objective=Objective(loss=task.loss, kind=task.kind, tokenizer=tokenizer, max_new_tokens=4),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=Collator(tokenizer.pad_token_id, shared_prompt=not masked),
    )
    trainer.train()
    metrics = trainer.evaluate()
    losses = [row["loss"] for row in trainer.run_log.rows]
    assert len(losses) == 20
    # The loss of a wrong gather or an empty target would be constant, zero or not finite.
    assert len(set(losses)) > 10
    assert 0 < metrics["eval_loss"] < 20
    assert 0 <= metrics[f"eval_{task.metric}"] <= 1


def test_the_loss_on_the_answer_is_the_mean_over_the_batchs_tokens(models):
    model, tokenizer, start = models["llama"]
    model.load_state_dict(start)
    task = get_task("copa")
    rows = task.read(toy_rows("copa", task, size=5), where="toy")
    prompts_and_answers, answers = (
        EncodedDataset(encode(task, rows, tokenizer, only_answer=only_answer)) for only_answer in (False, True)
    )
    total = tokens = 0
    with torch.no_grad():
        for row in rows:
            prompt, option = task.prompt(row), task.options(row)[task.label(row)]
            ids = tokenizer(prompt + option)["input_ids"]
            first = len(tokenizer(prompt)["input_ids"])
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total -= sum(logprobs[t - 1, ids[t]].item() for t in range(first, len(ids)))
            tokens += len(ids) - first
        for dataset in (prompts_and_answers, answers):
            for shared in (False, True):
                batch = Collator(tokenizer.pad_token_id, shared_prompt=shared)([dataset[i] for i in range(5)])
                assert Objective(loss="answer", kind="choice")(model, batch).item() == pytest.approx(
                    total / tokens, rel=1e-5
                )


def test_an_objective_without_gradient_is_descended(models, tmp_path):
    model, tokenizer, start = models["llama"]
    model.load_state_dict(start)
    task = get_task("sst2")
    train = EncodedDataset(encode(task, toy_rows("sst2", task, size=64), tokenizer))
    config = short_run(
        tmp_path,
        objective="accuracy",
        max_steps=40,
        learning_rate=3e-3,
        eps=2e-2,
        num_perturbations=4,
        per_device_train_batch_size=64,
    )
    trainer = ZOTrainer(
        model, config, train_dataset=train, eval_dataset=train, data_collator=Collator(tokenizer.pad_token_id)
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] == pytest.approx(1 - after["eval_accuracy"])
    assert after["eval_accuracy"] >= before["eval_accuracy"] + 0.2
    config = short_run(tmp_path, objective="accuracy", method="adamw")
    with pytest.raises(UsageError, match="has no gradient for adamw"):
        ZOTrainer(model, config, train_dataset=train)


def test_f1_of_generated_answers_is_an_objective(models):
    model, tokenizer, start = models["llama"]
    model.load_state_dict(start)
    task = get_task("squad")
    rows = task.read(toy_rows("squad", task, size=3), where="toy")
    dataset = EncodedDataset(encode(task, rows, tokenizer))
    batch = Collator(tokenizer.pad_token_id)([dataset[i] for i in range(3)])
    objective = Objective("f1", loss="answer", kind="generation", tokenizer=tokenizer, max_new_tokens=4)
    loss, outputs = objective.evaluate(model, batch)
    assert objective(model, batch).item() == loss.item() == 1 - outputs["values"][:, 0].mean().item()
    with pytest.raises(UsageError, match="scored by f1"):
        Objective("accuracy", kind="generation")
    with pytest.raises(UsageError, match="objective must be"):
        Objective("bleu")


def test_calibration_subtracts_the_scores_of_an_empty_prompt(models):
    model, tokenizer, start = models["llama"]
    model.load_state_dict(start)
    task = get_task("sst2")
    rows = toy_rows("sst2", task, size=8)
    dataset, empty = (EncodedDataset(encode(task, r, tokenizer)) for r in (rows, [{"sentence": "", "label": 0}]))
    collator = Collator(tokenizer.pad_token_id)
    batch, blank = collator([dataset[i] for i in range(8)]), collator([empty[0]])
    with torch.no_grad():
        loss, plain = Objective().evaluate(model, batch)
        same, calibrated = Objective(calibration=blank).evaluate(model, batch)
        shift = Objective().evaluate(model, blank)[1]["logits"]
    torch.testing.assert_close(calibrated["logits"], plain["logits"] - shift)
    assert same.item() == loss.item()
    assert (calibrated["predicted"] == (plain["logits"] - shift).argmax(1)).all()


def test_calibration_has_the_demonstrations_before_the_empty_prompt(models):
    """Their bias, such as that of the last answer shown, is what calibration is for."""
    model, tokenizer, _ = models["llama"]
    task = get_task("sst2")
    rows = toy_rows("sst2", task, size=12)
    splits, data = Splits(rows[:8], rows[8:10], rows[10:]), DataArguments(num_demonstrations=2, calibrate=True)
    prepared = prepare(Inputs(task, splits, model, tokenizer, data, max_length=512))
    blank = prepared.objective.calibration
    ids = blank["input_ids"][blank["attention_mask"].bool()].tolist()
    empty = task.prompt({"sentence": "", "label": 0})
    assert prepared.context == demonstrations(task, rows[:2])
    assert ids == tokenizer(prepared.context + empty).input_ids


def test_demonstrations_precede_the_prompt_and_give_way_first(models):
    _, tokenizer, _ = models["llama"]
    task = get_task("sst2")
    rows = [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": 0}]
    context = demonstrations(task, rows)
    assert context == "good It was great\n\nbad It was terrible\n\n"
    assert demonstrations(task, rows[:1], masked=True) == "good It was great.\n\n"
    row = [{"sentence": "so so", "label": 1}]
    (full,) = encode(task, row, tokenizer, context=context)
    assert tokenizer.decode(full.prompt_ids, skip_special_tokens=True) == context + "so so It was"
    (cut,) = encode(task, row, tokenizer, context=context, max_length=12)
    assert cut.prompt_ids == [tokenizer.bos_token_id, *full.prompt_ids[-10:]]  # with one more for the option


def test_long_masked_prompts_keep_their_mask_and_ends(models):
    _, tokenizer, _ = models["roberta"]
    long = "bad " * 100
    (front,) = encode(get_task("sst2"), [{"sentence": long, "label": 0}], tokenizer, masked=True, max_length=40)
    (back,) = encode(get_task("trec"), [{"question": long, "label": 0}], tokenizer, masked=True, max_length=60)
    for example, limit in ((front, 40), (back, 60)):
        assert len(example.prompt_ids) + max(map(len, example.option_ids)) + len(example.suffix_ids) == limit
        assert example.prompt_ids[0] == tokenizer.bos_token_id
        assert example.suffix_ids[-1] == tokenizer.eos_token_id
    text = "It was <mask> here"
    (example,) = encode(get_task("sst2"), [{"sentence": text, "label": 0}], tokenizer, masked=True)
    assert tokenizer.mask_token_id not in example.prompt_ids  # what is typed in a row stays text; ours is not there
    assert tokenizer.decode(example.prompt_ids[1:]) == "It was <mask> here It was"


@pytest.mark.parametrize(
    ("kind", "ending", "message"),
    [
        *(("causal", ending, "") for ending in ("\n", "\n###", " END", "</s>")),
        *(("causal", ending, "cannot stop: leave out") for ending in ("", "  ")),
        ("causal", "\u2028", "this tokenizer writes as '.*': choose another ending"),
        *(("seq2seq", ending, "") for ending in ("\n", "", " END")),
        ("seq2seq", "\u2028#", "this tokenizer writes as '.*': choose another ending"),
    ],
)
def test_answers_end_where_decoding_stops(kind, ending, message, models):
    _, tokenizer, _ = models["llama"]
    task, rows = GenerationTask("{question}", label_column="answer", ending=ending), [{"question": "?", "answer": "a"}]
    if "\u2028" in ending:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u2028", "\n")
    expected = pytest.raises(UsageError, match=message) if message else nullcontext()
    with expected:
        check_text(task, rows, tokenizer, DataArguments(), kind=kind, objective="cross_entropy")


def test_answers_that_hold_their_ending_are_counted(caplog, models):
    _, tokenizer, _ = models["llama"]
    task = GenerationTask("{question}", label_column="answer")
    answers = ["Ada", "Ada\nLovelace", ["Ada\nLovelace", "Ada"], " Ada\n"]
    rows = [{"question": "Who?", "answer": answer} for answer in answers]
    check_text(task, rows, tokenizer, DataArguments(), kind="causal", objective="cross_entropy")
    assert "1 of 4 training examples have answers that hold their ending" in caplog.text
    caplog.clear()
    check_text(task, rows[:1], tokenizer, DataArguments(), kind="causal", objective="cross_entropy")
    assert caplog.text == ""
