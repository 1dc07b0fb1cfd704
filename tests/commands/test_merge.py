"""``zokernel merge`` and ``--merge_adapter``: plain transformers loads what scores as the adapter did."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zokernel.cli import main

KINDS = {
    "lora": ["--lora", "true"],
    "dora": ["--lora", "true", "--use_dora", "true", "--use_rslora", "true"],
    "head": ["--lora", "true", "--modules_to_save", "lm_head"],
    "embeddings": ["--lora", "true", "--lora_target_modules", "embed_tokens", "q_proj"],
}
RUN = ("--learning_rate", "3e-2", "--eps", "1e-2", "--method", "mezo", "--max_steps", "3", "--eval_strategy", "no")
RUN += ("--load_best_model_at_end", "false")


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_scores_as_its_adapter(kind, flags, tmp_path, tiny_lm_path, capsys):
    assert main(["finetune", *flags, *RUN, *KINDS[kind]]) == 0
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert main(["merge", "--model", str(run), "--output_dir", str(merged)]) == 0
    assert f"Saved in {merged}" in capsys.readouterr().out
    ids = AutoTokenizer.from_pretrained(merged)("a good movie It was", return_tensors="pt").input_ids
    base = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
        untrained = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, run).eval()(ids).logits
    torch.testing.assert_close(plain, adapted, rtol=0, atol=1e-5)
    assert (plain - untrained).abs().max() > 1e-4
    assert main(["merge", "--model", str(run), "--output_dir", str(merged)]) == 2
    assert "already holds files" in capsys.readouterr().err


def test_a_finished_run_with_merge_adapter_holds_the_merged_model(flags, tmp_path, capsys):
    assert main(["finetune", *flags, *RUN, "--lora", "true", "--merge_adapter", "true"]) == 0
    run = tmp_path / "run"
    assert metrics_of(run)["saved"] == "model"
    assert not (run / "adapter_config.json").exists()
    assert not (run / "adapter_model.safetensors").exists()
    again = ["--model_name_or_path", str(run), "--do_train", "false", "--output_dir", str(tmp_path / "score")]
    assert main(["finetune", *flags, *again]) == 0
    scored, trained = metrics_of(tmp_path / "score")["before"], metrics_of(run)["after"]
    assert scored["accuracy"] == trained["accuracy"]
    assert scored["loss"] == pytest.approx(trained["loss"], abs=1e-5)


def test_what_cannot_be_merged_is_refused(flags, tmp_path, tiny_lm_path, capsys):
    for wrong, told in (
        (["--merge_adapter", "true"], "no adapter to merge"),
        (["--merge_adapter", "true", "--prompt_tuning", "true"], "Virtual tokens are inputs, not weights"),
        (["--merge_adapter", "true", "--lora", "true", "--do_train", "false"], "'zokernel merge' merges a saved"),
    ):
        assert main(["finetune", *flags, *wrong]) == 2
        assert told in capsys.readouterr().err
    base = AutoModelForCausalLM.from_pretrained(tiny_lm_path)
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "prompt")
    for model, told in (
        (tmp_path / "prompt", "Virtual tokens are inputs"),
        (tiny_lm_path, "holds no adapter"),
        (tmp_path / "nothing", "no model folder"),
    ):
        assert main(["merge", "--model", str(model), "--output_dir", str(tmp_path / "out")]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
