"""The flags by which commands load a model by name are the same, and mean the same, in all of them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from quantized import save_gguf, save_llama
from safetensors.torch import load_file
from transformers import AutoTokenizer

from zokernel.cli import load, main
from zokernel.finetune import replay

COMMANDS = ("finetune", "demo", "plan", "predict", "merge", "replay", "journal", "kernel", "evolve")
TRUST = ["--trust_remote_code", "true"]

CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own-llama"
"""
MODEL = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnLlama(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_loads_a_model_has_them_with_help(command):
    parser = load(command)[1]
    helps = {action.dest: (action.help or "").lower() for action in parser._actions}
    assert helps["model_revision"].startswith("branch, tag or commit of ")
    assert helps["trust_remote_code"].startswith("run the python code that comes with ")


@pytest.fixture
def custom_model(tiny_lm_path, tmp_path, modules):
    """Folder of a Llama whose classes come with it."""
    folder = shutil.copytree(tiny_lm_path, tmp_path / "own-model")
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODEL)
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnLlama"}
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-llama", "architectures": ["OwnLlama"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_that_comes_with_the_base_runs_only_when_asked(custom_model, flags, tiny_lm_path, tmp_path, capsys):
    run = tmp_path / "run"
    assert (
        main(["finetune", *flags, "--model_name_or_path", str(custom_model), *TRUST, "--save_strategy", "journal"]) == 0
    )
    (tmp_path / "rows.csv").write_text("sentence,label\na good movie,1\na bad movie,0\n")
    kernel = [
        "kernel",
        "--x_o",
        "good",
        "--x_u",
        "bad",
        "--label_words",
        "terrible",
        "great",
        "--num_perturbations",
        "2",
    ]
    evolve = ["evolve", "--train_file", str(tmp_path / "rows.csv"), "--trainable_parameters", "norm", "--steps", "2"]
    rebuild = ["replay", "--base", str(custom_model), "--journal", str(run)]
    verify = ["journal", "verify", str(run), "--base", str(custom_model)]
    base_flags = ["--model_name_or_path", str(custom_model)]
    for number, words in enumerate([rebuild, verify, [*kernel, *base_flags], [*evolve, *base_flags]]):
        out = [] if words[0] == "journal" else ["--output_dir", str(tmp_path / str(number))]
        capsys.readouterr()
        assert main([*words, *out]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert "brings code of its own, which is not run: read it, and pass --trust_remote_code true" in output.err
        assert main([*words, *out, *TRUST]) == 0
    whole, rebuilt_weights = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "0"))
    assert all((whole[name] == rebuilt_weights[name]).all() for name in whole)
    rebuilt = replay(custom_model, run, trust_remote_code=True)
    assert all((whole[name] == tensor).all() for name, tensor in rebuilt.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "0").get_vocab()
    # The kernel is that of the plain classes, which compute the same.
    plain = [*kernel, "--model_name_or_path", str(tiny_lm_path), "--output_dir", str(tmp_path / "plain")]
    assert main(plain) == 0
    kernels = [json.loads((tmp_path / name / "kernel.json").read_text())["kernel"] for name in ("2", "plain")]
    assert kernels[0] == kernels[1]


def test_a_class_that_is_not_of_transformers_is_named(custom_model, flags, tmp_path, capsys):
    run = tmp_path / "run"
    config = json.loads((custom_model / "config.json").read_text())
    (custom_model / "modeling_own.py").write_text(
        MODEL.replace("from .configuration_own import OwnConfig", "OwnConfig = LlamaForCausalLM.config_class")
    )
    config |= {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnLlama"}}
    (custom_model / "config.json").write_text(json.dumps(config))
    assert main(["finetune", *flags, "--model_name_or_path", str(custom_model), *TRUST, "--max_steps", "1"]) == 0
    verify = ["journal", "verify", str(run), "--base", str(custom_model)]
    assert main(verify) == 2
    assert "was written for a OwnLlama, which transformers cannot load: if its code comes" in capsys.readouterr().err
    assert main([*verify, *TRUST]) == 0


def test_another_class_than_the_runs_is_named(custom_model, flags, tiny_lm_path, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["finetune", *flags, "--model_name_or_path", str(custom_model), *TRUST, "--max_steps", "1"]) == 0
    assert main(["journal", "verify", str(run), "--base", str(tiny_lm_path), *TRUST]) == 1
    assert "The base is a LlamaForCausalLM, and the run's was a OwnLlama" in capsys.readouterr().err


def test_an_adapters_folder_stands_for_base_and_adapter(flags, tiny_lm_path, tmp_path):
    assert main(["finetune", *flags, "--lora", "true", "--max_steps", "1"]) == 0
    (tmp_path / "rows.csv").write_text("sentence,label\na good movie,1\na bad movie,0\n")
    evolve = ["evolve", "--train_file", str(tmp_path / "rows.csv"), "--steps", "2", "--output_dir", str(tmp_path / "e")]
    assert main([*evolve, "--model_name_or_path", str(tmp_path / "run")]) == 0
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    count = json.loads((tmp_path / "e" / "evolution.json").read_text())["parameters"]
    assert count == sum(tensor.numel() for tensor in adapter.values())


def test_a_gguf_file_that_a_run_recorded_is_found_in_its_folder(flags, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    base, run = save_llama(tmp_path / "base"), tmp_path / "run"
    packed = tmp_path / "packed"
    packed.mkdir()
    save_gguf(base, packed / "tiny.gguf")
    model = ["--model_name_or_path", str(packed), "--gguf_file", "tiny.gguf", "--lora", "true", "--max_steps", "2"]
    assert main(["finetune", *flags, *model, "--save_strategy", "journal", "--load_best_model_at_end", "false"]) == 0
    rebuilt = tmp_path / "rebuilt"
    assert main(["replay", "--base", str(packed), "--journal", str(run), "--output_dir", str(rebuilt)]) == 0
    whole, rebuilt_weights = (load_file(folder / "adapter_model.safetensors") for folder in (run, rebuilt))
    assert all((whole[name] == rebuilt_weights[name]).all() for name in whole)
    kernel = ["kernel", "--x_o", "good", "--x_u", "bad", "--label_words", "good", "bad", "--num_perturbations", "2"]
    kernels = []
    for name in (str(base), str(packed / "tiny.gguf")):
        assert main([*kernel, "--model_name_or_path", name, "--output_dir", str(tmp_path / "k")]) == 0
        kernels.append(json.loads((tmp_path / "k" / "kernel.json").read_text())["kernel"])
    assert np.allclose(kernels[0], kernels[1], rtol=1e-4)
