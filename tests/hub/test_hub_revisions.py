"""A revision of a hub model: the one that is asked for, in every command that loads one, or the one of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_runs import Run
from hub_server import Hub
from models import save_plain_llama
from safetensors.torch import load_file, save_file
from test_hub_errors import ROWS, one_sentence


@pytest.fixture
def base(hub: Hub, tmp_path: Path) -> Path:
    """Folder of a model that is the branch ``v2`` of ``org/tiny``, whose branch ``main`` has other weights."""
    folder = save_plain_llama(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    other = {name: 2 * weight if "proj" in name else weight for name, weight in load_file(folder / WEIGHTS).items()}
    save_file(other, tmp_path / "other.safetensors", metadata={"format": "pt"})
    hub.add(
        "models", "org/tiny", files | {WEIGHTS: (tmp_path / "other.safetensors").read_bytes()}, branches={"v2": files}
    )
    return folder


WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"


def same(left: Path, right: Path, name: str = WEIGHTS) -> bool:
    one, other = load_file(left / name), load_file(right / name)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def last_line(result: dict[str, Any]) -> str:
    return result["output"].strip().splitlines()[-1]


def test_runs_are_continued_answered_and_rebuilt_from_the_revision_they_began_with(
    hub: Hub, run: Run, base: Path, tmp_path: Path
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [
        "--template",
        "{sentence} It was",
        "--label_words",
        "bad",
        "good",
        "--precision",
        "fp32",
        "--use_cpu",
        "true",
    ]
    words += ["--train_file", str(rows), "--validation_file", str(rows), "--test_file", str(rows)]
    v2 = ["--model_name_or_path", "org/tiny", "--model_revision", "v2"]
    main = ["--model_revision", "main"]
    full, lora = tmp_path / "full", tmp_path / "lora"
    # At this rate the start is best.
    far = ["--max_steps", "4", "--eval_steps", "2", "--learning_rate", "10"]
    near = ["--max_steps", "2", "--save_strategy", "journal", "--lora", "true", "--learning_rate", "3e-2"]
    file_flags = ["--file", str(rows), "--output_file"]

    def rebuild(journal: Path, name: str, *flags: str) -> list[str]:
        return ["replay", "--base", "org/tiny", "--journal", str(journal), "--output_dir", str(tmp_path / name), *flags]

    def merge(name: str, *flags: str) -> list[str]:
        return ["merge", "--model", str(lora), "--output_dir", str(tmp_path / name), *flags]

    def score(name: str, *model: str) -> list[str]:
        return ["finetune", *model, *words, "--do_train", "false", "--output_dir", str(tmp_path / name)]

    results = run(
        hub.endpoint,
        ["finetune", *v2, *words, *far, "--output_dir", str(full)],
        ["finetune", *v2, *words, *near, "--output_dir", str(lora)],
        rebuild(full, "rebuilt-start", "--step", "0"),
        rebuild(lora, "rebuilt-lora"),
        ["journal", "verify", str(full), "--base", "org/tiny"],
        merge("merged"),
        merge("merged-too", "--base", "org/tiny"),
        *(
            ["predict", "--model", str(lora), *more, *file_flags, f"{tmp_path}/{name}.jsonl"]
            for name, more in ANSWERS.items()
        ),
        score("scored-main", "--model_name_or_path", str(lora), *main),
        score("scored", "--model_name_or_path", "org/tiny", "--adapter_name_or_path", str(lora)),
    )
    assert [result["code"] for result in results] == [0] * len(results), [last_line(result) for result in results]
    assert json.loads((full / "metrics.json").read_text())["best_step"] == 0
    assert same(full, base)
    assert same(tmp_path / "rebuilt-start", base)
    assert same(tmp_path / "rebuilt-lora", lora, ADAPTER)
    assert json.loads((tmp_path / "rebuilt-lora" / "adapter_config.json").read_text())["revision"] == "v2"
    assert '.from_pretrained("org/tiny", revision="v2")' in (lora / "README.md").read_text()
    assert same(tmp_path / "merged", tmp_path / "merged-too")
    losses = {}
    for name in ANSWERS:
        answers = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        losses[name] = float(np.mean([-np.log(answer["scores"][str(answer["label"])]) for answer in answers]))
    after = json.loads((lora / "metrics.json").read_text())["after"]["loss"]
    assert losses["recorded"] == losses["asked"] == pytest.approx(after, abs=1e-5)
    assert losses["main"] != pytest.approx(after, abs=1e-3)
    for name, loss in (("scored-main", losses["main"]), ("scored", after)):
        before = json.loads((tmp_path / name / "metrics.json").read_text())["before"]["loss"]
        assert before == pytest.approx(loss, abs=1e-5)

    wrong = run(
        hub.endpoint,
        rebuild(full, "w1", *main),
        rebuild(lora, "w2", *main),
        rebuild(full, "w3", "--model_revision", "v3"),
        merge("w4", *main),
        ["journal", "verify", str(full), "--base", "org/tiny", *main],
        ["predict", "--model", str(full), *main, *file_flags, f"{tmp_path}/w.jsonl"],
        ["replay", "--base", str(base), "--journal", str(full), "--output_dir", str(tmp_path / "w5"), *main],
    )
    one_sentence(wrong[0], "The base has the right shapes but other values than the run started from")
    one_sentence(wrong[1], "frozen weights of the base are not those of the run")
    one_sentence(wrong[2], "org/tiny", "v3")
    one_sentence(wrong[3], "org/tiny is not the model that the adapter", "its weights were different")
    one_sentence(wrong[4], "The base has the right shapes but other values than the run started from")
    one_sentence(wrong[5], f"--model_revision is for models of the hub, which {full} is not: leave it out.")
    one_sentence(wrong[6], f"--model_revision is for models of the hub, which {base} is not: leave it out.")


ANSWERS = {"recorded": [], "asked": ["--model_revision", "v2"], "main": ["--model_revision", "main"]}


def test_kernels_and_predictions_are_those_of_the_revision(hub: Hub, run: Run, base: Path, tmp_path: Path):
    (tmp_path / "rows.csv").write_text("sentence,label\na good film,1\na bad film,0\n")
    kernel = ["kernel", "--x_o", "good film", "--x_u", "bad film", "--label_words", "terrible", "great"]
    evolve = ["evolve", "--train_file", str(tmp_path / "rows.csv"), "--trainable_parameters", "norm", "--steps", "2"]
    models = {"local": [str(base)], "v2": ["org/tiny", "--model_revision", "v2"], "main": ["org/tiny"]}
    cases = [
        [*words, "--model_name_or_path", *model, "--output_dir", str(tmp_path / f"{words[0]}-{name}")]
        for words in ([*kernel, "--num_perturbations", "2"], evolve)
        for name, model in models.items()
    ]
    results = run(
        hub.endpoint,
        *cases,
        [*cases[0], "--model_revision", "v2"],
        ["kernel", "--model", "lenet", "--x_o", "1", "--x_u", "2", "--model_revision", "v2"],
        ["evolve", "--features", "none.npz", "--trust_remote_code"],
    )
    assert [result["code"] for result in results[:6]] == [0] * 6, [last_line(result) for result in results]
    for file, key in (("kernel.json", "kernel"), ("evolution.json", "losses")):
        words = "kernel" if key == "kernel" else "evolve"
        values = {name: json.loads((tmp_path / f"{words}-{name}" / file).read_text())[key] for name in models}
        assert values["v2"] == values["local"]
        assert values["main"] != values["local"]
    one_sentence(results[6], f"--model_revision is for models of the hub, which {base} is not: leave it out.")
    one_sentence(results[7], "--model_revision is for language models, which lenet is not: leave it out.")
    one_sentence(results[8], "--trust_remote_code is for language models, which none.npz is not: leave it out.")
