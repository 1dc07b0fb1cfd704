"""The model card of a run: it says how to use the weights, and its code runs."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml

from zokernel.cli import main
from zokernel.data import load_table
from zokernel.finetune.report.run_report import summary_rows, write_report
from zokernel.finetune.report.uncertainty import change_error, share_error


@pytest.mark.parametrize("shared", [0, 3])
def test_examples_that_were_also_trained_on_are_counted_wherever_the_score_is_shown(shared, flags, tmp_path, capsys):
    train = load_table(flags[flags.index("--train_file") + 1])
    new = [{**train[0], "sentence": f"a new one, number {n}"} for n in range(5 - shared)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*train[:shared], *new]))
    quick = ["--max_steps", "1", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    assert main(["finetune", *flags, *quick, "--test_file", str(tmp_path / "test.jsonl")]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    pages = {"log": capsys.readouterr().out}
    pages |= {name: (tmp_path / "run" / name).read_text() for name in ("report.md", "README.md", "report.html")}
    for name, text in pages.items():
        assert ("5 test examples (3 of them also training examples)" in text) == bool(shared), name
    assert ("5 examples the run never trained on" in pages["report.md"]) == (not shared)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test_trained_on"] == shared


@pytest.mark.parametrize("lora", [False, True])
def test_the_card_explains_how_to_use_the_trained_weights(lora, tiny_lm_path, tiny_reviews_path, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    files = ["--train_file", str(tiny_reviews_path / "train.jsonl"), "--max_steps", "2", "--precision", "fp32"]
    words = ["--template", "{sentence} It was", "--label_words", "bad", "good", "--lora", str(lora)]
    model = ["--model_name_or_path", str(tiny_lm_path)]
    assert main(["finetune", *model, *files, *words, "--output_dir", str(folder)]) == 0
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in front
    assert front["library_name"] == ("peft" if lora else "transformers")
    assert "The prompt is `'{sentence} It was'`" in text
    assert "`bad`, `good`" in text
    new_folder = tmp_path / "elsewhere"
    folder.rename(new_folder)
    monkeypatch.chdir(new_folder)
    predict, load = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict = {}
    exec(predict, names)
    (answer,) = names["load_predictor"](".")([{"sentence": "..."}])
    assert answer["word"] in ("bad", "good")
    exec(load, names)
    assert (
        sum(p.numel() for p in names["model"].parameters())
        == json.loads((new_folder / "metrics.json").read_text())["num_parameters"]
    )


def test_the_error_of_a_change_bounds_that_of_the_same_examples_and_is_reached():
    rng, examples = np.random.default_rng(0), 400
    for rates in rng.uniform(size=(50, 2)):
        first = (np.arange(examples) < rates[0] * examples).astype(float)
        paired = [rng.permutation(np.arange(examples) < rates[1] * examples), np.arange(examples)[::-1]]
        # By chance, and with as many changed answers as the two shares allow.
        for last in (paired[0].astype(float), (paired[1] < rates[1] * examples).astype(float)):
            bound = change_error(first.mean(), last.mean(), examples)
            assert np.std(last - first) / np.sqrt(examples) <= bound
    assert np.std(last - first) / np.sqrt(examples) == pytest.approx(bound, rel=0.02)
    assert change_error(0.5, 0.5, examples) == pytest.approx(1 / np.sqrt(examples), rel=0.002)  # not sqrt(0.5 / N)
    # With few examples, one more or less is known to be possible: Jeffreys' posterior of 24 of 24 has this deviation.
    assert share_error(1.0, 24) == pytest.approx(np.sqrt(24.5 * 0.5 / (25**2 * 26)), rel=0.05)


@pytest.mark.parametrize(("scores", "has_error"), [({"accuracy": 0.9}, False), ({"em": 0.4}, True)])
def test_only_the_f1_of_answers_in_words_has_a_binomial_error(scores, has_error, flags, tmp_path):
    quick = ["--max_steps", "1", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    assert main(["finetune", *flags, *quick]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    metrics |= {"metric": "f1", "num_test": 1000}
    metrics |= {"before": {"loss": 1.0, "f1": 0.5, **scores}, "after": {"loss": 0.9, "f1": 0.6, **scores}}
    assert dict(summary_rows(metrics))["f1 after training"] == f"60.0 %{' (± 1.5)' if has_error else ''} (+10.0 points)"
    write_report(metrics, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert ("binomial" in text) is has_error
    # At most 90 % of the answers may have changed: sqrt((0.9 - 0.1^2) / 1000) is 0.0298.
    assert ("+10.0 points, with a standard error of at most 3.0." in text) is has_error
    assert ("+10.0 points. " in text) is not has_error


def test_counts_of_one_are_singular_and_no_change_has_no_minus_sign(flags, tmp_path, caplog, capsys):
    folder = tmp_path / "run"
    one = ["--max_steps", "1", "--max_eval_samples", "1", "--max_test_samples", "1", "--method", "mezo"]
    with caplog.at_level("INFO", logger="zokernel"):
        assert main(["finetune", *flags, *one]) == 0
    for words in (["report", str(folder)], ["journal", "show", str(folder)], ["journal", "verify", str(folder)]):
        assert main(words) == 0
    output = capsys.readouterr().out
    pages = {"log": caplog.text, "commands": output}
    pages |= {name: (folder / name).read_text() for name in ("report.md", "README.md", "report.html")}
    plural = r"(?<![\d.,])1 (?:[a-z]+ )?(?:steps|forward passes|forwards|examples|rows|losses|bytes|tensors)\b"
    for name, text in pages.items():
        assert not re.findall(plural, text), name
    assert "1 step, 2 forward passes" in pages["report.md"]
    assert "1 test example" in pages["README.md"]
    assert "eval_loss" in output
    assert "preparation_time" not in output
    metrics = json.loads((folder / "metrics.json").read_text())
    almost = {"before": {"loss": 1.0, "perplexity": 1090.5691}, "after": {"loss": 1.0, "perplexity": 1090.569}}
    rows = dict(summary_rows(metrics | almost | {"metric": "perplexity"}))
    assert rows["perplexity after training"] == "1090.569 (+0.0 %)"


def test_the_card_lists_the_options_in_effect(flags, tmp_path):
    quick = ["--max_steps", "1", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    assert main(["finetune", *flags, *quick, "--method", "kerzoo", "--method_args", "kernel_order=5"]) == 0
    (cell,) = re.findall(r"\| method's options \| (.*) \|", (tmp_path / "run" / "README.md").read_text())
    options = dict(pair.split("=") for pair in cell.split(", "))
    expected = {"kernel_order": "5", "radius": "1.0", "num_perturbations": "3", "distribution": "rademacher"}
    assert options.items() > expected.items()
    assert not options.keys() & {"lr", "total_steps", "clip", "averaging", "perturb"}  # elsewhere, or off
