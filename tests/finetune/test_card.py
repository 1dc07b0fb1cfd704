"""The model card of a run: it says how to use the weights, and what it says runs."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from zokernel.cli import main


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
