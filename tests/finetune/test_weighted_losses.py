"""The loss of a batch is the same however it is split: into micro-batches, among processes, or to fit in memory."""

from __future__ import annotations

import os

import pytest
import torch
from models import save_model
from ranks import environment, free_port, spawn
from transformers import AutoModelForCausalLM, AutoTokenizer

from zokernel.finetune import Collator, EncodedDataset, Objective, ZOConfig, ZOTrainer, encode, get_task
from zokernel.finetune.tasks.toy import toy_rows

# Fourteen examples in batches of eight: the last is smaller, and does not split evenly.
BATCH, STEPS = 8, 2
TASKS = {"sst2": 14, "squad": 14, "copa": 14}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


def toy_dataset(name, tokenizer, size, *, seed=0):
    task = get_task(name)
    rows = task.read(toy_rows(name, task, size=size, seed=seed), where="toy")
    if name == "squad":  # answers of very different lengths
        for number, row in enumerate(rows):
            text = " ".join(["Rome"] * (1 + number * 3 % 7))
            row["answers"] = {"text": [text]}
    dataset = EncodedDataset(encode(task, rows, tokenizer, only_answer=task.loss == "answer"))
    return task, dataset


def make(model_path, name, folder, *, dtype=torch.float32, size=None, **settings):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    task, dataset = toy_dataset(name, tokenizer, size or TASKS[name])
    options = {
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "random",
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "precision": "fp32",
        "seed": 3,
        "disable_tqdm": True,
        "report_to": "none",
        **settings,
    }
    return ZOTrainer(
        AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).eval(),
        ZOConfig(output_dir=str(folder), **options),
        objective=Objective(loss=task.loss, kind=task.kind, tokenizer=tokenizer, max_new_tokens=3),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )


def losses(trainer):
    trainer.train()
    return [row["loss"] for row in trainer.run_log.rows]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("method", ["mezo", "sgd"])
def test_accumulation(llama, tmp_path, name, method):
    whole = losses(make(llama, name, tmp_path / "whole", method=method))
    split = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    # Nine examples in steps of 3, 3 and 3 (then 3 and 2), so the same batches as one of nine.
    nine = losses(make(llama, name, tmp_path / "nine", method=method, per_device_train_batch_size=9))
    assert losses(make(llama, name, tmp_path / "split", method=method, **split)) == pytest.approx(nine, rel=1e-6)
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert losses(make(llama, name, tmp_path / "even", method=method, **split)) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_that_is_split_to_fit(llama, tmp_path, name):
    whole = losses(make(llama, name, tmp_path / "whole"))
    trainer = make(llama, name, tmp_path / "found", auto_find_batch_size=True)

    def refuse(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    trainer.model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert losses(trainer) == pytest.approx(whole, rel=1e-6)
    assert trainer.settings["gradient_accumulation_steps"] > 1


def test_stacked_losses(llama, tmp_path):
    options = {"method": "lozo", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    in_place = losses(make(llama, "squad", tmp_path / "in_place", perturb="in_place", **options))
    stacked = losses(make(llama, "squad", tmp_path / "stacked", perturb="stacked", **options))
    assert stacked == pytest.approx(in_place, rel=1e-5)


def run_rank(rank, port, folder, model_path):
    torch.set_num_threads(1)
    os.environ.update(environment(rank, 2, port))
    results = {}
    for name in TASKS:
        half = {"per_device_train_batch_size": BATCH // 2, "zo_parallel": "data", "max_steps": 1}
        half["per_device_eval_batch_size"] = 4
        trainer = make(model_path, name, folder / name, dtype=torch.float64, **half)
        # Thirteen examples, two processes, batches of four: the last ones are padded with others.
        evaluated = {}
        for size in (13, 7, 3):
            _, dataset = toy_dataset(name, trainer.processing_class, size, seed=5)
            evaluated[size] = trainer.evaluate(dataset)["eval_loss"]
        results[name] = losses(trainer), evaluated
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, llama):
    folder = tmp_path_factory.mktemp("two")
    spawn(run_rank, free_port(), folder, llama, size=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", TASKS)
def test_two_processes(two_processes, llama, tmp_path, name):
    whole = make(llama, name, tmp_path, dtype=torch.float64, max_steps=1)
    expected = losses(whole)
    for rank in two_processes:
        assert rank[name][0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_an_evaluation_counts_every_example_once(two_processes, llama, tmp_path, name):
    """By one process in one batch, by one in several, and by two that need padding: the same loss."""
    trainer = make(llama, name, tmp_path, dtype=torch.float64)
    for size, actual in two_processes[0][name][1].items():
        assert actual == two_processes[1][name][1][size]
        _, dataset = toy_dataset(name, trainer.processing_class, size, seed=5)
        batch = trainer.data_collator([dataset[n] for n in range(size)])
        with torch.no_grad():
            expected = trainer.objective(trainer.model, batch).item()
        assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(expected, rel=1e-6)
        assert actual == pytest.approx(expected, rel=1e-6)
