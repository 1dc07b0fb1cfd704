"""``--offload disk`` on the command line: the same run as in memory, also when it is killed, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import killing
import pytest
from safetensors import safe_open

from zokernel.cli import main
from zokernel.finetune.models.offload import with_offload
from zokernel.finetune.settings.arguments import ModelArguments
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.settings.record import read_settings
from zokernel.journal import Journal

KILLS = int(os.environ.get("ZOKERNEL_KILLS", "20")) // 10


def finetune(flags: list[str], folder: Path, *extra: str) -> Path:
    assert main(["finetune", *flags, "--output_dir", str(folder), "--method", "mezo", *extra]) == 0
    return folder


def stored(folder: Path, name: str) -> dict[str, bytes]:
    with safe_open(folder / name, "np") as archive:
        return {key: archive.get_tensor(key).tobytes() for key in archive.keys()}  # noqa: SIM118


def measured(folder: Path) -> list[dict[str, float]]:
    metrics = json.loads((folder / "metrics.json").read_text())
    evaluations = [{k: v for k, v in row.items() if "second" not in k} for row in metrics["evaluations"]]
    return [metrics["before"], metrics["after"], *evaluations]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_parameters_end_at_the_same_bits(flags, tmp_path, precision, caplog):
    extra = ["--save_strategy", "journal", "--load_best_model_at_end", "false", "--precision", precision]
    flags = [*flags, "--eval_steps", "2", "--learning_rate", "1e-2"]
    expected = finetune(flags, tmp_path / "memory", "--perturb", "in_forward", *extra)
    streamed = finetune(flags, tmp_path / "disk", "--offload", "disk", "--precision", precision)
    assert stored(streamed, "model.safetensors") == stored(expected, "model.safetensors")
    assert Journal.read(streamed / "journal.zkj").steps == Journal.read(expected / "journal.zkj").steps
    assert measured(streamed) == measured(expected)
    assert "Offload disk" in caplog.text
    assert "KiB are kept between blocks (2 losses of at most" in caplog.text
    base = flags[flags.index("--model_name_or_path") + 1]
    assert main(["replay", "--base", base, "--journal", str(streamed), "--output_dir", str(tmp_path / "again")]) == 0
    assert stored(tmp_path / "again", "model.safetensors") == stored(streamed, "model.safetensors")


@pytest.mark.parametrize("way", [["cpu"], ["disk", "--offload_updates", "journal"]], ids=["cpu", "journal"])
def test_other_places_end_at_the_same_bits(flags, tmp_path, way, caplog):
    extra = ["--save_strategy", "journal", "--load_best_model_at_end", "false"]
    flags = [*flags, "--eval_steps", "2", "--learning_rate", "1e-2"]
    expected = finetune(flags, tmp_path / "memory", "--perturb", "in_forward", *extra)
    streamed = finetune(flags, tmp_path / "found", "--offload", *way)
    assert stored(streamed, "model.safetensors") == stored(expected, "model.safetensors")
    assert Journal.read(streamed / "journal.zkj").steps == Journal.read(expected / "journal.zkj").steps
    assert measured(streamed) == measured(expected)
    if way == ["cpu"]:
        assert "this run computes on the CPU" in caplog.text
        assert not (streamed / "offload").exists()
    else:
        assert "writes nothing: step t repeats the updates of t - 1 steps" in caplog.text
        assert list((streamed / "offload").iterdir()) == []  # all weights were asked for at the end


def test_an_evaluation_copies_no_weights(flags, tmp_path):
    flags = [*flags, "--do_train", "false"]
    streamed = finetune(flags, tmp_path / "disk", "--offload", "disk")
    assert measured(streamed)[0] == measured(finetune(flags, tmp_path / "memory"))[0]
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_adapters_end_at_the_same_bits(flags, tmp_path):
    extra = ["--lora", "true", "--load_best_model_at_end", "true"]
    expected = finetune(flags, tmp_path / "memory", "--perturb", "in_forward", *extra)
    streamed = finetune(flags, tmp_path / "disk", "--offload", "disk", *extra)
    assert stored(streamed, "adapter_model.safetensors") == stored(expected, "adapter_model.safetensors")
    assert measured(streamed) == measured(expected)


@pytest.mark.parametrize("perturb", ["stacked", "in_forward"])
def test_adapters_are_perturbed_as_asked(flags, tmp_path, perturb, caplog):
    extra = ["--lora", "true", "--perturb", perturb]
    expected = finetune(flags, tmp_path / "memory", *extra)
    caplog.clear()
    streamed = finetune(flags, tmp_path / "disk", "--offload", "disk", *extra)
    assert stored(streamed, "adapter_model.safetensors") == stored(expected, "adapter_model.safetensors")
    setting = (read_settings(streamed) or {})["perturb"]
    assert (setting.value, setting.source) == (perturb, "user")
    assert ("in one pass over the weights" in caplog.text) == (perturb == "in_forward")


def test_micro_batches_are_counted_in_what_a_step_reads(flags, tmp_path, caplog):
    def read(*extra: str) -> float:
        caplog.clear()
        finetune(flags, tmp_path / str(len(extra)), "--lora", "true", "--offload", "disk", *extra)
        value, unit = re.findall(r"every step reads ([\d.]+) (\wiB)", caplog.text)[-1]
        return float(value) * {"KiB": 1, "MiB": 1024}[unit]

    assert read("--gradient_accumulation_steps", "3") == pytest.approx(3 * read(), rel=5e-3)  # three digits are shown


def test_a_streamed_run_that_goes_on_in_memory_keeps_its_last_weights(flags, tmp_path):
    flags = [*flags, "--learning_rate", "1e-2"]
    run = finetune(flags, tmp_path / "found", "--offload", "disk")
    steps = Journal.read(run / "journal.zkj").num_steps
    longer = ["--max_steps", str(steps + 2), "--resume_from_checkpoint", "last"]
    finetune(flags, run, *longer)
    assert json.loads((run / "metrics.json").read_text())["best_step"] == steps + 2
    expected = finetune(flags, tmp_path / "expected", "--offload", "disk", "--max_steps", str(steps + 2))
    assert Journal.read(run / "journal.zkj").num_steps == Journal.read(expected / "journal.zkj").num_steps


@pytest.mark.parametrize("updates", ["disk", "journal"])
def test_a_killed_run_continues_with_its_files(flags, tmp_path, updates):
    argv = ["finetune", *flags, "--method", "mezo", "--max_steps", "8", "--offload", "disk", "--eval_steps", "4"]
    argv += ["--offload_updates", updates]
    argv += ["--offload_dir", str(tmp_path / "files")]
    log, whole, killed = tmp_path / "log", tmp_path / "whole", tmp_path / "killed"
    process = killing.start([*argv, "--output_dir", str(whole)], log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    instants, kills = random.Random(0), 0
    while True:
        at_write = instants.randrange(20, 90) if kills < KILLS else None
        process = killing.start([*argv, "--output_dir", str(killed)], log, die_at_write=at_write)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            continue
        assert process.exitcode == 0, log.read_text()
        assert stored(killed, "model.safetensors") == stored(whole, "model.safetensors")
        assert Journal.read(killed / "journal.zkj").steps == Journal.read(whole / "journal.zkj").steps
        if kills >= KILLS:
            break
        shutil.rmtree(killed)  # the files of the weights stay: the next run must not be led astray by them


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ({"offload": "cpu", "offload_dir": "x"}, {}, "keeps no files"),
        ({"offload": "cpu", "offload_updates": "journal"}, {}, "with --offload disk"),
        ({"offload": "disk", "offload_updates": "journal", "lora": True}, {}, "no adapter"),
        ({"offload": "disk", "offload_updates": "ram"}, {}, "must be disk or journal"),
        ({"offload_updates": "journal"}, {}, "add --offload disk"),
        ({"offload": "gpu"}, {}, "must be disk or cpu"),
        ({"offload_dir": "x"}, {}, "add --offload disk"),
        ({"offload": "disk"}, {"method": "adamw"}, "takes gradients"),
        ({"offload": "disk"}, {"perturb": "in_place"}, "once for every loss"),
        ({"offload": "disk"}, {"perturb": "stacked"}, "hold copies"),
        ({"offload": "disk"}, {"save_strategy": "best"}, "use journal"),
        ({"offload": "disk"}, {"load_best_model_at_end": True}, "not kept"),
        ({"offload": "disk", "lora": True, "merge_adapter": True}, {}, "zokernel merge"),
        ({"offload": "disk"}, {"method": "grzo"}, "grzo gives every example directions of its own"),
        (
            {"offload": "cpu", "lora": True},
            {"method": "forward_difference", "method_args": ["per_example=true"]},
            "forward_difference gives every example directions of its own",
        ),
    ],
)
def test_runs_that_cannot_stream_are_refused(arguments, settings, message, tmp_path):
    from zokernel.errors import UsageError

    config = ZOConfig(output_dir=str(tmp_path), **({"method": "mezo"} | settings))
    with pytest.raises(UsageError, match=message):
        with_offload(ModelArguments(**arguments), config)


@pytest.mark.parametrize("updates", ["disk", "journal"])
def test_a_folder_for_weights_that_cannot_be_written_is_named_before_training(flags, tmp_path, updates, capsys):
    file = tmp_path / "file"
    file.write_text("")
    model_folder = flags[flags.index("--model_name_or_path") + 1]
    for folder, code, message in [
        (f"{file}/within", 1, f"{file} is a file, so choose another."),
        ("/proc/none", 1, "/proc/none cannot be written (No such file or directory): choose another --offload_dir."),
        (model_folder, 2, f"--offload_dir {model_folder} is the model's own folder"),
    ]:
        words = ["--offload", "disk", "--offload_updates", updates, "--offload_dir", folder]
        assert main(["finetune", *flags, "--output_dir", str(tmp_path / "run"), *words]) == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "journal.zkj").exists()


@pytest.mark.parametrize("method", [["--method", "zo_adam"], ["--method", "hizoo"], ["--momentum", "0.9"]], ids=str)
@pytest.mark.parametrize("offload", ["disk", "cpu"])
def test_methods_with_more_state_are_refused_before_weights_are_read(
    flags, tmp_path, method, offload, capsys, monkeypatch
):
    monkeypatch.setattr("zokernel.finetune.models.offload.load_streamed", None)  # nothing is loaded
    words = ["finetune", *flags, "--output_dir", str(tmp_path / "run"), "--method", "mezo", *method]
    assert main([*words, "--offload", offload]) == 2
    assert "scalars times directions" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
