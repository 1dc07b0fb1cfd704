"""A run's saved model is what was trained, whatever its files call the weights and whatever its layers do to them."""

import pytest
import torch
import transformers as tf
from models import save_tokenizer

from zokernel.finetune import ZOConfig, finetune, get_task, replay
from zokernel.finetune.models.kind import auto_class, kind_of_model
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.tasks.toy import toy_files

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**SIZES, "num_key_value_heads": 2}
XLM = {"emb_dim": 16, "n_layers": 1, "n_heads": 2}
# Family -> class, configuration: experts that are stacked, heads and layers that are renamed, several shapes of models.
FAMILIES = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", {"hidden_size": 16, "num_hidden_layers": 4, "rescale_every": 1}),
    "xlm": ("XLMWithLMHeadModel", "XLMConfig", XLM),
    "bert decoder": ("BertLMHeadModel", "BertConfig", {**SIZES, "is_decoder": True}),
}
MASKED = ("xlm",)


def save(folder, family):
    name, config, sizes = FAMILIES[family]
    tokenizer = save_tokenizer(folder, masked=family in MASKED)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = getattr(tf, name)(getattr(tf, config)(**sizes, **ids)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_best_and_continued_runs_save_what_was_trained(tmp_path, monkeypatch, family):
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    base = save(tmp_path / "base", family)
    task = DataArguments(task="sst2", **toy_files(tmp_path / "data", "sst2", get_task("sst2"), size=12))

    def run(name, steps, model=base, **settings):
        config = ZOConfig(
            output_dir=str(tmp_path / name),
            max_steps=steps,
            learning_rate=1e-2,
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            per_device_train_batch_size=4,
            precision="fp32",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            **settings,
        )
        return finetune(ModelArguments(model_name_or_path=str(model)), task, config)

    metrics = run("whole", 3)
    assert metrics["language_model"] == ("masked" if family in MASKED else "causal")
    run("parts", 1)
    continued = run("parts", 3, resume_from_checkpoint="last")
    assert continued["after"] == metrics["after"]
    auto = auto_class("masked" if family in MASKED else "causal")
    saved, parts = (auto.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert kind_of_model(saved) == metrics["language_model"]
    trained = replay(base, tmp_path / "whole", step=metrics["best_step"])
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, trained[name]), name
        assert torch.equal(parameter, parts.get_parameter(name)), name
    scored = run("scored", 1, model=tmp_path / "whole", do_train=False)
    assert scored["before"]["loss"] == pytest.approx(metrics["after"]["loss"], abs=1e-6)
