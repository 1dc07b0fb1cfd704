"""zokernel predict: a finished run answers new rows as it scored its own."""

from __future__ import annotations

import csv
import datetime
import io
import json
import logging
import shutil

import pytest
import torch

from zokernel.cli import main
from zokernel.commands.predict import write_rows
from zokernel.data import load_table
from zokernel.errors import UsageError
from zokernel.finetune import get_task, load_predictor
from zokernel.finetune.predict import Predictor
from zokernel.finetune.tasks.serialization import task_values
from zokernel.private_apis import attention_implementation
from zokernel.without_adapter import without_adapter

RUN = ["--max_steps", "2", "--precision", "fp32", "--eval_strategy", "no", "--save_strategy", "journal"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_lm_path, tiny_reviews_path):
    folder = tmp_path_factory.mktemp("predict") / "run"
    files = [f for split in ("train", "test") for f in (f"--{split}_file", str(tiny_reviews_path / f"{split}.jsonl"))]
    words = ["--template", "{sentence} It was", "--label_words", "bad", "good"]
    model = ["--model_name_or_path", str(tiny_lm_path)]
    assert main(["finetune", *model, *files, *words, *RUN, "--output_dir", str(folder)]) == 0
    return folder


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
    assert main(["finetune", *files, *words, *RUN, *saved, "--lora", lora, "--output_dir", str(folder)]) == 0
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
    assert main(["finetune", *flags, *RUN, "--lora", "true", "--attn_implementation", "eager"]) == 0
    assert main(["merge", "--model", str(folder), "--output_dir", str(tmp_path / "merged")]) == 0
    for model_folder in (folder, tmp_path / "merged"):
        assert attention_implementation(load_predictor(model_folder).model) == "eager"


OWN = """
from transformers import LlamaForCausalLM


class Own(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = -outputs.logits
        return outputs
"""


@pytest.mark.parametrize("lora", ["false", "true"])
def test_code_that_comes_with_a_model_runs_only_when_asked(lora, tmp_path, tiny_lm_path, flags, modules, capsys):
    place, run, rows = shutil.copytree(tiny_lm_path, tmp_path / "own"), tmp_path / "run", tmp_path / "new.csv"
    rows.write_text("sentence\ngood\n")
    (place / "own.py").write_text(OWN)
    config = json.loads((place / "config.json").read_text())
    config |= {"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    (place / "config.json").write_text(json.dumps(config))
    trust, model_flags = ["--trust_remote_code", "true"], ["--model_name_or_path", str(place), "--lora", lora]
    assert main(["finetune", *flags, *RUN, *model_flags, *trust]) == 0
    scores = []
    for trusted, name in ((True, "Own"), (False, "LlamaForCausalLM")):
        predictor = load_predictor(run, trust_remote_code=trusted)
        assert type(without_adapter(predictor.model)).__name__ == name
        scores.append(predictor(["good"])[0]["scores"])
        capsys.readouterr()
        assert main(["predict", "--model", str(run), "--file", str(rows), *(trust if trusted else [])]) == 0
        assert json.loads(capsys.readouterr().out)["scores"] == pytest.approx(scores[-1], abs=1e-6)
    assert scores[0]["0"] / scores[0]["1"] == pytest.approx(scores[1]["1"] / scores[1]["0"], rel=1e-4)
    if lora == "true":
        merge = ["merge", "--model", str(run), "--output_dir", str(tmp_path / "merged")]
        assert main(merge) == 2
        assert "that was a Own, and this is a LlamaForCausalLM" in capsys.readouterr().err
        assert main([*merge, *trust]) == 0


CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own-llama"
"""


@pytest.mark.parametrize("lora", ["false", "true"])
def test_a_configuration_of_a_class_that_comes_with_the_model(lora, tmp_path, tiny_lm_path, flags, modules, capsys):
    place, rows = shutil.copytree(tiny_lm_path, tmp_path / "own"), tmp_path / "new.csv"
    rows.write_text("sentence\ngood\n")
    (place / "configuration_own.py").write_text(CONFIGURATION)
    (place / "own.py").write_text(f"{OWN}\n    from .configuration_own import OwnConfig as config_class\n")
    config = json.loads((place / "config.json").read_text())
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    config |= {"model_type": "own-llama", "architectures": ["Own"], "auto_map": names}
    (place / "config.json").write_text(json.dumps(config))
    trust, model_flags = ["--trust_remote_code", "true"], ["--model_name_or_path", str(place)]
    assert main(["plan", "--memory", "true", *model_flags, *trust]) == 0
    assert main(["plan", "--memory", "true", *model_flags]) == 2
    assert "brings code of its own, which is not run: read it" in capsys.readouterr().err
    # At this rate of all weights the start is best, and is loaded again.
    far = ["--max_steps", "4", "--eval_steps", "2", "--save_strategy", "journal", "--learning_rate", "10"]
    assert main(["finetune", *flags, *model_flags, *far, *trust, "--lora", lora]) == 0
    assert lora == "true" or json.loads((tmp_path / "run" / "metrics.json").read_text())["best_step"] == 0
    capsys.readouterr()
    assert main(["predict", "--model", str(tmp_path / "run"), "--file", str(rows), *trust]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    start = load_predictor(tmp_path / "run", trust_remote_code=True)
    assert type(without_adapter(start.model)).__name__ == "Own"
    assert scores == pytest.approx(start(["good"])[0]["scores"], abs=1e-6)


@pytest.mark.parametrize("values", [("1", "2", "3"), ("billing", "sales"), ("pro", "pro|con")])
def test_predictions_are_labels_as_the_training_data_had_them(values, tmp_path, tiny_lm_path):
    rows = [{"text": f"movie {n}", "label": values[n % len(values)]} for n in range(12)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f for split in ("train", "test") for f in (f"--{split}_file", str(tmp_path / f"{split}.jsonl"))]
    model, folder = ["--model_name_or_path", str(tiny_lm_path)], tmp_path / "run"
    assert main(["finetune", *model, *files, *RUN, "--output_dir", str(folder)]) == 0
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


@pytest.mark.parametrize(
    ("flags", "values", "scores"),
    [
        ("--label_words bad good", ("bad", "Good"), ("bad", "Good")),
        ("--label_words bad good", ("0", "1"), ("0", "1")),
        ("--label_words bad good", (1, 0), ("0", "1")),
        ("--label_words bad good", (False, True), ("False", "True")),
        ("--label_words bad good", (0.0, 1.0), ("0.0", "1.0")),
        ("--label_words bad good --labels low high", ("LOW", "high"), ("LOW", "high")),
        ("--label_words bad good --labels 0|negative 1|positive", ("negative", "positive"), ("negative", "positive")),
        ("--label_words bad good --labels -1 1", ("-1", "1"), ("-1", "1")),
        ("--task sst2", (1, 0), ("0", "1")),
        ("--task rte", ("entailment", "not_entailment"), ("entailment", "not_entailment")),
        ("", ("Left", "right"), ("Left", "right")),
    ],
)
def test_predictions_are_the_values_of_the_label_column(flags, values, scores, tmp_path, tiny_lm_path):
    text = {"sentence1": "a", "sentence2": "b"} if "rte" in flags else {"sentence": "movie"}
    rows = [{**text, "label": values[n % 2]} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--train_file", str(tmp_path / "rows.jsonl"), "--test_file", str(tmp_path / "rows.jsonl")]
    model, folder = ["--model_name_or_path", str(tiny_lm_path)], tmp_path / "run"
    assert main(["finetune", *model, *files, *RUN, *flags.split(), "--output_dir", str(folder)]) == 0
    output = tmp_path / "answers.jsonl"
    predict = ["predict", "--model", str(folder), "--file", str(tmp_path / "rows.jsonl"), "--output_file", str(output)]
    assert main(predict) == 0
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    right = [answer["prediction"] == answer["label"] for answer in answers]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert sum(right) / len(rows) == pytest.approx(metrics["after"]["accuracy"], abs=1e-6) == 0.5
    assert all(tuple(answer["scores"]) == scores for answer in answers)
    assert {type(answer["prediction"]) for answer in answers} == {type(values[0])}
    recorded = json.loads((folder / "predictor.json").read_text())["labels"]
    assert [(str(label), type(label)) for label in recorded] == [(text, type(values[0])) for text in scores]
    predict[-1] = str(tmp_path / "answers.csv")
    assert main(predict) == 0
    assert [row["prediction"] for row in load_table(predict[-1])] == [str(answer["prediction"]) for answer in answers]


def test_a_run_of_an_earlier_version_answers_as_it_did(run):
    predictor = load_predictor(run)
    del predictor.record["labels"]
    (answer,) = predictor(["good"])
    assert list(answer["scores"]) == ["0", "1"]
    assert answer["prediction"] in ("0", "1")


@pytest.mark.parametrize("source", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "-"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_without_text_have_no_answer_and_are_counted(run, source, suffix, tmp_path, monkeypatch, caplog):
    cells = ["good", "", "bad", "  "] if source in ("a.csv", "a.tsv") else ["good", "", "bad", None]
    rows = [{"id": n, "sentence": cell} for n, cell in enumerate(cells)]
    lines, file = "".join(json.dumps(row) + "\n" for row in rows), tmp_path / source
    if source == "-":
        file, place = "-", "row 2"
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    elif source == "a.parquet":
        place = "row 2"
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    elif source == "a.jsonl":
        place = "line 2"
        file.write_text(lines)
    else:
        place, sign = "line 3", "\t" if source == "a.tsv" else ","
        file.write_text(f"id{sign}sentence\n" + "".join(f"{row['id']}{sign}{row['sentence']}\n" for row in rows))
    output = tmp_path / f"answers{suffix}"
    with caplog.at_level(logging.WARNING):
        assert main(["predict", "--model", str(run), "--file", str(file), "--output_file", str(output)]) == 0
    assert f"2 rows without text have no answer (the first: {place})." in caplog.messages
    answers = load_table(output)
    expected = load_predictor(run)(["good", "bad"])
    texts = str if suffix == ".csv" else lambda label: label
    assert [answers[n]["prediction"] for n in (0, 2)] == [texts(answer["prediction"]) for answer in expected]
    assert [answers[n]["word"] for n in (0, 2)] == [answer["word"] for answer in expected]
    for number in (1, 3):
        empty = [answers[number][name] for name in ("prediction", "word", "score")]
        assert empty == ["", "", ""] if suffix == ".csv" else empty == [None, None, None]
        assert (answers[number].get("scores") or {"0": None, "1": None}) == {"0": None, "1": None}


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


def test_a_file_of_a_header_is_refused_without_a_word_about_training(run, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("sentence\n")
    assert main(["predict", "--model", str(run), "--file", str(tmp_path / "new.csv")]) == 2
    message = capsys.readouterr().err
    assert "new.csv has no rows below its header line: add one, or name its columns with --column_names" in message
    assert "train" not in message.split("new.csv")[-1]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_files_hold_the_rows_and_their_answers(run, suffix, tmp_path, capsys):
    (tmp_path / "new.csv").write_text('id,sentence\n7,"good, very"\n8,bad\n')
    output = tmp_path / f"answers{suffix}"
    assert (
        main(["predict", "--model", str(run), "--file", str(tmp_path / "new.csv"), "--output_file", str(output)]) == 0
    )
    assert f"2 answers in {output}." in capsys.readouterr().out
    rows = load_table(output)
    assert [(row["id"], row["sentence"]) for row in rows] == [("7", "good, very"), ("8", "bad")]
    expected = load_predictor(run)(["good, very", "bad"])
    texts = str if suffix != ".jsonl" else lambda label: label
    assert [row["prediction"] for row in rows] == [texts(answer["prediction"]) for answer in expected]
    scores = [float(row["score:1"]) if suffix != ".jsonl" else row["scores"]["1"] for row in rows]
    assert scores == pytest.approx([answer["scores"]["1"] for answer in expected], abs=1e-6)


def test_lines_of_text_and_json_come_from_standard_input(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO('good\n\n{"sentence": "bad", "id": 3}\n'))
    assert main(["predict", "--model", str(run)]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == "good"
    assert (second["sentence"], second["id"]) == ("bad", 3)


def test_chats_are_continued(tmp_path, tiny_lm_path, monkeypatch, caplog):
    rows = [{"messages": [{"role": "user", "content": "good"}, {"role": "assistant", "content": "bad"}]}] * 12
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    flags = ["--train_file", str(tmp_path / "chat.jsonl"), "--chat_template", template, "--max_new_tokens", "5"]
    folder = tmp_path / "run"
    model = ["--model_name_or_path", str(tiny_lm_path)]
    assert main(["finetune", *model, *flags, *RUN, "--output_dir", str(folder)]) == 0
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


def test_mistakes_are_named(run, tmp_path, capsys):
    (tmp_path / "folder.csv").mkdir()
    predictor = load_predictor(run)
    with pytest.raises(UsageError, match=r"Row 2 has no 'sentence' \(it has text\)"):
        predictor(["good", {"text": "bad"}])
    with pytest.raises(
        UsageError, match=r"Row 1 has no 'sentence' \(it has Sentence\): did you mean 'Sentence'\?; the te"
    ):
        predictor([{"Sentence": "bad"}])
    with pytest.raises(UsageError, match="Row 2: column 'sentence' holds a list, not a text"):
        predictor(["good", {"sentence": ["bad"]}])
    with pytest.raises(UsageError, match="Row 2 is None, neither"):
        predictor(["good", None])
    with pytest.raises(UsageError, match="in brackets"):
        predictor("good")
    (tmp_path / "new.csv").write_text("sentence\ngood\n")
    same = ["--file", str(tmp_path / "new.csv"), "--output_file", str(tmp_path / "new.csv")]
    assert main(["predict", "--model", str(run), *same]) == 2
    assert (tmp_path / "new.csv").read_text() == "sentence\ngood\n"
    (tmp_path / "old.csv").write_text("old\n1\n")
    missing = ["--file", str(tmp_path / "nope.csv"), "--output_file", str(tmp_path / "old.csv")]
    capsys.readouterr()
    assert main(["predict", "--model", str(run), *missing]) == 2
    assert f"There is no file {tmp_path / 'nope.csv'}: check the path" in capsys.readouterr().err
    assert main(["predict", "--model", str(run), "--output_file", str(tmp_path / "folder.csv")]) == 2
    assert "is a folder: name a file in it" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"has no predictor\.json"):
        load_predictor(tmp_path)
    assert main(["predict", "--model", str(run), "--output_file", "answers.pdf"]) == 2
    assert main(["predict", "--model", str(tmp_path / "nowhere"), "--file", "-"]) == 2


def test_the_table_of_a_csv_is_whole(run, tmp_path):
    (tmp_path / "new.jsonl").write_text('{"sentence": "line\\nbreak", "score:0": "taken"}\n')
    output = tmp_path / "answers.csv"
    main(["predict", "--model", str(run), "--file", str(tmp_path / "new.jsonl"), "--output_file", str(output)])
    (row,) = csv.DictReader(output.open(newline=""))
    assert (row["sentence"], row["input:score:0"]) == ("line\nbreak", "taken")
    assert float(row["score:0"]) + float(row["score:1"]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_columns_named_like_answer_fields_keep_their_cells(run, suffix, tmp_path, capsys):
    cells = {"word": "set", "score": 7, "prediction": "mine", "input:word": "first", "scores": "theirs"}
    (tmp_path / "new.jsonl").write_text(json.dumps({"sentence": "good", **cells}) + "\n")
    output = tmp_path / f"answers{suffix}"
    files = ["--file", str(tmp_path / "new.jsonl"), "--output_file", str(output)]
    assert main(["predict", "--model", str(run), *files]) == 0
    assert "'word' is 'input:input:word', 'score' is 'input:score', 'prediction' is" in capsys.readouterr().err
    (answer,), (row,) = load_predictor(run)(["good"]), load_table(output)
    renamed = ("input:input:word", "input:score", "input:prediction", "input:word")
    assert [str(row[name]) for name in renamed] == ["set", "7", "mine", "first"]
    assert row["scores" if suffix == ".csv" else "input:scores"] == "theirs"
    assert (str(row["prediction"]), row["word"]) == (str(answer["prediction"]), answer["word"])
    assert float(row["score"]) == pytest.approx(answer["score"], abs=1e-6)


def test_generated_answers_and_a_column_of_scores_are_both_kept():
    stream = io.StringIO()
    write_rows(stream, [{"text": "a", "scores": "3"}], [{"prediction": "b"}], ".csv")
    assert stream.getvalue() == "text,scores,prediction\na,3,b\n"


def test_dates_are_written_and_a_failure_leaves_the_old_answers(run, tmp_path, monkeypatch):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    day = datetime.date(2024, 5, 3)
    pq.write_table(pa.Table.from_pylist([{"sentence": "good", "day": day}]), tmp_path / "new.parquet")
    output = tmp_path / "answers.jsonl"
    files = ["--file", str(tmp_path / "new.parquet"), "--output_file", str(output)]
    assert main(["predict", "--model", str(run), *files]) == 0
    assert load_table(output)[0]["day"] == "2024-05-03"
    before = output.read_text()

    def cut_off(stream, *_):
        stream.write("half")
        raise ZeroDivisionError

    monkeypatch.setattr("zokernel.commands.predict.write_rows", cut_off)
    with pytest.raises(ZeroDivisionError):
        main(["predict", "--model", str(run), *files])
    assert output.read_text() == before


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
