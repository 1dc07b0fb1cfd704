"""What each way to hold the weights takes, from a configuration: bytes counted by hand, and the fastest that fits."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers

from zokernel.cli import main
from zokernel.finetune.models.estimate import check_memory
from zokernel.finetune.models.memory_report import ConfiguredModel, describe_setups
from zokernel.finetune.models.memory_setups import Setup, fastest_setup, list_setups, measure, table
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.finetune.settings.config import ZOConfig

CONFIG = transformers.LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
MATRICES = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96  # q, o; k, v; gate, up, down
ROWS = 64 + 32 + 32 + 64 + 96 + 96 + 64  # each has a scale, with 8 bits
BLOCK, OUTSIDE = MATRICES + 2 * 64, 1000 * 64 + 64  # two norms; the tied embeddings, and the last norm


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_weights_are_counted_by_unit(dtype: torch.dtype, size: int) -> None:
    sizes = measure(CONFIG, dtype)
    assert (sizes.blocks, sizes.block) == (3 * BLOCK * size, BLOCK * size)
    assert sizes.outside == OUTSIDE * size
    rest = (BLOCK - MATRICES) * 3 * size + OUTSIDE * size
    assert sizes.quantized == {
        "8bit": rest + 3 * (MATRICES + 4 * ROWS),
        "4bit": rest + 3 * (MATRICES // 2 + 4 * MATRICES // 64),
        "torchao:int8": rest + 3 * (MATRICES + (4 + 1) * ROWS),
        "torchao:int4": rest + 3 * (MATRICES + (size + 1) * MATRICES // 32),
    }
    assert (sizes.scales["torchao:int8"], sizes.scales["torchao:int4"]) == (3 * ROWS, 3 * MATRICES // 32)
    assert sizes.cached == 3 * 2 * 2 * 16  # blocks; keys and values; heads of 16 numbers


def setups_by_flags(
    *, gpu: bool = False, writes: int = 0, rows: int = 2, tokens: int = 10, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Setup]:
    sizes = measure(CONFIG, dtype)
    return {
        setup.flags: setup for setup in list_setups(sizes, losses=6, rows=rows, tokens=tokens, writes=writes, gpu=gpu)
    }


def test_each_setup_takes_what_was_counted_by_hand() -> None:
    setups, whole = setups_by_flags(), 2 * (3 * BLOCK + OUTSIDE)
    assert setups["--lora true"].weights == whole
    assert setups["--lora true --load_in_8bit true"].weights == whole - 3 * (MATRICES - 4 * ROWS)
    assert setups["--lora true --load_in_4bit true"].weights == whole - int(3 * MATRICES * (2 - 0.5625))
    for kind, scales in {"int8": 3 * ROWS, "int4": 3 * MATRICES // 32}.items():
        lora, trained = (setups[f"{what} --quantization torchao:{kind}"] for what in ("--lora true", "--train scales"))
        assert (lora.trains, trained.trains) == ("an adapter", "scales")
        assert trained.weights == lora.weights + 4 * scales
        assert trained.activations == lora.activations == setups["--lora true"].activations
    one = 20 * (64 * 2 + 1000 * 6)  # the head: scores in bfloat16, and in float32
    assert setups["--lora true"].activations == one
    assert setups["--lora true --perturb stacked"].activations == 6 * one
    disk, journal = setups["--offload disk"], setups["--offload disk --offload_updates journal"]
    assert disk.activations == 6 * (one + 2 * 20 * 64 * 2)  # six losses, and what each keeps between blocks
    assert (disk.read, disk.written, journal.read, journal.written) == (whole, whole, whole, 0)
    assert journal.weights == disk.weights + 2 * (OUTSIDE + BLOCK)
    assert setups["--lora true --offload disk"].weights == 0
    assert "--perturb in_place" not in setups  # bfloat16 would round too coarsely
    assert "--perturb in_place" in setups_by_flags(dtype=torch.float32)
    assert setups_by_flags(writes=5)["--lora true"].cache == 2 * 15 * 192 * 2


def test_a_gpu_holds_two_blocks_and_the_host_the_rest() -> None:
    setups = setups_by_flags(gpu=True)
    setup, adapter = setups["--offload cpu"], setups["--lora true --offload cpu"]
    assert setup.host == 2 * 3 * BLOCK
    assert (setup.moved, adapter.moved) == (2 * setup.host, setup.host)
    assert setup.weights == 2 * 2 * BLOCK + 2 * OUTSIDE + measure(CONFIG, torch.bfloat16).copies
    assert "--offload disk" not in setups


@pytest.fixture
def describe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function that returns what is needed beside some free memory, with every library or without some."""

    def of(free: int, *, rows: int = 2, tokens: int = 10, without: str = "", **options: Any) -> str:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == without else object())
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        model = ConfiguredModel(CONFIG, torch.float32, "causal", ModelArguments(**options))
        return describe_setups(model, 6, rows, tokens, gpu=False)

    return of


def test_small_sizes_are_not_shown_as_zero_and_an_adapter_is_advised_on_alone(describe: Callable[..., str]) -> None:
    sizes = measure(CONFIG, torch.float32)
    text = describe(2**33, lora=True)
    assert sizes.weights == 626_432
    first = text.split("\n\n")[1].splitlines()[1]
    assert first.split("  ")[0] == "--perturb in_place"
    assert " 612 KiB " in first
    assert " 0.0" not in text
    assert "8 GiB are free" in text
    assert "Fastest that fits for an adapter: --lora true --perturb stacked." in text
    assert "for all weights" not in text
    all_kinds = describe(2**33)
    assert "Fastest that fits for all weights: --perturb in_place." in all_kinds
    assert "Fastest that fits for scales: --train scales --quantization torchao:int8." in all_kinds


def test_where_nothing_fits_the_table_says_what_would_help(describe: Callable[..., str]) -> None:
    many, one, short = (
        [
            setup
            for setup in setups_by_flags(rows=rows, tokens=tokens, dtype=torch.float32).values()
            if setup.trains == "an adapter"
        ]
        for rows, tokens in ((4, 10), (1, 10), (1, 1))
    )
    least, with_one, with_short = (min(setup.memory for setup in setups) for setups in (many, one, short))
    assert with_short < with_one < least

    def quickest(setups: list[Setup], free: int) -> str:
        best = fastest_setup(setups, free, "an adapter")
        assert best
        return f"{best.flags} would fit."

    fewer = "fewer rows (--update_examples here, --per_device_train_batch_size in a run)"
    ends = {
        least - 1: f"none; with {fewer}, {quickest(one, least - 1)}",
        with_one: f"none; with {fewer}, {quickest(one, with_one)}",
        with_one - 1: f"none; with one shorter row (--max_length), {quickest(short, with_one - 1)}",
        with_short - 1: "none, even with one short row: use a smaller model.",
    }
    for free, end in ends.items():
        assert f"Fastest that fits for an adapter: {end}" in describe(free, rows=4, lora=True).splitlines()
    assert "none; with fewer" not in describe(with_one - 1, rows=1, lora=True)


def test_a_library_that_the_fastest_setup_lacks_is_named(describe: Callable[..., str]) -> None:
    by_flags = setups_by_flags(rows=2, tokens=10, dtype=torch.float32)
    free = by_flags["--lora true --load_in_8bit true"].memory
    ends = {
        "bitsandbytes": "Fastest that fits for an adapter: --lora true --load_in_8bit true. It needs bitsandbytes, "
        "which is not installed: pip install 'zokernel[quantized]'.",
        "peft": "8bit true. It needs peft, which is not installed: pip install 'zokernel[finetune]'.",
        "torchao": "torchao:int8. It needs torchao, which is not installed: pip install 'zokernel[quantized]'.",
    }
    for package, end in ends.items():
        lines = describe(free + 2**14, without=package).splitlines()
        assert sum(line.endswith(end) for line in lines) == 1
    assert "not installed" not in describe(free)


def test_the_fastest_moves_least_of_those_that_fit() -> None:
    by_flags = setups_by_flags(rows=1, tokens=1)
    setups = list(by_flags.values())
    most = max(setup.memory for setup in setups)

    def name(free: int, trains: str) -> str | None:
        best = fastest_setup(setups, free, trains)
        return best.flags if best else None

    assert name(most, "an adapter") == "--lora true --perturb stacked"
    assert name(by_flags["--lora true"].memory, "an adapter") == "--lora true"
    assert name(by_flags["--lora true --load_in_8bit true"].memory, "an adapter") == "--lora true --load_in_8bit true"
    assert name(by_flags["--lora true --offload disk"].memory, "an adapter") == "--lora true --offload disk"
    assert name(most, "all weights") == "--perturb in_forward"
    assert name(1, "all weights") is None
    assert not any(line.endswith(" yes") for line in table(setups, 1).splitlines())


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_configuration_is_enough(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIG.save_pretrained(tmp_path)
    name = tmp_path if kind == "folder" else tmp_path / "config.json"
    assert main(["plan", "--memory", "true", "--model_name_or_path", str(name), "--dtype", "bfloat16"]) == 0
    output = capsys.readouterr().out
    assert f"{3 * BLOCK + OUTSIDE:,} parameters in bfloat16, 2 losses per step of 16 rows of 128 tokens." in output
    assert "Fastest that fits for an adapter: --lora true --perturb stacked." in output
    assert "--offload disk --offload_updates journal" in output


def test_a_configuration_that_builds_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": -1}))
    assert main(["plan", "--memory", "true", "--model_name_or_path", str(tmp_path)]) == 2
    assert "compare its config.json" in capsys.readouterr().err


def test_the_start_of_a_run_reports_the_memory_already_held(caplog: pytest.LogCaptureFixture) -> None:
    """So that weights, activations and this can be compared with the peak in a report."""
    config = ZOConfig(output_dir="unused", precision="fp32", use_cpu=True)
    with caplog.at_level("INFO", logger="zokernel"):
        check_memory(CONFIG, torch.float32, config)
    weights = 4 * (3 * BLOCK + OUTSIDE)
    sentence = r"Memory: (.*) KiB \(weights (.*) KiB\) and activations, plus about (.*) ([MG])iB of libraries and data;"
    match = re.search(sentence, caplog.text)
    assert match
    assert float(match[1]) == float(match[2]) == round(weights / 2**10)
    held = float(match[3]) * {"M": 2**20, "G": 2**30}[match[4]]
    assert held == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
