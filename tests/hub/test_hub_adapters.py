"""The hub id of an adapter stands in for a model, as its folder does: its base is found from its configuration."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from hub_data import tiny_model
from hub_runs import Run
from hub_server import Hub
from models import save_plain_llama
from quantized import save_gguf
from safetensors.torch import load_file, save_file
from test_hub_errors import ROWS, one_sentence
from transformers import AutoModelForCausalLM


def adapter(base: Path, folder: Path, name: str) -> dict[str, bytes]:
    """Return the files of an adapter that answers otherwise than its base."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    adapted.peft_config["default"].base_model_name_or_path = name
    adapted.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_hub_id_of_an_adapter_works_like_its_folder(hub: Hub, run: Run, tmp_path: Path):
    hub.add("models", "org/tiny", tiny_model(tmp_path / "model"))
    files = adapter(tmp_path / "model", tmp_path / "adapter", "org/tiny")
    hub.add("models", "org/adapter", files)
    hub.add("models", "org/lost", adapter(tmp_path / "model", tmp_path / "lost", "/home/somebody/model"))
    hub.add("models", "org/neither", {"README.md": "nothing"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def command(model: str, name: str, *flags: str) -> list[str]:
        words = ["finetune", "--model_name_or_path", model, "--output_dir", str(tmp_path / name), "--use_cpu", "true"]
        words += ["--template", "{sentence} It was", "--label_words", "bad", "good", "--precision", "fp32"]
        return [*words, "--train_file", str(rows), "--max_steps", "2", *flags]

    plan = ["plan", "--memory", "true", "--model_name_or_path"]
    trained, scored, local, merged, ways, *wrong = run(
        hub.endpoint,
        command("org/adapter", "trained"),
        command("org/adapter", "scored", "--do_train", "false"),
        command(str(tmp_path / "adapter"), "here", "--do_train", "false"),
        ["merge", "--model", "org/adapter", "--output_dir", str(tmp_path / "merged")],
        [*plan, "org/adapter"],
        command("org/lost", "lost"),
        command("org/neither", "neither"),
        command("org/adapter", "old", "--model_revision", hub.repos["models", "org/adapter"].sha),
        command("org/adapter", "new", "--lora", "true", "--lora_r", "4"),
    )
    for result in (trained, scored, local, merged, ways):
        assert result["code"] == 0, result["output"]
    assert "org/adapter is an adapter: its base is org/tiny." in trained["output"]
    assert "Fastest that fits for an adapter: --perturb stacked." in ways["output"]
    one_sentence(wrong[0], "adapter org/lost is not at /home/somebody/model", "--adapter_name_or_path org/lost")
    one_sentence(wrong[1], "'org/neither' could not be loaded")
    one_sentence(wrong[2], "leave out --model_revision")
    one_sentence(wrong[3], "has its own lora_r")

    def before(name: str) -> dict[str, float]:
        return json.loads((tmp_path / name / "metrics.json").read_text())["before"]

    assert before("trained") == before("scored") == before("here")
    assert "already-trained accuracy" in scored["output"]
    assert (
        json.loads((tmp_path / "trained" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
        torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-5)

    offline = run(hub.endpoint, command("org/adapter", "offline", "--do_train", "false"), HF_HUB_OFFLINE="1")
    assert offline[0]["code"] == 0, offline[0]["output"]
    assert before("offline") == before("scored")


def test_an_adapter_finds_the_revision_and_the_file_of_its_base(hub: Hub, run: Run, tmp_path: Path):
    base = save_plain_llama(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}
    packed = save_gguf(base, tmp_path / "tiny.gguf").read_bytes()
    weights = load_file(base / "model.safetensors")
    other = {name: 2 * weight if "proj" in name else weight for name, weight in weights.items()}
    save_file(other, tmp_path / "other.safetensors", metadata={"format": "pt"})
    on_main = files | {"model.safetensors": (tmp_path / "other.safetensors").read_bytes()}
    hub.add("models", "org/tiny", on_main, branches={"v2": files | {"tiny.gguf": packed}})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["--template", "{sentence} It was", "--label_words", "bad", "good", "--precision", "fp32"]
    words += ["--use_cpu", "true", "--train_file", str(rows), "--validation_file", str(rows), "--max_steps", "2"]
    words += ["--test_file", str(rows)]
    for name, flags in (("plain", []), ("gguf", ["--gguf_file", "tiny.gguf"])):
        lora, merged, scored = (str(tmp_path / f"{name}-{what}") for what in ("lora", "merged", "scored"))
        base_flags = ["--model_name_or_path", "org/tiny", "--model_revision", "v2", *flags, "--lora", "true"]
        score = ["--model_name_or_path", lora, "--do_train", "false", "--output_dir", scored]
        file_flags = ["--file", str(rows), "--output_file"]
        results = run(
            hub.endpoint,
            ["finetune", *base_flags, *words, "--learning_rate", "3e-2", "--eps", "1e-2", "--output_dir", lora],
            ["finetune", *score, *words],
            ["merge", "--model", lora, "--output_dir", merged],
            *(["predict", "--model", model, *file_flags, f"{model}.jsonl"] for model in (lora, merged)),
        )
        assert [result["code"] for result in results] == [0] * 5, [result["output"][-500:] for result in results]
        assert "was trained on" not in results[1]["output"]
        after = json.loads((tmp_path / f"{name}-lora" / "metrics.json").read_text())["after"]
        before = json.loads((tmp_path / f"{name}-scored" / "metrics.json").read_text())["before"]
        assert before["loss"] == pytest.approx(after["loss"], abs=1e-6)
        for model in (lora, merged):
            answers = [json.loads(line) for line in Path(f"{model}.jsonl").read_text().splitlines()]
            losses = [-torch.tensor(answer["scores"][str(answer["label"])]).log() for answer in answers]
            assert float(sum(losses)) / len(losses) == pytest.approx(after["loss"], abs=1e-5)
