"""load_predictor: a finished run answers new rows as it scored its own."""

from __future__ import annotations

import json
import logging

import pytest
import runs
import torch
from runs import SHORT

from zokernel.cli import main
from zokernel.data import load_table
from zokernel.errors import UsageError
from zokernel.finetune import get_task, load_predictor
from zokernel.finetune.predict import Predictor
from zokernel.finetune.tasks.serialization import task_values
from zokernel.private_apis import attention_implementation


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_lm_path, tiny_reviews_path):
    return runs.short(tmp_path_factory.mktemp("predict") / "run", tiny_lm_path, tiny_reviews_path)


def test_the_accuracy_of_the_predictions_is_that_of_the_run(run, tiny_reviews_path):
    rows = load_table(tiny_reviews_path / "test.jsonl")
    answers = load_predictor(run)(rows, batch_size=7)
    right = [answer["prediction"] == row["label"] for row, answer in zip(rows, answers, strict=True)]
    metrics = json.loads((run / "metrics.json").read_text())
    assert sum(right) / len(rows) == pytest.approx(metrics["after"]["accuracy"], abs=1e-6)
    for answer in answers:
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-6)
        assert answer["score"] == max(answer["scores"].values()) == answer["scores"][str(answer["prediction"])]
        assert answer["word"] == ("bad", "good")[answer["prediction"]]


def test_texts_rows_and_batches_give_the_same_scores(run):
    texts = ["It was good and I liked every part of it", "bad", "It was right"]
    predictor = load_predictor(run)
    one = predictor(texts)
    rows = predictor([{"sentence": text, "other": 1} for text in texts], batch_size=1)
    for left, right in zip(one, rows, strict=True):
        assert left["scores"] == pytest.approx(right["scores"], abs=1e-6)


def test_the_loss_of_its_scores_is_that_of_plain_transformers(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    ids = tokenizer("a joy It was", return_tensors="pt")
    words = [tokenizer(f"a joy It was {word}")["input_ids"][-1] for word in ("bad", "good")]
    with torch.no_grad():
        shares = model(**ids).logits[0, -1, words].softmax(-1).tolist()
    assert list(load_predictor(run)(["a joy"])[0]["scores"].values()) == pytest.approx(shares, abs=1e-5)


@pytest.mark.parametrize("lora", ["false", "true"])
def test_a_checkpoint_answers_with_its_own_weights(lora, tmp_path, tiny_lm_path, tiny_reviews_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["--template", "{sentence} It was", "--label_words", "bad", "good", "--learning_rate", "1e-2"]
    files = ["--model_name_or_path", str(tiny_lm_path), "--train_file", str(tiny_reviews_path / "train.jsonl")]
    saved = ["--save_strategy", "steps", "--save_steps", "1", "--load_best_model_at_end", "false"]
    folder = tmp_path / "run"
    assert main(["finetune", *files, *words, *SHORT, *saved, "--lora", lora, "--output_dir", str(folder)]) == 0
    checkpoint = folder / "checkpoint-1"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    options = [tokenizer(f"a joy It was {word}")["input_ids"][-1] for word in ("bad", "good")]
    with torch.no_grad():
        shares = model(**tokenizer("a joy It was", return_tensors="pt")).logits[0, -1, options].softmax(-1).tolist()
    early, late = (list(load_predictor(place)(["a joy"])[0]["scores"].values()) for place in (checkpoint, folder))
    assert early == pytest.approx(shares, abs=1e-6)
    assert abs(early[0] - late[0]) > 1e-5  # ten times the tolerance above
    with pytest.raises(UsageError, match=r"no folder .*checkpoint-7: give that of a finished run, or one of its che"):
        load_predictor(folder / "checkpoint-7")


def test_the_model_is_run_with_the_attention_of_its_run(tmp_path, flags):
    folder = tmp_path / "run"
    assert main(["finetune", *flags, *SHORT, "--lora", "true", "--attn_implementation", "eager"]) == 0
    assert main(["merge", "--model", str(folder), "--output_dir", str(tmp_path / "merged")]) == 0
    for model_folder in (folder, tmp_path / "merged"):
        assert attention_implementation(load_predictor(model_folder).model) == "eager"


@pytest.mark.parametrize("values", [("1", "2", "3"), ("billing", "sales"), ("pro", "pro|con")])
def test_predictions_are_labels_as_the_training_data_had_them(values, tmp_path, tiny_lm_path):
    rows = [{"text": f"movie {n}", "label": values[n % len(values)]} for n in range(12)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f for split in ("train", "test") for f in (f"--{split}_file", str(tmp_path / f"{split}.jsonl"))]
    model, folder = ["--model_name_or_path", str(tiny_lm_path)], tmp_path / "run"
    assert main(["finetune", *model, *files, *SHORT, "--output_dir", str(folder)]) == 0
    answers = load_predictor(folder)([row["text"] for row in rows])
    right = [answer["prediction"] == row["label"] for row, answer in zip(rows, answers, strict=True)]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert sum(right) / len(rows) == pytest.approx(metrics["after"]["accuracy"], abs=1e-6)
    for answer in answers:
        assert answer["prediction"] == answer["word"]
        assert tuple(answer["scores"]) == values
        assert answer["score"] == answer["scores"][answer["prediction"]]


@pytest.mark.parametrize(
    ("name", "published", "columns"),
    [
        ("sst2", {"text": "a joy"}, {"sentence": "a joy"}),
        (
            "copa",
            {"premise": "It is wet.", "choice1": "It rained.", "choice2": "I sang.", "question": "cause"},
            {"premise": "It is wet.", "choice1": "It rained.", "choice2": "I sang.", "conjunction": "because"},
        ),
        (
            "record",
            {"passage": "Ann met Bea.", "query": "@placeholder left", "entities": ["Ann", "Bea"]},
            {"passage": "Ann met Bea.", "choices": ["Ann left", "Bea left"]},
        ),
    ],
)
def test_rows_are_taken_as_published(name, published, columns, tiny_lm_path):
    predictor = published_predictor(name, tiny_lm_path)
    ((as_published,), (with_columns,)) = predictor([published]), predictor([columns])
    assert as_published == with_columns
    assert sum(as_published["scores"].values()) == pytest.approx(1, abs=1e-6)


def test_a_published_row_of_several_examples_is_refused(tiny_lm_path):
    question = {"question": "Q?", "answers": [{"text": "A"}, {"text": "B"}]}
    with pytest.raises(UsageError, match=r"Row 1 stands for 2 examples: give each its own row with .*paragraph, quest"):
        published_predictor("multirc", tiny_lm_path)([{"passage": {"text": "P.", "questions": [question]}}])
    with pytest.raises(UsageError, match="Row 1 has no 'conjunction'"):
        published_predictor("copa", tiny_lm_path)([{"premise": "x", "choice1": "a", "choice2": "b"}])


def published_predictor(name, path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = {"task": task_values(get_task(name)), "language_model": "causal", "precision": "fp32", "context": ""}
    record |= {"max_length": 128, "calibrate": False, "max_new_tokens": 5, "ends": []}
    return Predictor(AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path), record)


def test_a_run_of_an_earlier_version_answers_as_it_did(run):
    predictor = load_predictor(run)
    del predictor.record["labels"]
    (answer,) = predictor(["good"])
    assert list(answer["scores"]) == ["0", "1"]
    assert answer["prediction"] in ("0", "1")


def test_one_empty_column_of_several_is_answered_and_a_missing_one_is_not(tiny_lm_path):
    predictor = published_predictor("rte", tiny_lm_path)
    rows = [{"sentence1": "", "sentence2": "a"}, {"sentence1": None, "sentence2": "a"}]
    answered, empty = predictor(rows)
    assert answered["prediction"] in ("entailment", "not_entailment")
    assert empty == {"prediction": None, "word": None, "score": None, "scores": dict.fromkeys(answered["scores"])}
    choice = published_predictor("copa", tiny_lm_path)
    row = {"premise": "It is wet.", "choice1": "It rained.", "choice2": "", "conjunction": "because"}
    answered, empty = choice([row, {**row, "choice1": None}])
    assert answered["position"] in (0, 1)
    assert empty == {"prediction": None, "position": None, "score": None, "scores": {}}


def test_chats_are_continued(tmp_path, tiny_lm_path, monkeypatch, caplog):
    rows = [{"messages": [{"role": "user", "content": "good"}, {"role": "assistant", "content": "bad"}]}] * 12
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    flags = ["--train_file", str(tmp_path / "chat.jsonl"), "--chat_template", template, "--max_new_tokens", "5"]
    folder = tmp_path / "run"
    model = ["--model_name_or_path", str(tiny_lm_path)]
    assert main(["finetune", *model, *flags, *SHORT, "--output_dir", str(folder)]) == 0
    predictor = load_predictor(folder)
    questions = [{"messages": rows[0]["messages"][:1]}, rows[0], "good"]
    answers = predictor(questions)
    assert answers[0] == answers[1] == answers[2]
    assert isinstance(answers[0]["prediction"], str)
    with caplog.at_level(logging.WARNING):
        assert predictor([{"messages": []}, "good", ""]) == [{"prediction": None}, answers[2], {"prediction": None}]
    assert "2 rows without text have no answer (the first: row 1)." in caplog.messages
    samples = json.loads((folder / "metrics.json").read_text())["samples"]
    assert samples[0]["after"] == answers[0]["prediction"]
    monkeypatch.setattr("zokernel.finetune.predict.continuations", lambda *_, **__: pytest.fail("a row was answered"))
    with pytest.raises(UsageError, match=r"^Row 2: it has 'text', and the run learned from rows with 'messages'"):
        predictor([questions[0], {"text": "good"}])


def test_rows_longer_than_any_before_are_tried_in_their_layout_again(run):
    """With a window of 12 tokens short rows can share one, and long rows would see too much of themselves there."""
    from transformers import MistralConfig, MistralForCausalLM

    whole = load_predictor(run)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = MistralConfig(
        vocab_size=len(whole.tokenizer), **sizes, num_key_value_heads=2, sliding_window=12, pad_token_id=1
    )
    model = MistralForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    short = ["a", "a joy", "bad", "so good"]
    long = [*short, "it was good and bad " * 6, "bad " * 20]
    predictor = Predictor(model, whole.tokenizer, whole.record)
    tokens = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: tokens.append(args[0].shape))

    def together(rows):
        """The answers, and the shapes of the batches that gave them."""
        tokens.clear()
        answers = predictor(rows)
        return [answer["scores"] for answer in answers], list(tokens)

    first, shapes = together(short)
    assert len(shapes) == 3  # two of the trial
    assert together(short) == (first, shapes[-1:])
    assert len(shapes[-1]) == 2
    assert shapes[-1][0] < len(short)
    later, shapes = together(long)
    assert shapes[-1][0] == len(long)  # padded
    for row, scores in zip(long, later, strict=True):
        expected = Predictor(model, whole.tokenizer, whole.record)([row])[0]["scores"]
        assert scores == pytest.approx(expected, abs=1e-5)


def test_a_run_that_only_evaluated_has_no_model_to_predict_with(tmp_path, tiny_lm_path, tiny_reviews_path):
    words = ["--template", "{sentence} It was", "--label_words", "bad", "good", "--do_train", "false"]
    files = ["--train_file", str(tiny_reviews_path / "train.jsonl"), "--model_name_or_path", str(tiny_lm_path)]
    assert main(["finetune", *files, *words, "--output_dir", str(tmp_path / "run")]) == 0
    with pytest.raises(UsageError, match="only scored its model and saved none: train at least one step"):
        load_predictor(tmp_path / "run")
