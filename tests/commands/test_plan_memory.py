"""``zokernel plan --memory``: the ways that a model has, and flags that would change nothing."""

from __future__ import annotations

import pytest
from quantized import KINDS, declare, save_gguf, save_llama, save_packed

from zokernel.cli import main
from zokernel.finetune.models.check import check_model
from zokernel.finetune.models.load import load_pretrained
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.readable import readable_bytes

ADAPTER = ["--lora true --perturb stacked", "--lora true"]
IN_MEMORY = ["--perturb in_place", "--perturb in_forward", *ADAPTER]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def table(capsys):
    """A function that returns the table of a model: what follows the flags of each way, by these."""

    def of(model, *more):
        assert main(["plan", "--memory", "true", "--model_name_or_path", str(model), *more]) == 0
        lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
        start = lines[0].index("trained")
        return {line[:start].strip(): line[start:].split() for line in lines[1:]}

    return of


def test_unpacked_files_are_neither_quantized_again_nor_streamed(base, table, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    plain = table(base)
    assert {"--offload disk", "--lora true --load_in_4bit true"} < set(plain)
    for model in (save_gguf(base, tmp_path / "tiny.gguf"), save_packed(base, tmp_path / "packed")[0]):
        assert table(model) == {flags: plain[flags] for flags in IN_MEMORY}


def test_a_checkpoint_that_stays_quantized_takes_what_its_files_hold(base, table, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    arguments = ModelArguments(model_name_or_path=str(base), lora=True, quantization=KINDS["int8"][1])
    model = load_pretrained(check_model(arguments), arguments)
    model.save_pretrained(tmp_path / "int8")
    found = table(tmp_path / "int8")
    assert list(found) == ADAPTER
    held = sum(len(part.untyped_storage()) for part in parts_of(model))
    assert all(cells[2:4] == readable_bytes(held).split() for cells in found.values())
    declare(tmp_path / "int8", quant_method="torchao")  # a configuration alone tells no size
    assert list(table(tmp_path / "int8" / "config.json")) == ADAPTER


def parts_of(model):
    for parameter in model.parameters():
        stored = parameter.data
        names = stored.__tensor_flatten__()[0] if hasattr(stored, "__tensor_flatten__") else []
        yield from [getattr(stored, name) for name in names] or [stored]


def test_the_folder_of_an_adapter_stands_for_its_base(base, table, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig())
    adapted.save_pretrained(tmp_path / "lora")
    assert table(tmp_path / "lora") == table(base)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--load_in_4bit", "true"], "--load_in_4bit would"),
        (["--quantization=torchao:int3", "--offload", "nvme"], "--quantization and --offload would"),
        (["--train_file", "none.jsonl", "--output_file", "x.json"], "--train_file and --output_file would"),
        (["--num-probes", "3"], "--num_probes would"),
    ],
)
def test_flags_without_effect_are_refused(flags, named, base, capsys):
    assert main(["plan", "--memory", "true", "--model_name_or_path", str(base), *flags]) == 2
    assert f"{named} change nothing" in capsys.readouterr().err
