"""What a run that is continued, or returned as finished, must have in common with the one that began it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zokernel.cli import main
from zokernel.finetune.models.starting_weights import stored_sha256
from zokernel.journal.hashes import SAMPLE

LONGER = ("--max_steps", "8", "--resume_from_checkpoint", "last")
METHODS = {
    "mezo": ("--save_strategy", "journal"),
    "adamw": ("--method", "adamw", "--save_strategy", "steps", "--save_steps", "3", "--eval_steps", "3"),
}


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def flipped(file, target, count):
    """Write the rows of a file with the labels of the first ``count`` flipped, and return where."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [{**row, "label": 1 - row["label"]} if n < count else row for n, row in enumerate(rows)]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(target)


@pytest.fixture
def model(tiny_lm_path, tmp_path):
    """A copy of the tiny model, which tests train further in place."""
    return shutil.copytree(tiny_lm_path, tmp_path / "model")


def retrain(file):
    """Give a file of weights others, as training them further does."""
    generator = torch.Generator().manual_seed(1)
    weights = {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("method", METHODS)
def test_other_held_out_rows_do_not_continue_a_run(split, method, flags, tiny_reviews_path, tmp_path, capsys):
    assert main(["finetune", *flags, *METHODS[method]]) == 0
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    file = tiny_reviews_path / f"{split}.jsonl"
    other = flipped(file, tmp_path / "other.jsonl", 4)  # as many rows, so that losses could be paired with these
    capsys.readouterr()
    assert main(["finetune", *flags, *METHODS[method], *LONGER, f"--{split}_file", other]) == 2
    assert (
        f"The {split} examples are not those of the run in {tmp_path / 'run'} ({split}: other rows): give it the same, "
        "or choose another --output_dir."
    ) in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    # The same rows in another place are the same.
    same = flipped(file, tmp_path / "same.jsonl", 0)
    assert main(["finetune", *flags, *METHODS[method], *LONGER, f"--{split}_file", same]) == 0
    assert metrics_of(tmp_path / "run")["steps"] == 8


@pytest.mark.parametrize("extra", [(), LONGER])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_was_trained_since_does_not_continue_a_run(method, extra, model, flags, tmp_path, capsys):
    words = ["finetune", *flags, *METHODS[method], "--model_name_or_path", str(model)]
    assert main(words) == 0
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    retrain(model / "model.safetensors")
    capsys.readouterr()
    assert main([*words, *extra]) == 2
    assert (
        f"The model's weights are not those that the run in {tmp_path / 'run'} began with: give it the same, choose "
        "another --output_dir, or start over with --overwrite_output_dir true."
    ) in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    assert main([*words, "--overwrite_output_dir", "true"]) == 0
    assert metrics_of(tmp_path / "run")["before"] != json.loads(before)["before"]


def test_an_adapter_that_was_trained_since_is_another_start(model, flags, tmp_path, capsys):
    first = ["finetune", *flags, "--model_name_or_path", str(model), "--lora", "true", "--max_steps", "2"]
    assert main([*first, "--output_dir", str(tmp_path / "first")]) == 0
    words = ["finetune", *flags, "--model_name_or_path", str(tmp_path / "first"), "--max_steps", "2"]
    assert main(words) == 0
    assert main(words) == 0  # nothing is left to do
    retrain(tmp_path / "first" / "adapter_model.safetensors")
    capsys.readouterr()
    assert main(words) == 2
    assert "The model's weights are not those that the run in" in capsys.readouterr().err


def test_the_same_weights_in_other_files_continue_a_run(model, flags, tmp_path, caplog):
    words = ["finetune", *flags, *METHODS["adamw"], "--model_name_or_path", str(model)]
    assert main(words) == 0
    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, model / file, {"format": "pt", "saved": "again"})
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}} | index))
    (model / "model.safetensors").unlink()
    assert main(words) == 0
    assert caplog.messages[-1].endswith("already holds this run, finished: nothing to do.")
    assert main([*words, *LONGER]) == 0
    assert metrics_of(tmp_path / "run")["steps"] == 8


def test_a_run_that_did_not_record_its_weights_is_continued(model, flags, tmp_path):
    words = ["finetune", *flags, "--model_name_or_path", str(model)]
    assert main(words) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"].pop("starting_weights").startswith("sha256 ")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert main(words) == 0  # nothing is left to do
    assert main([*words, *LONGER]) == 0
    assert metrics_of(tmp_path / "run")["steps"] == 8
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["starting_weights"].startswith("sha256 ")
    (tmp_path / "run" / "run.json").write_text("{")  # a damaged record stands in the way of no new run
    assert main([*words, "--overwrite_output_dir", "true"]) == 0


@pytest.mark.parametrize(
    ("flag", "difference"),
    [
        (["--calibrate", "true"], "calibrate: False there, True asked for"),
        (["--template", "{sentence} So it was"], "template: not set there, {sentence} So it was asked for"),
    ],
)
def test_examples_that_are_used_otherwise_do_not_continue_a_run(flag, difference, flags, tmp_path, capsys):
    words = ["finetune", *flags, *METHODS["adamw"]]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, *LONGER, *flag]) == 2
    assert (
        f"The examples are not used as in the run in {tmp_path / 'run'} ({difference}): repeat its settings, or choose "
        "another --output_dir."
    ) in capsys.readouterr().err


def test_every_tensor_and_part_counts(tmp_path):
    file, names = tmp_path / "model.safetensors", ["a", "b", "c"]
    weights = {name: torch.arange(10_000.0) for name in names} | {"d": torch.tensor(1.0), "e": torch.zeros(0)}
    save_file(weights, file)
    digests = {stored_sha256([file])}
    save_file(weights, file)
    assert digests == {stored_sha256([file])}
    changes = [(name, index) for name in names for index in (0, 1023, -1024, -1)]  # 4096 bytes are 1024 numbers
    for name, index in changes:
        other = weights[name].clone()
        other[index] += 1
        save_file(weights | {name: other}, file)
        digests.add(stored_sha256([file]))
    variants = [{"d": torch.tensor(2.0)}, {"a": weights["a"].view(100, 100)}, {"a": weights["a"].view(torch.int32)}]
    for other in variants:
        save_file(weights | other, file)
        digests.add(stored_sha256([file]))
    save_file({"z" + name: tensor for name, tensor in weights.items()}, file)
    digests.add(stored_sha256([file]))
    assert len(digests) == 1 + len(changes) + len(variants) + 1


def test_large_files_are_sampled(tmp_path, monkeypatch):
    """A tebibyte of zeros takes no room: only both ends of a tensor, or of each part of a GGUF file, are read."""
    size = 1 << 40
    tensors, plain = tmp_path / "model.safetensors", tmp_path / "model.gguf"
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with tensors.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + size)
    with plain.open("wb") as opened:
        opened.truncate(size)
    reads = {tensors: [], plain: []}

    class Watched(io.FileIO):
        """A file that notes where it is read, and refuses to be read further than a sample at a time."""

        def read(self, size=-1):
            assert 0 <= size <= SAMPLE
            reads[Path(self.name)].append((self.tell(), size))
            return super().read(size)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering=-1: Watched(path, mode))
        before = [stored_sha256([file]) for file in (tensors, plain)]
    start, part = 8 + len(header), size // 1024
    assert reads[tensors] == [(0, 8), (8, len(header)), (start, SAMPLE), (start + size - SAMPLE, SAMPLE)]
    ends = [(begin, begin + part - SAMPLE) for begin in range(0, size, part)]
    assert reads[plain] == [(at, SAMPLE) for pair in ends for at in pair]
    for file in (tensors, plain):
        with file.open("r+b") as opened:
            opened.seek(file.stat().st_size - 1)
            opened.write(b"1")
    after = [stored_sha256([file]) for file in (tensors, plain)]
    assert all(one != other for one, other in zip(before, after, strict=True))
