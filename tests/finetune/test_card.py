"""The model card of a run: it says how to use the weights, and what it says runs."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from zokernel.cli import main
from zokernel.data import load_table


@pytest.mark.parametrize("shared", [0, 3])
def test_examples_that_were_also_trained_on_are_counted_wherever_the_score_is_told(shared, flags, tmp_path, capsys):
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
def test_the_card_tells_how_to_use_what_was_trained(lora, tiny_lm_path, tiny_reviews_path, tmp_path, monkeypatch):
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
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    monkeypatch.chdir(moved)
    predict, load = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict = {}
    exec(predict, names)
    (answer,) = names["load_predictor"](".")([{"sentence": "..."}])
    assert answer["word"] in ("bad", "good")
    exec(load, names)
    assert (
        sum(p.numel() for p in names["model"].parameters())
        == json.loads((moved / "metrics.json").read_text())["num_parameters"]
    )
