"""Adapters of every kind: what is adapted, that they reload to the same bits, and what is refused before training."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from models import save_model
from transformers import AutoModelForCausalLM

from zokernel.cli import main
from zokernel.errors import UsageError
from zokernel.finetune.models.adapters import attach_adapter, check_adapter, part_to_train
from zokernel.finetune.models.lora import adapted_modules
from zokernel.finetune.models.saved_adapter import load_saved, name_base_, with_base
from zokernel.finetune.settings.arguments import ModelArguments

KINDS = {
    "lora": ["--lora", "true"],
    "dora": ["--lora", "true", "--use_dora", "true", "--lora_dropout", "0.1"],
    "rslora": ["--lora", "true", "--use_rslora", "true", "--lora_target_modules", "all-linear"],
    "saved": ["--lora", "true", "--modules_to_save", "norm", "lm_head"],
    "experts": ["--lora", "true", "--target_parameters", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "prompt": ["--prompt_tuning", "true", "--num_virtual_tokens", "3"],
    "prefix": ["--prefix_tuning", "true", "--num_virtual_tokens", "3"],
}
SHAPE = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
WIDE = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 48}


def mixtral(**options):
    config = transformers.MixtralConfig(**{**WIDE, **options}, num_local_experts=3, num_experts_per_tok=2)
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    paths = {"llama": save_model(root / "llama", "llama"), "mixtral": save_model(root / "mixtral", "llama")}
    words = len(transformers.AutoTokenizer.from_pretrained(paths["mixtral"]))
    mixtral(vocab_size=words, pad_token_id=1).save_pretrained(paths["mixtral"])
    return paths


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = ["Rome is right", "Oslo is wrong", "It was", "Maybe not", "No Yes No", "great Rome", "terrible", "x"]
    path.write_text("".join(json.dumps({"sentence": t, "label": n % 2}) + "\n" for n, t in enumerate(texts)))
    return path


def arguments(model, rows, folder, *flags, steps):
    words = ["--model_name_or_path", str(model), "--template", "{sentence} It was", "--label_words", "bad", "good"]
    for split in ("train", "validation", "test"):
        words += [f"--{split}_file", str(rows)]
    words += [
        "--method",
        "mezo",
        "--learning_rate",
        "1e-2",
        "--eps",
        "1e-2",
        "--precision",
        "fp32",
        "--use_cpu",
        "true",
    ]
    words += ["--per_device_train_batch_size", "4", "--max_steps", str(steps), "--eval_strategy", "no"]
    words += ["--load_best_model_at_end", "false", "--output_dir", str(folder), *flags]
    return ["finetune", *words]


def finetune(model, rows, folder, *flags, steps=1):
    assert main(arguments(model, rows, folder, *flags, steps=steps)) == 0
    return json.loads((Path(folder) / "metrics.json").read_text())


def saved_weights(folder):
    return peft.utils.load_peft_weights(str(folder), device="cpu")


@pytest.fixture(scope="module")
def trained(bases, rows, tmp_path_factory):
    """Return base, folder and metrics of a run of four steps with one kind of adapter; each is trained once."""
    cache = {}

    def get(kind):
        if kind not in cache:
            base = bases["mixtral" if kind == "experts" else "llama"]
            folder = tmp_path_factory.mktemp(kind) / "run"
            flags = [*KINDS[kind], "--save_strategy", "journal", "--perturb", "in_place"]
            cache[kind] = base, folder, finetune(base, rows, folder, *flags, steps=4)
        return cache[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_adapter_scores_the_same_when_it_is_loaded_again(kind, trained, rows, tmp_path, capsys):
    base, run, metrics = trained(kind)
    assert metrics["after"]["loss"] != metrics["before"]["loss"]
    scored = finetune(base, rows, tmp_path / "score", "--adapter_name_or_path", str(run), "--do_train", "false")
    after = pytest.approx(metrics["after"], rel=1e-6)  # rounding of fp32 depends on where weights lie in memory
    assert scored["before"] == after
    rerun = finetune(run, rows, tmp_path / "more", steps=1)  # the folder of the adapter as the model
    assert rerun["model"] == str(base)
    assert rerun["before"] == after
    assert rerun["after"]["loss"] != rerun["before"]["loss"]
    old, new = saved_weights(run), saved_weights(tmp_path / "more")
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[name], new[name]) for name in old)
    # What was saved is a plain adapter of peft, of the same values.
    config = json.loads((tmp_path / "more" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = peft.PeftModel.from_pretrained(bare, tmp_path / "more")
    state = peft.get_peft_model_state_dict(plain, save_embedding_layers=False)
    assert all(torch.equal(state[name], new[name]) for name in new)


@pytest.mark.parametrize("kind", KINDS)
def test_replay_and_resume_give_the_same_bits(kind, trained, rows, tmp_path, capsys):
    base, whole, metrics = trained(kind)
    flags = [*KINDS[kind], "--save_strategy", "journal", "--perturb", "in_place"]
    finetune(base, rows, tmp_path / "part", *flags, steps=2)
    resumed = finetune(base, rows, tmp_path / "part", *flags, "--resume_from_checkpoint", "last", steps=4)
    assert resumed["after"] == metrics["after"]
    assert main(["replay", "--base", str(base), "--journal", str(whole), "--output_dir", str(tmp_path / "again")]) == 0
    expected = saved_weights(whole)
    for folder in ("part", "again"):
        actual = saved_weights(tmp_path / folder)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["lora", "dora", "saved", "experts"])
@pytest.mark.parametrize("perturb", ["in_forward", "stacked", "auto"])
def test_every_way_to_perturb_takes_the_same_losses_or_is_refused(kind, perturb, trained, rows, tmp_path, capsys):
    base, _, metrics = trained(kind)
    argv = arguments(base, rows, tmp_path / perturb, *KINDS[kind], "--perturb", perturb, steps=4)
    if perturb == "stacked" and kind in ("dora", "experts"):
        assert main(argv) != 0
        error = capsys.readouterr().err
        assert "has no form for several copies of the weights: use --perturb in_place." in error
        assert "Traceback" not in error
        return
    assert main(argv) == 0
    after = json.loads((tmp_path / perturb / "metrics.json").read_text())["after"]
    assert after["loss"] == pytest.approx(metrics["after"]["loss"], abs=1e-5)


ARCHITECTURES = {
    "phi3": ("Phi3", {**WIDE, "pad_token_id": 1}, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "granite": ("Granite", WIDE, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    "mamba": (
        "Mamba",
        {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
        {"in_proj", "x_proj", "dt_proj"},
    ),
    "gpt_oss": (
        "GptOss",
        {**WIDE, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 1},
        {"q_proj", "k_proj", "v_proj", "o_proj"},
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_linear_layers_but_the_head_where_peft_has_no_choice(name, caplog):
    prefix, shape, expected = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**shape)).eval()
    caplog.set_level("INFO")
    adapted = attach_adapter(model, ModelArguments(lora=True))
    assert {found.rpartition(".")[2] for found in adapted_modules(adapted)} == expected
    if name not in peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        assert "all linear layers but the head" in caplog.text


MIXTURE = {**WIDE, "num_experts_per_tok": 1, "pad_token_id": 1}
STACKED = {
    "GptOss": {**MIXTURE, "head_dim": 8, "num_local_experts": 2},
    "Mixtral": {**MIXTURE, "num_local_experts": 2},
    "Qwen2Moe": {**MIXTURE, "num_experts": 2, "moe_intermediate_size": 8},
    "Qwen3Moe": {**MIXTURE, "num_experts": 2, "moe_intermediate_size": 8, "head_dim": 8},
    "Olmoe": {**MIXTURE, "num_experts": 2},
    "Llama": WIDE,
    "Mamba": ARCHITECTURES["mamba"][1],
}


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WITHOUT_EXPERTS = ("Llama", "Mamba")  # a convolution of Mamba has three dimensions, too
# peft adapts the experts of some models by itself, since they were linear layers once.
ADAPTED_BY_PEFT = [
    *(("Qwen3Moe", None), ("Olmoe", None)),
    *(("Mixtral", "all-linear"), ("Qwen3Moe", "all-linear"), ("Olmoe", "all-linear")),
]
EVERY = [(name, asked) for name in STACKED for asked in (None, "all-linear")]
LEFT_OUT = [case for case in EVERY if case[0] not in WITHOUT_EXPERTS and case not in ADAPTED_BY_PEFT]


def small(name):
    config = getattr(transformers, f"{name}Config")(**STACKED[name])
    return getattr(transformers, f"{name}ForCausalLM")(config)


def adapted_in(model, target, **options):
    """Return the names of what LoRA adapts, those of experts apart."""
    targets = None if target is None else [target]
    names = adapted_modules(attach_adapter(model, ModelArguments(lora=True, lora_target_modules=targets, **options)))
    experts = {name for name in names if "experts" in name}
    return set(names) - experts, experts


@pytest.mark.parametrize(("name", "target"), [case for case in EVERY if case[0] in WITHOUT_EXPERTS])
def test_there_is_no_warning_about_experts_where_there_are_none(name, target, caplog):
    caplog.set_level("INFO")
    adapted, experts = adapted_in(small(name), target)
    assert adapted
    assert not experts
    assert "stacked parameters" not in caplog.text


@pytest.mark.parametrize(("name", "target"), ADAPTED_BY_PEFT)
def test_there_is_no_warning_about_experts_that_are_adapted(name, target, caplog):
    caplog.set_level("INFO")
    _, experts = adapted_in(small(name), target)
    assert experts == {f"model.layers.0.{name}" for name in EXPERTS}
    assert "stacked parameters" not in caplog.text


@pytest.mark.parametrize(("name", "target"), LEFT_OUT)
def test_stacked_experts_that_are_left_out_are_named(name, target, caplog):
    caplog.set_level("INFO")
    model = small(name)
    stacked = [p.numel() for key, p in model.named_parameters() if key.endswith(("gate_up_proj", "experts.down_proj"))]
    share = 100 * sum(stacked) / sum(p.numel() for p in model.parameters())
    assert adapted_in(model, target)[1] == set()
    assert [message for message in caplog.messages if "stacked parameters" in message] == [
        f"{', '.join(EXPERTS)}: not modules but stacked parameters, {share:.0f} % of the model, so LoRA leaves them "
        f"out; --target_parameters {' '.join(EXPERTS)} adapts them."
    ]
    caplog.clear()
    _, experts = adapted_in(small(name), target, target_parameters=EXPERTS)
    assert "stacked parameters" not in caplog.text
    assert experts == {f"model.layers.0.{name}" for name in EXPERTS}


def test_modules_by_name_by_pattern_and_by_parameter():
    def ends(model, **options):
        return sorted(adapted_modules(attach_adapter(model, ModelArguments(lora=True, **options))))

    attention = "model.layers.0.self_attn"
    assert ends(mixtral(), lora_target_modules=["q_proj"]) == [f"{attention}.q_proj"]
    assert ends(mixtral(), lora_target_modules=[r".*\.[qk]_proj"]) == [f"{attention}.k_proj", f"{attention}.q_proj"]
    names = ends(mixtral(), lora_target_modules=["v_proj"], target_parameters=["experts.down_proj"])
    assert names == ["model.layers.0.mlp.experts.down_proj", f"{attention}.v_proj"]
    everything = ends(mixtral(), lora_target_modules=["all-linear"])
    assert {name for name in everything if "self_attn" in name} == {f"{attention}.{name}_proj" for name in "kqvo"}
    assert not any("lm_head" in name for name in everything)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora_target_modules": ["q_proj", "nope"]},
            "no module 'nope' to adapt: its modules are embed_tokens, q_proj",
        ),
        ({"lora_target_modules": [".*nope"]}, "no module that matches '.*nope'"),
        ({"lora_target_modules": ["(q_proj"]}, "is not a valid pattern"),
        ({"modules_to_save": ["score"]}, r"no module 'score' to train in full"),
        (
            {"target_parameters": ["experts.up"]},
            "stacked parameters are mlp.experts.gate_up_proj, mlp.experts.down_proj",
        ),
    ],
)
def test_an_unknown_name_is_refused_with_the_available_names(options, message):
    with pytest.raises(UsageError, match=message):
        attach_adapter(mixtral(), ModelArguments(lora=True, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "--use_dora is an option of LoRA"),
        ({"use_rslora": True}, "--use_rslora is an option of LoRA"),
        ({"lora_r": 8}, "--lora_r is an option of LoRA"),
        ({"lora_alpha": 1}, "--lora_alpha is an option of LoRA"),
        ({"lora_dropout": 0.0, "prompt_tuning": True}, "--lora_dropout is an option of LoRA"),
        ({"lora_target_modules": ["q"]}, "--lora_target_modules is an option of LoRA"),
        ({"modules_to_save": ["q"]}, "--modules_to_save is an option of LoRA"),
        ({"target_parameters": ["q"]}, "--target_parameters is an option of LoRA"),
        ({"num_virtual_tokens": 5}, "--num_virtual_tokens is an option of virtual tokens"),
        ({"num_virtual_tokens": 5, "lora": True}, "--num_virtual_tokens is an option of virtual tokens"),
        ({"lora": True, "target_parameters": ["q"], "use_dora": True}, "does not go together with --use_dora"),
        ({"lora": True, "prompt_tuning": True}, "One adapter is trained at a time"),
        ({"adapter_name_or_path": "x", "lora_r": 4}, "has its own lora_r"),
        ({"adapter_name_or_path": "x", "num_virtual_tokens": 4}, "has its own num_virtual_tokens"),
    ],
)
def test_unused_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        check_adapter(ModelArguments(**options))


def test_saved_adapters_are_recognised_by_their_configuration(bases, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(bases["llama"])
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "elsewhere")
    arguments = ModelArguments(str(bases["llama"]), adapter_name_or_path=str(tmp_path / "elsewhere"))
    assert part_to_train(arguments) == "virtual tokens"
    with pytest.raises(UsageError, match="is of another kind: leave out --lora"):
        check_adapter(ModelArguments(adapter_name_or_path=str(tmp_path / "elsewhere"), lora=True))
    resolved = with_base(ModelArguments(str(tmp_path / "elsewhere")))
    assert (resolved.model_name_or_path, resolved.adapter_name_or_path) == (
        str(bases["llama"]),
        str(tmp_path / "elsewhere"),
    )
    loaded = load_saved(AutoModelForCausalLM.from_pretrained(bases["llama"]), str(tmp_path / "elsewhere"))
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [
        "prompt_encoder.default.embedding.weight"
    ]


def test_an_adapter_of_another_model_and_a_missing_base_are_one_sentence(bases, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "a")
    with pytest.raises(UsageError, match="size mismatch"):
        load_saved(
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**WIDE, "hidden_size": 16})), str(tmp_path / "a")
        )
    deeper = transformers.LlamaConfig.from_pretrained(bases["llama"], num_hidden_layers=3, layer_types=None)
    with pytest.raises(UsageError, match=r"does not fit LlamaForCausalLM: it lacks .*layers\.2"):
        load_saved(transformers.LlamaForCausalLM(deeper), str(tmp_path / "a"))
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    for base, message in (
        (str(tmp_path / "gone"), "is not at .*gone any more"),
        (None, "does not say what its base is"),
    ):
        file.write_text(json.dumps({**config, "base_model_name_or_path": base}))
        with pytest.raises(UsageError, match=message):
            with_base(ModelArguments(str(tmp_path / "a")))
    with pytest.raises(UsageError, match=r"holds no adapter_config\.json"):
        part_to_train(ModelArguments(adapter_name_or_path=str(bases["llama"])))
    with pytest.raises(UsageError, match="There is no adapter folder"):
        part_to_train(ModelArguments(adapter_name_or_path=str(tmp_path / "nothing")))


def test_the_base_is_named_so_that_it_can_be_found_elsewhere(bases, monkeypatch, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    monkeypatch.chdir(bases["llama"].parent)
    for source, expected in (
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("org/model", "org/model"),
        ("llama", str(bases["llama"])),
    ):
        name_base_(adapted, source)
        adapted.save_pretrained(tmp_path / "a")
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == expected


def test_dropout_is_stored_and_off(caplog, capsys):
    caplog.set_level("INFO")
    adapted = attach_adapter(mixtral(), ModelArguments(lora=True, lora_dropout=0.5, lora_r=2))
    assert caplog.text.count("lora_dropout 0.5 is stored with the adapter, and is off") == 1
    assert adapted.peft_config["default"].lora_dropout == 0.5
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(adapted(input_ids=ids).logits, adapted(input_ids=ids).logits)


def test_the_revision_of_a_base_on_the_hub_is_kept_with_the_adapter(bases, tmp_path):
    """What a copy of the adapter without the record of its run is put on, here and by peft."""
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    options = {"model_name_or_path": "org/model", "model_revision": "v2"}
    attach_adapter(model, ModelArguments(**options, lora=True, lora_r=2)).save_pretrained(tmp_path / "a")
    assert peft.PeftConfig.from_pretrained(tmp_path / "a").revision == "v2"
    resolved = with_base(ModelArguments(str(tmp_path / "a")))
    assert (resolved.model_name_or_path, resolved.model_revision) == ("org/model", "v2")
    assert with_base(ModelArguments(str(tmp_path / "a"), model_revision="v3")).model_revision == "v3"
    plain = AutoModelForCausalLM.from_pretrained(bases["llama"])
    attach_adapter(plain, ModelArguments(model_name_or_path="org/model", lora=True)).save_pretrained(tmp_path / "b")
    assert peft.PeftConfig.from_pretrained(tmp_path / "b").revision is None
    assert with_base(ModelArguments(str(tmp_path / "b"))).model_revision == "main"
