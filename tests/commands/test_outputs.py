"""An output that cannot be written is named before the work whose results it is to hold."""

from __future__ import annotations

import os
import tempfile

import pytest

from zokernel.cli import main
from zokernel.errors import RunError
from zokernel.files import check_output_dir, check_output_file

# Inputs that do not exist: an error about them would say that they were read first.
FILES = {
    "predict": (["--model", "none", "--file", "none.csv"], "--output_file", "out.csv"),
    "plan": (["--model_name_or_path", "none", "--train_file", "none.csv"], "--output_file", "plan.json"),
    "report": (["none"], "--output", "page.html"),
}
FOLDERS = {
    "kernel": ["--model", "none:none", "--x_o", "none.npy", "--x_u", "none.npy"],
    "evolve": ["--features", "none.npz"],
    "merge": ["--model", "none"],
    "replay": ["--base", "none", "--journal", "none"],
    "reproduce": ["kerzoo/estimator"],
    "finetune": ["--model_name_or_path", "gpt2", "--train_file", "none.csv", "--label_words", "bad", "good"],
}


@pytest.mark.parametrize("command", FILES)
def test_files(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words, flag, name = FILES[command]
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "folder" / name).mkdir(parents=True)
    os.mkfifo(tmp_path / name)
    for place, code, message in [
        (f"taken/{name}", 1, f"{flag} {name}: the folder taken cannot be written ({tmp_path / 'taken'} is a file)"),
        (f"/proc/none/{name}", 1, f"{flag} {name}: the folder /proc/none cannot be written (No such file or directory"),
        (f"folder/{name}", 2, f"{flag} folder/{name} is a folder: name a file in it."),
        (name, 2, f"{flag} {name} is a device or a pipe: name a file."),
    ]:
        assert main([command, *words, flag, place]) == code
        assert f"zokernel: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("command", FOLDERS)
def test_folders(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    for place in ("taken", "taken/below", "/proc/none"):
        assert main([command, *FOLDERS[command], "--output_dir", place]) == 1
        error = capsys.readouterr().err
        assert f" {place} cannot be written" in error
        assert error.rstrip().endswith("choose another.")


def test_what_can_be_written_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.csv").write_text("kept")
    for path in (tmp_path / "old.csv", tmp_path / "new.csv", tmp_path / "a" / "b" / "new.csv"):
        check_output_file(path)
        check_output_file(path.relative_to(tmp_path))
    assert [path.name for path in tmp_path.rglob("*")] == ["old.csv"]
    assert (tmp_path / "old.csv").read_text() == "kept"


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(*, dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # the tests may run as root, to whom all is permitted
    with pytest.raises(RunError, match=r"--output_dir .*new cannot be written \(Permission denied\): choose another"):
        check_output_dir(tmp_path / "new")
