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
from zokernel.finetune.models.needed import Configured, needed
from zokernel.finetune.models.ways import Way, fastest, measure, table, ways
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


def found(
    *, gpu: bool = False, writes: int = 0, rows: int = 2, tokens: int = 10, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Way]:
    sizes = measure(CONFIG, dtype)
    return {way.flags: way for way in ways(sizes, losses=6, rows=rows, tokens=tokens, writes=writes, gpu=gpu)}


def test_each_way_takes_what_was_counted_by_hand() -> None:
    there, whole = found(), 2 * (3 * BLOCK + OUTSIDE)
    assert there["--lora true"].weights == whole
    assert there["--lora true --load_in_8bit true"].weights == whole - 3 * (MATRICES - 4 * ROWS)
    assert there["--lora true --load_in_4bit true"].weights == whole - int(3 * MATRICES * (2 - 0.5625))
    for kind, scales in {"int8": 3 * ROWS, "int4": 3 * MATRICES // 32}.items():
        lora, trained = (there[f"{what} --quantization torchao:{kind}"] for what in ("--lora true", "--train scales"))
        assert (lora.trains, trained.trains) == ("an adapter", "scales")
        assert trained.weights == lora.weights + 4 * scales
        assert trained.activations == lora.activations == there["--lora true"].activations
    one = 20 * (64 * 2 + 1000 * 6)  # the head: scores in bfloat16, and in float32
    assert there["--lora true"].activations == one
    assert there["--lora true --perturb stacked"].activations == 6 * one
    disk, journal = there["--offload disk"], there["--offload disk --offload_updates journal"]
    assert disk.activations == 6 * (one + 20 * 64 * 2)  # six losses, and their borders
    assert (disk.read, disk.written, journal.read, journal.written) == (whole, whole, whole, 0)
    assert journal.weights == disk.weights + 2 * (OUTSIDE + BLOCK)
    assert there["--lora true --offload disk"].weights == 0
    assert "--perturb in_place" not in there  # bfloat16 would round too coarsely
    assert "--perturb in_place" in found(dtype=torch.float32)
    assert found(writes=5)["--lora true"].cache == 2 * 15 * 192 * 2


def test_a_gpu_holds_two_blocks_and_the_host_the_rest() -> None:
    there = found(gpu=True)
    way, adapter = there["--offload cpu"], there["--lora true --offload cpu"]
    assert way.host == 2 * 3 * BLOCK
    assert (way.moved, adapter.moved) == (2 * way.host, way.host)
    assert way.weights == 2 * 2 * BLOCK + 2 * OUTSIDE + measure(CONFIG, torch.bfloat16).copies
    assert "--offload disk" not in there


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function that returns what is needed beside some free memory, with every library or without some."""

    def of(free: int, *, rows: int = 2, tokens: int = 10, without: str = "", **more: Any) -> str:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == without else object())
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        model = Configured(CONFIG, torch.float32, "causal", ModelArguments(**more))
        return needed(model, 6, rows, tokens, gpu=False)

    return of


def test_small_sizes_are_not_told_as_zero_and_an_adapter_is_advised_on_alone(told: Callable[..., str]) -> None:
    sizes = measure(CONFIG, torch.float32)
    found = told(2**33, lora=True)
    assert sizes.weights == 626_432
    first = found.split("\n\n")[1].splitlines()[1]
    assert first.split("  ")[0] == "--perturb in_place"
    assert " 612 KiB " in first
    assert " 0.0" not in found
    assert "8 GiB are free" in found
    assert "Fastest that fits for an adapter: --lora true --perturb stacked." in found
    assert "for all weights" not in found
    both = told(2**33)
    assert "Fastest that fits for all weights: --perturb in_place." in both
    assert "Fastest that fits for scales: --train scales --quantization torchao:int8." in both


def test_where_nothing_fits_it_is_said_what_would_help(told: Callable[..., str]) -> None:
    many, one, short = (
        [way for way in found(rows=rows, tokens=tokens, dtype=torch.float32).values() if way.trains == "an adapter"]
        for rows, tokens in ((4, 10), (1, 10), (1, 1))
    )
    least, with_one, with_short = (min(way.memory for way in there) for there in (many, one, short))
    assert with_short < with_one < least

    def quickest(there: list[Way], free: int) -> str:
        best = fastest(there, free, "an adapter")
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
        assert f"Fastest that fits for an adapter: {end}" in told(free, rows=4, lora=True).splitlines()
    assert "none; with fewer" not in told(with_one - 1, rows=1, lora=True)


def test_a_library_that_the_way_to_take_lacks_is_named(told: Callable[..., str]) -> None:
    by_flags = found(rows=2, tokens=10, dtype=torch.float32)
    free = by_flags["--lora true --load_in_8bit true"].memory
    ends = {
        "bitsandbytes": "Fastest that fits for an adapter: --lora true --load_in_8bit true. It needs bitsandbytes, "
        "which is not installed: pip install 'zokernel[quantized]'.",
        "peft": "8bit true. It needs peft, which is not installed: pip install 'zokernel[finetune]'.",
        "torchao": "torchao:int8. It needs torchao, which is not installed: pip install 'zokernel[quantized]'.",
    }
    for package, end in ends.items():
        lines = told(free + 2**14, without=package).splitlines()
        assert sum(line.endswith(end) for line in lines) == 1
    assert "not installed" not in told(free)


def test_the_fastest_moves_least_of_those_that_fit() -> None:
    by_flags = found(rows=1, tokens=1)
    there = list(by_flags.values())
    most = max(way.memory for way in there)

    def name(free: int, trains: str) -> str | None:
        best = fastest(there, free, trains)
        return best.flags if best else None

    assert name(most, "an adapter") == "--lora true --perturb stacked"
    assert name(by_flags["--lora true"].memory, "an adapter") == "--lora true"
    assert name(by_flags["--lora true --load_in_8bit true"].memory, "an adapter") == "--lora true --load_in_8bit true"
    assert name(by_flags["--lora true --offload disk"].memory, "an adapter") == "--lora true --offload disk"
    assert name(most, "all weights") == "--perturb in_forward"
    assert name(1, "all weights") is None
    assert not any(line.endswith(" yes") for line in table(there, 1).splitlines())


@pytest.mark.parametrize("where", ["folder", "file"])
def test_a_configuration_is_enough(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIG.save_pretrained(tmp_path)
    name = tmp_path if where == "folder" else tmp_path / "config.json"
    assert main(["plan", "--memory", "true", "--model_name_or_path", str(name), "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert f"{3 * BLOCK + OUTSIDE:,} parameters in bfloat16, 2 losses per step of 16 rows of 128 tokens." in told
    assert "Fastest that fits for an adapter: --lora true --perturb stacked." in told
    assert "--offload disk --offload_updates journal" in told


def test_a_configuration_that_builds_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": -1}))
    assert main(["plan", "--memory", "true", "--model_name_or_path", str(tmp_path)]) == 2
    assert "compare its config.json" in capsys.readouterr().err


def test_the_start_of_a_run_says_what_the_process_holds_already(caplog: pytest.LogCaptureFixture) -> None:
    """So that weights, activations and this can be compared with the peak in a report."""
    config = ZOConfig(output_dir="unused", precision="fp32", use_cpu=True)
    with caplog.at_level("INFO", logger="zokernel"):
        check_memory(CONFIG, torch.float32, config)
    weights = 4 * (3 * BLOCK + OUTSIDE)
    sentence = r"Memory: (.*) KiB \(weights (.*) KiB\) and activations, plus about (.*) ([MG])iB of libraries and data;"
    told = re.search(sentence, caplog.text)
    assert told
    assert float(told[1]) == float(told[2]) == round(weights / 2**10)
    held = float(told[3]) * {"M": 2**20, "G": 2**30}[told[4]]
    assert held == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
