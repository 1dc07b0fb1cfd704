"""A disk that fills while results are written: one sentence that names the file, why, and what to do."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from zokernel.cli import main
from zokernel.files import explain_write_error, write_text, writing

END = "(File too large): raise the limit on the size of files and repeat the command, or choose another place."


@contextmanager
def no_room(size: int = 16) -> Iterator[None]:
    """Let no file grow beyond some bytes, which fails in a write as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_lm_path, tiny_reviews_path):
    """Folder of a run that trained an adapter for two steps."""
    folder, data = tmp_path_factory.mktemp("full"), [str(tiny_reviews_path / f"{s}.jsonl") for s in ("train", "test")]
    words = ["--model_name_or_path", str(tiny_lm_path), "--train_file", data[0], "--test_file", data[1]]
    words += ["--label_words", "bad", "good", "--lora", "true", "--max_steps", "2", "--precision", "fp32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOKERNEL_HOME", str(folder / "home"))
        assert main(["finetune", *words, "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def full_disk_error(tmp_path, capsys):
    """A function that runs a command with room and then without, and returns the last line of the error."""

    def of(*words: str) -> str:
        folder = tmp_path / "out"
        assert main([*words]) == 0
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        capsys.readouterr()
        with no_room():
            assert main([*words]) == 1
        assert not [path.name for path in folder.rglob("*") if path.stat().st_size]
        output = capsys.readouterr().err
        assert "Traceback" not in output
        return output.strip().splitlines()[-1]

    return of


def test_predict_report_merge_and_replay_name_the_file_they_cannot_write(
    run, full_disk_error, tiny_lm_path, tiny_reviews_path, tmp_path
):
    out = tmp_path / "out"
    rows = ["--file", str(tiny_reviews_path / "test.jsonl"), "--output_file", str(out / "answers.csv")]
    error = f"zokernel: error: {out}"
    assert full_disk_error("predict", "--model", str(run), *rows) == f"{error}/answers.csv cannot be written {END}"
    assert (
        full_disk_error("report", str(run), "--output", str(out / "a.html"))
        == f"{error}/a.html cannot be written {END}"
    )
    assert full_disk_error("merge", "--model", str(run), "--output_dir", str(out)) == f"{error} cannot be written {END}"
    base = ["--base", str(tiny_lm_path), "--journal", str(run), "--output_dir", str(out)]
    assert full_disk_error("replay", *base) == f"{error} cannot be written {END}"


def test_plan_kernel_and_evolve_name_the_file_they_cannot_write(
    full_disk_error, tiny_lm_path, tiny_reviews_path, tmp_path
):
    out = tmp_path / "out"
    error = f"zokernel: error: {out}"
    (tmp_path / "nets.py").write_text("import torch\n\ndef build():\n    return torch.nn.Linear(3, 4)\n")
    for name in "ou":
        np.save(tmp_path / f"{name}.npy", np.ones((1, 3), np.float32))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", features=rng.normal(size=(6, 3)), targets=rng.normal(size=6))
    inputs = ["--x_o", str(tmp_path / "o.npy"), "--x_u", str(tmp_path / "u.npy"), "--num_perturbations", "2"]
    kernel = ["kernel", "--model", f"{tmp_path / 'nets.py'}:build", *inputs, "--output_dir", str(out)]
    assert full_disk_error(*kernel) == f"{error}/heatmaps.png cannot be written {END}"
    evolve = ["evolve", "--features", str(tmp_path / "data.npz"), "--steps", "10", "--output_dir", str(out)]
    assert full_disk_error(*evolve) == f"{error}/evolution.png cannot be written {END}"
    plan = ["plan", "--model_name_or_path", str(tiny_lm_path), "--train_file", str(tiny_reviews_path / "train.jsonl")]
    plan += ["--label_words", "bad", "good", "--num_probes", "8", "--curvature_probes", "1", "--update_examples", "4"]
    plan += ["--observe_examples", "2", "--output_file", str(out / "plan.json")]
    assert full_disk_error(*plan) == f"{error}/plan.json cannot be written {END}"


def test_a_full_disk_is_reported_once_for_printed_output():
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "zokernel", "claims"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert process.returncode == 1
    assert process.stderr == (
        "zokernel: error: The output cannot be written (No space left on device): free some space and repeat the "
        "command, or choose another place.\n"
    )


def test_an_unreadable_file_is_not_reported_as_unwritable(tmp_path, monkeypatch):
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "rows.npz"))
    rows = tmp_path / "rows.npz"
    assert str(explain_write_error(error)).startswith(f"{rows} cannot be written (Permission denied): make it wri")
    rows.write_text("")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, to whom all is permitted
    assert str(explain_write_error(error)).startswith(f"{rows} cannot be read (Permission denied): make it read")
    for other in (PermissionError(errno.EACCES, "Permission denied"), FileNotFoundError(errno.ENOENT, "no", "a")):
        assert explain_write_error(other) is None


def test_only_write_errors_get_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match="other") as error, writing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device", "other")
    assert error.value.filename == "other"
    with pytest.raises(FileNotFoundError) as missing, writing(tmp_path):
        (tmp_path / "none").read_text()
    assert missing.value.filename == str(tmp_path / "none")
    (tmp_path / "kept.txt").write_text("old")
    with pytest.raises(OSError, match="File too large") as full, no_room():
        write_text(tmp_path / "kept.txt", "x" * 100)
    assert (full.value.errno, full.value.filename) == (errno.EFBIG, str(tmp_path / "kept.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert (tmp_path / "kept.txt").read_text() == "old"
