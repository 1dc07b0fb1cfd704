"""One tiny job for every kind of trainer: model, data, collator and arguments as its users write them.

Each case is a function of a folder and further arguments that returns (trainer class, keyword arguments); everything it
makes is the same each time.  Dropout is on where models have it by default, since a zeroth-order step turns it off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import models
import torch
import transformers
from transformers import Trainer, TrainingArguments

from zokernel.finetune import zeroth_order

COMMON: dict[str, Any] = {
    **{"max_steps": 6, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 4, "learning_rate": 1e-3},
    **{"logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 5},
}
TEXTS = ["It was good", "It was bad", "great", "terrible", "Yes It was right", "No wrong", "Rome", "Oslo bad", "Maybe"]
SIZES, WIDE = ({**sizes, "vocab_size": 320} for sizes in (models.SIZES, models.WIDE))
CASES: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {}


def case(function: Callable[..., tuple[Any, dict[str, Any]]]) -> Any:
    CASES[function.__name__] = function
    return function


def arguments(folder: Any, kind: Any = TrainingArguments, **settings: Any) -> Any:
    return kind(output_dir=str(folder / "run"), **(COMMON | settings))


def build(model: str, config: str, **settings: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**settings))


def encoded(tokenizer: Any, **columns: list[Any]) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"text": TEXTS, **columns})
    return rows.map(lambda row: tokenizer(row["text"]))


@case
def text_classification(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    tokenizer = models.save_tokenizer(folder / "tokenizer", masked=True)
    data = encoded(tokenizer, label=[n % 2 for n in range(len(TEXTS))])

    def compute_metrics(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    return Trainer, {
        "model": build("BertForSequenceClassification", "BertConfig", **WIDE),
        "args": arguments(folder, **settings),
        "train_dataset": data,
        "eval_dataset": data,
        "processing_class": tokenizer,
        "compute_metrics": compute_metrics,
    }


@case
def token_classification(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    tokenizer = models.save_tokenizer(folder / "tokenizer", masked=True)
    data = encoded(tokenizer).map(lambda row: {"labels": [n % 3 for n in range(len(row["input_ids"]))]})
    return Trainer, {
        "model": build("BertForTokenClassification", "BertConfig", num_labels=3, **WIDE),
        "args": arguments(folder, **settings),
        "train_dataset": data.remove_columns("text"),
        "eval_dataset": data.remove_columns("text"),
        "data_collator": transformers.DataCollatorForTokenClassification(tokenizer),
        "processing_class": tokenizer,
    }


@case
def question_answering(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    tokenizer = models.save_tokenizer(folder / "tokenizer", masked=True)
    data = encoded(tokenizer, start_positions=[1] * len(TEXTS), end_positions=[2] * len(TEXTS))
    return Trainer, {
        "model": build("BertForQuestionAnswering", "BertConfig", **WIDE),
        "args": arguments(folder, **settings),
        "train_dataset": data,
        "processing_class": tokenizer,
    }


@case
def causal_language_modelling(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    tokenizer = models.save_tokenizer(folder / "tokenizer")
    data = encoded(tokenizer).remove_columns("text")
    return Trainer, {
        "model": build("GPT2LMHeadModel", "GPT2Config", **SIZES, n_positions=64),
        "args": arguments(folder, gradient_accumulation_steps=2, **settings),
        "train_dataset": data,
        "eval_dataset": data,
        "data_collator": transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        "processing_class": tokenizer,
    }


@case
def masked_language_modelling(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The collator draws the masks."""
    tokenizer = models.save_tokenizer(folder / "tokenizer", masked=True)
    data = encoded(tokenizer).remove_columns("text")
    return Trainer, {
        "model": build("RobertaForMaskedLM", "RobertaConfig", **WIDE),
        "args": arguments(folder, **settings),
        "train_dataset": data,
        "data_collator": transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4),
        "processing_class": tokenizer,
    }


@case
def summarisation(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    tokenizer = models.save_tokenizer(folder / "tokenizer", masked=True)
    data = encoded(tokenizer).map(lambda row: {"labels": tokenizer(row["text"].split()[-1])["input_ids"]})
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 320}
    model = build("T5ForConditionalGeneration", "T5Config", decoder_start_token_id=0, **sizes)
    kind = transformers.Seq2SeqTrainingArguments
    return transformers.Seq2SeqTrainer, {
        "model": model,
        "args": arguments(folder, kind, predict_with_generate=True, generation_max_length=8, **settings),
        "train_dataset": data.remove_columns("text"),
        "eval_dataset": data.remove_columns("text"),
        "data_collator": transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
        "processing_class": tokenizer,
    }


@case
def image_classification(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """A net with batch normalisation, and a data set that draws an augmentation of each image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(9, 3, 16, 16, generator=generator)

    class Augmented(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"pixel_values": images[index].roll(int(torch.randint(8, ())), -1), "labels": index % 2}

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 2}
    return Trainer, {
        "model": build("ResNetForImageClassification", "ResNetConfig", **sizes),
        "args": arguments(folder, **settings),
        "train_dataset": Augmented(),
    }


@case
def own_model_and_loss(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """No model of transformers, a loss in the trainer, and a ``model_init``."""
    points = torch.linspace(-1, 1, 12)

    class Regression(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            y = inputs.pop("y")  # trainers may take entries out of a batch
            prediction = model(inputs["x"])
            loss = (prediction - y).square().mean()
            return (loss, {"prediction": prediction}) if return_outputs else loss

    def model_init() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

    return Regression, {
        "model_init": model_init,
        "args": arguments(folder, remove_unused_columns=False, **settings),
        "train_dataset": [{"x": x.view(1), "y": x.square().view(1)} for x in points],
    }


PROMPTS = [{"prompt": f"It was {a}", "chosen": f" {b}", "rejected": f" {c}"} for a, b, c in
           [("good", "Yes", "No"), ("bad", "No", "Yes"), ("great", "right", "wrong"), ("terrible", "wrong", "right"),
            ("Rome", "Yes", "Maybe"), ("Oslo", "Maybe", "No")]]  # fmt: skip


def trl_case(folder: Any, config: Any, model: str = "LlamaForCausalLM", **settings: Any) -> dict[str, Any]:
    """Return a model, arguments and a tokenizer; a reward model has one output."""
    tokenizer = models.save_tokenizer(folder / "tokenizer")
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    options = {"bf16": False, "max_length": 32} | settings
    sizes = {**WIDE, **ids, "num_key_value_heads": 2, "attention_dropout": 0.1, "num_labels": 1}
    build(model, "LlamaConfig", **sizes).save_pretrained(folder / "model")
    return {
        "model": getattr(transformers, model).from_pretrained(folder / "model"),
        "args": arguments(folder, config, **options),
        "processing_class": tokenizer,
    }


@case
def supervised_finetuning(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    import trl

    rows = datasets.Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in PROMPTS])
    parts = trl_case(folder, trl.SFTConfig, gradient_accumulation_steps=2, **settings)
    return trl.SFTTrainer, {**parts, "train_dataset": rows, "eval_dataset": rows}


@case
def packed_finetuning_of_an_adapter(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    import peft
    import trl

    rows = datasets.Dataset.from_list([{"text": text * 4} for text in TEXTS * 4])
    parts = trl_case(folder, trl.SFTConfig, packing=True, packing_strategy="wrapped", **settings)
    return trl.SFTTrainer, {**parts, "train_dataset": rows, "peft_config": peft.LoraConfig(r=2, lora_dropout=0.1)}


@case
def preference_optimisation(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    import trl

    rows = datasets.Dataset.from_list(PROMPTS)
    return trl.DPOTrainer, {**trl_case(folder, trl.DPOConfig, **settings), "train_dataset": rows, "eval_dataset": rows}


@case
def preference_optimisation_of_an_adapter(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    import peft
    import trl

    rows = datasets.Dataset.from_list(PROMPTS)
    parts = trl_case(folder, trl.DPOConfig, **settings)
    return trl.DPOTrainer, {**parts, "train_dataset": rows, "peft_config": peft.LoraConfig(r=2)}


@case
def unpaired_preferences(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    import trl

    rows = [
        {"prompt": row["prompt"], "completion": row[which], "label": which == "chosen"}
        for row in PROMPTS
        for which in ("chosen", "rejected")
    ]
    data = datasets.Dataset.from_list(rows)
    return trl.KTOTrainer, {**trl_case(folder, trl.KTOConfig, **settings), "train_dataset": data}


@case
def reward_modelling(folder: Any, **settings: Any) -> tuple[Any, dict[str, Any]]:
    import trl

    parts = trl_case(folder, trl.RewardConfig, "LlamaForSequenceClassification", **settings)
    return trl.RewardTrainer, {**parts, "train_dataset": datasets.Dataset.from_list(PROMPTS)}


def make(name, folder, settings=None, **arguments):
    """Return a zeroth-order trainer of a case; ``settings`` are those of the class, the rest training arguments."""
    trainer, kwargs = CASES[name](folder, **arguments)
    return zeroth_order(trainer, **(settings or {}))(**kwargs)


def weights(trainer):
    """Return a copy of all weights and buffers of a trainer's model."""
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
